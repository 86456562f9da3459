"""Attacks on images: by hand where that can be, and against pyautoattack on a small network."""

import logging

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.square import SquareAttack
from pydantic import ValidationError
from sklearn.datasets import load_digits

from stages.attack.apgd import checkpoints
from stages.attack.image_geometry import Draws, at_distance, project, same, sizes, steepest
from stages.attack.image_losses import (
    cross_entropy,
    difference_of_logits_ratio,
    margin,
    targeted_ratio,
)
from stages.attack.image_objective import Best, Objective, Value
from stages.attack.image_spec import (
    APGD,
    PAPER_BUDGETS,
    PGD,
    Noise,
    PaperPGD,
    Square,
    Transfer,
)
from stages.attack.images import attack_images, rows, worst_case
from stages.attack.pgd import paper_pgd
from stages.attack.square import _bump, _l2, share, side
from stages.errors import StageFailed

DIGITS = load_digits()
PIXELS = torch.tensor(DIGITS.images, dtype=torch.float32)[:, None] / 16
LABELS = torch.tensor(DIGITS.target)


def network(seed):
    torch.manual_seed(seed)
    layers = torch.nn
    model = layers.Sequential(layers.Flatten(), layers.Linear(64, 32), layers.ReLU(),
                              layers.Linear(32, 10))
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        chosen = torch.randint(0, 1500, (128,))
        loss = cross_entropy(model(PIXELS[chosen]), LABELS[chosen]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def toy():
    return network(0)


@pytest.fixture(scope="module")
def examples(toy):
    right = (toy(PIXELS[1500:]).argmax(1) == LABELS[1500:]).nonzero().flatten()[:100]
    return PIXELS[1500:][right], LABELS[1500:][right]


SEEDS = [(0, i) for i in range(100)]


def robust(model, attack, examples, budget, **fields):
    images, labels = examples
    outcome = attack_images(model, attack, images, labels, budget, SEEDS, **fields)
    assert torch.allclose(model(outcome.images), outcome.logits, atol=1e-5)
    return outcome.logits.argmax(1) == labels


# --- against pyautoattack


def peers(norm, budget):
    """What pyautoattack's attacks are told."""
    return {"n_iter": 50, "verbose": False, "eps": budget, "seed": 0, "device": "cpu",
            "norm": {"linf": "Linf", "l2": "L2"}[norm], "logger": logging.getLogger("peer")}


@pytest.mark.parametrize(("norm", "budget"), [("linf", 0.06), ("l2", 0.4)])
def test_robust_accuracy_is_pyautoattacks(toy, examples, norm, budget):
    """APGD on cross-entropy and on three targets: within one example in a hundred."""
    images, labels = examples
    ours = robust(toy, APGD(norm=norm, steps=50, restarts=2), examples, budget)
    ours &= robust(toy, APGD(norm=norm, steps=50, loss="dlr", targets=3), examples, budget)
    theirs = torch.ones(100, dtype=torch.bool)
    untargeted = APGDAttack(toy, n_restarts=2, loss="ce", **peers(norm, budget))
    targeted = APGDAttack_targeted(toy, n_restarts=1, n_target_classes=3, **peers(norm, budget))
    for peer in (untargeted, targeted):
        theirs &= toy(peer.perturb(images, labels)).argmax(1) == labels
    assert 15 < theirs.sum() < 85  # a budget at which it matters
    assert abs(int(ours.sum()) - int(theirs.sum())) <= 1


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
@pytest.mark.parametrize(("norm", "budget"), [("linf", 0.06), ("l2", 0.4)])
def test_robust_accuracy_under_one_loss_is_pyautoattacks(toy, examples, norm, budget, loss):
    """Untargeted APGD by itself: within one example in a hundred. pyautoattack has no margin loss;
    its ratio is that margin, rescaled."""
    images, labels = examples
    ours = robust(toy, APGD(norm=norm, steps=50, restarts=2, loss=loss), examples, budget)
    peer_loss = {"margin": "dlr"}.get(loss, loss)
    peer = APGDAttack(toy, n_restarts=2, loss=peer_loss, **peers(norm, budget))
    theirs = toy(peer.perturb(images, labels)).argmax(1) == labels
    assert 15 < theirs.sum() < 85
    assert abs(int(ours.sum()) - int(theirs.sum())) <= 1


def squares_peer(model, norm, **options):
    """pyautoattack's Square, with places up to the edge, short of which it stops otherwise."""
    peer = SquareAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], device="cpu", **options)
    peer.random_int = lambda low=0, high=1, shape=(1,): torch.randint(low, high + 1, shape)
    return peer


@pytest.mark.parametrize(("norm", "budget", "queries"), [("linf", 0.1, 200), ("l2", 0.8, 200)])
def test_squares_robust_accuracy_is_pyautoattacks(toy, examples, norm, budget, queries):
    """Means of three runs of each. With other random numbers the count of the 100 examples that
    withstand has a standard deviation of 0.5 to 2.3 (measured over six runs), so the difference of
    two means one of 1.3 or so: 4 is three times that."""
    images, labels = examples
    left = {"ours": 0, "peer's": 0}
    for seed in range(3):
        found = attack_images(toy, Square(norm=norm, queries=queries), images, labels, budget,
                              [(seed, i) for i in range(100)])
        left["ours"] += int((found.logits.argmax(1) == labels).sum())
        peer = squares_peer(toy, norm, n_queries=queries, eps=budget, seed=seed)
        left["peer's"] += int((toy(peer.perturb(images, labels)).argmax(1) == labels).sum())
    assert 3 * 15 < left["peer's"] < 3 * 85
    assert abs(left["ours"] - left["peer's"]) <= 3 * 4


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9, 25])
def test_the_bump_is_the_published_one(length):
    ours, theirs = _bump(length), [squares_peer(None, "l2").eta(length) for _ in range(30)]
    turned = [length > 1 and not torch.allclose(each, ours, atol=1e-6) for each in theirs]
    for each, turn in zip(theirs, turned, strict=True):
        torch.testing.assert_close(each, ours.T if turn else ours)
    assert length == 1 or 5 < sum(turned) < 25


def test_a_bump_stands_upright_or_is_turned():
    """By hand: halves of two rows and of three, which fall off from (1, 2) and from (3, 2)."""
    high, middle, low = 1 + 1 / 4 + 1 / 9, 1 / 4 + 1 / 9, 1 / 9
    upper = torch.tensor([[low, middle, middle, middle, low], [low, middle, high, middle, low]])
    lower = torch.cat([upper[:1], upper[1:], upper[:1]])
    bump = torch.cat([upper / upper.norm(), -lower / lower.norm()]) / 2**0.5
    clean = torch.full((40, 1, 8, 8), 0.5)
    images = _l2(clean, clean, same(0.3, clean), 5, Draws([(7, i) for i in range(40)]))
    kinds = {"upright": 0, "turned": 0}
    for change in (images - clean)[:, 0] / 0.3:
        rows, columns = (change.abs().sum(d) > 0 for d in (1, 0))
        placed = change[rows][:, columns]
        for kind, shape in (("upright", bump), ("turned", bump.T)):
            kinds[kind] += any(torch.allclose(placed, s * shape, atol=1e-5) for s in (-1, 1))
    assert sum(kinds.values()) == 40 and min(kinds.values()) > 10


# --- hygiene, as any correct attack shows it


def test_stronger_attacks_and_larger_budgets_leave_less(toy, examples):
    by_budget = [robust(toy, PGD(steps=20), examples, b).sum() for b in (0.02, 0.06, 0.12, 1.0)]
    assert by_budget == sorted(by_budget, reverse=True) and by_budget[0] > by_budget[2]
    assert by_budget[-1] == 0  # unbounded
    white = robust(toy, APGD(steps=50), examples, 0.06).sum()
    noise = robust(toy, Noise(queries=50), examples, 0.06).sum()
    transfer = robust(toy, Transfer(steps=50), examples, 0.06, partner=network(1)).sum()
    blind = robust(toy, Square(queries=400), examples, 0.06).sum()
    assert white <= blind < noise and white < transfer < noise


def test_pgd_by_default_has_what_a_correct_one_has(toy, examples):
    """Five random starts of steps of 2.5 budgets / steps, each image's best."""
    assert (PGD().steps, PGD().relative_step, PGD().random_start) == (40, 2.5, True)
    assert PGD().restarts == 5 and APGD().restarts == 1
    images, labels = examples
    found = attack_images(toy, PGD(steps=3), images, labels, 0.06, SEEDS)
    assert found.gradients == 5 * 3 and found.forwards.tolist() == [5 * (3 + 1)] * 100
    one = attack_images(toy, PGD(steps=3, restarts=1), images, labels, 0.06, SEEDS)
    losses, least = (
        torch.nn.functional.cross_entropy(each.logits, labels, reduction="none")
        for each in (found, one))
    right, still = (each.logits.argmax(1) == labels for each in (found, one))
    assert (right <= still).all()  # the first start is the same
    assert (losses >= least - 1e-5)[right].all() and (losses > least + 1e-3).sum() > 10


@pytest.mark.parametrize("attack", [PGD(steps=5, norm="l2", restarts=2), APGD(steps=5),
                                    APGD(steps=5, norm="l2"), Square(queries=40),
                                    Square(queries=40, norm="l2"), Noise(norm="l2"), Noise()])
def test_no_image_leaves_its_ball_or_the_valid_range(toy, examples, attack):
    images, labels = examples
    found = attack_images(toy, attack, images, labels, 0.1, SEEDS).images
    assert sizes(found - images, attack.norm).max() <= 0.1 + 1e-6
    assert found.min() >= 0 and found.max() <= 1
    part = attack_images(toy, attack, images[7:9], labels[7:9], 0.1, SEEDS[7:9]).images
    torch.testing.assert_close(part, found[7:9], atol=1e-6, rtol=0)  # whatever the batch


@pytest.mark.parametrize("attack", [
    PaperPGD(steps=5), PGD(steps=5, restarts=2), PGD(steps=5, norm="l2"), APGD(steps=8),
    APGD(steps=8, norm="l2"), APGD(steps=8, loss="dlr", targets=2), Square(queries=40),
    Square(queries=40, norm="l2"), Noise(queries=3), Noise(queries=3, norm="l2")])
def test_images_of_several_budgets_in_one_batch_are_as_those_of_each(toy, examples, attack):
    images, labels = (each[:30] for each in examples)
    budgets = (0.04, 0.3) if attack.norm == "linf" else (0.2, 1.0)
    each = [attack_images(toy, attack, images, labels, b, SEEDS[:30]) for b in budgets]
    limits = torch.tensor(budgets, dtype=torch.float64).repeat_interleave(30)
    whole = attack_images(toy, attack, images.repeat(2, 1, 1, 1), labels.repeat(2), limits,
                          2 * SEEDS[:30])
    for name in ("images", "logits", "forwards"):
        apart = torch.cat([getattr(found, name) for found in each])
        torch.testing.assert_close(getattr(whole, name), apart, atol=1e-5, rtol=1e-5)
    assert (each[0].images - each[1].images).abs().max() > 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_is_as_large_as_the_budget_on_a_black_background(norm):
    """A third of the pixels can move one way only, where clipping takes half of what is drawn."""
    images = PIXELS[1500:1520].clone()
    assert (images == 0).float().mean() > 0.3
    found = attack_images(lambda each: torch.zeros(len(each), 10), Noise(norm=norm, queries=3),
                          images, LABELS[1500:1520], 0.8, SEEDS[:20]).images
    assert found.min() >= 0 and found.max() <= 1
    assert sizes(found - images, norm).tolist() == pytest.approx([0.8] * 20, rel=1e-5)


def test_a_pixel_at_its_end_leaves_its_share_to_the_others():
    clean = torch.tensor([[0.0, 0.9, 0.2], [0.0, 0.9, 0.2], [0.5, 0.5, 0.5]]).view(3, 1, 1, 3)
    along = torch.tensor([[-1.0, 1.0, 1.0], [-1.0, 1.0, 1.0], [3.0, 4.0, -1e-9]]).view(3, 1, 1, 3)
    first = at_distance(clean, along, same(0.5, clean)).flatten(1)
    # 0.1² + x² = 0.5²; all of 0.6 and 0.8 of the way, halved.
    expected = torch.tensor([0.0, 1.0, 0.2 + 0.24**0.5]).expand(2, 3)
    torch.testing.assert_close(first[:2], expected)
    torch.testing.assert_close(first[2], torch.tensor([0.8, 0.9, 0.5]))
    # 0.1² + 0.8² is all there is that way: the corner.
    torch.testing.assert_close(at_distance(clean, along, same(2.0, clean))[0].flatten(),
                               torch.tensor([0.0, 1.0, 1.0]))


def test_evaluations_are_counted(toy, examples):
    images, labels = examples

    def count(attack):
        found = attack_images(toy, attack, images, labels, 0.06, SEEDS)
        return found.gradients, found.forwards

    gradients, forwards = count(PGD(steps=5, restarts=2))
    assert gradients == 10 and forwards.tolist() == [12] * 100
    assert count(APGD(steps=6))[0] == 6
    assert count(APGD(steps=6, loss="dlr", targets=2))[0] == 12
    gradients, forwards = count(Square(queries=30))
    assert gradients == 0 and forwards.max() == 30 and 1 <= forwards.min() < 30


# --- the paper's attack


class Steps:
    """An objective whose gradient is what the list says, one entry per step."""

    def __init__(self, gradients, labels=None):
        self.left, self.labels = list(gradients), labels

    def climb(self, images):
        return None, torch.full_like(images, self.left.pop(0))

    def __call__(self, images):
        return Value(None, torch.zeros(len(images), 2))


@pytest.mark.parametrize(("flipped", "left"), [(0, 1), (4, 0.8), (10, 0.5), (20, 0)])
def test_a_pixel_whose_sign_flips_ends_inside(flipped, left):
    signs = [-1.0] * flipped + [1.0] * (40 - flipped)
    clean = torch.full((1, 1, 1, 1), 0.9)
    found = paper_pgd(Steps(signs, torch.tensor([0])), PaperPGD(), clean, same(0.2, clean)).images
    assert found.item() == pytest.approx(0.9 + left * 0.2, abs=1e-6)  # and is not clipped to 1


def test_one_update_on_squared_error():
    """The authors' own case: a row with a zero gradient stays where it is."""
    clean = torch.tensor([[0.1, 0.2, 0.0], [0.2, 0.0, 0.0]]).view(2, 1, 1, 3)
    goal = torch.tensor([0.2, 0.0, 0.0])

    class SquaredError:
        labels = torch.tensor([0, 0])

        def climb(self, images):
            return None, 2 * (images - goal)

        def __call__(self, images):
            return Value(None, torch.zeros(2, 2))

    last = paper_pgd(SquaredError(), PaperPGD(steps=1), clean, same(0.1, clean))
    expected = torch.tensor([[0.0, 0.3, 0.0], [0.2, 0.0, 0.0]])
    torch.testing.assert_close(last.images.view(2, 3), expected)


def test_the_papers_budgets():
    assert len(PAPER_BUDGETS) == 26 and sorted(PAPER_BUDGETS) == list(PAPER_BUDGETS)
    extra = [b * 255 for b in PAPER_BUDGETS if b * 255 < 0.99]
    assert extra == pytest.approx([0.1275, 0.255, 0.3825, 0.51, 0.6375, 0.765])


# --- parts, by hand


def test_losses_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 2.0, 1.0, -2.0]])
    labels = torch.tensor([0, 0])
    assert margin(logits, labels).tolist() == [-2.0, 2.0]
    torch.testing.assert_close(difference_of_logits_ratio(logits, labels),
                               torch.tensor([-2 / 3, 2 / 2]))
    torch.testing.assert_close(targeted_ratio(logits, labels, torch.tensor([2, 2])),
                               torch.tensor([-3 / 3.5, 1 / 3.0]))
    torch.testing.assert_close(difference_of_logits_ratio(10 * logits, labels),
                               difference_of_logits_ratio(logits, labels))
    with pytest.raises(StageFailed, match="set loss: margin"):
        difference_of_logits_ratio(logits[:, :2], labels)


def test_projection_by_hand():
    clean = torch.tensor([0.5, 0.5]).view(1, 1, 1, 2)
    far = clean + torch.tensor([0.3, -0.4]).view(1, 1, 1, 2)

    def projected(images, budget, norm):
        return project(images, clean, same(budget, clean), norm)

    assert projected(far, 0.3, "linf").flatten().tolist() == pytest.approx([0.8, 0.2])
    assert projected(far, 0.25, "l2").flatten().tolist() == pytest.approx([0.65, 0.3])
    assert torch.equal(projected(far, 0.6, "l2"), far)
    assert projected(2 * far, 5.0, "l2").flatten().tolist() == pytest.approx([1.0, 0.2])
    tiny = torch.tensor([3e-30, 4e-30]).view(1, 1, 1, 2)
    assert steepest(tiny, "l2").flatten().tolist() == pytest.approx([0.6, 0.8])
    assert steepest(torch.zeros(1, 1, 1, 2), "l2").tolist() == [[[[0.0, 0.0]]]]


def test_the_best_iterate_is_the_first_wrong_one_then_the_highest_loss():
    labels = torch.zeros(3, dtype=torch.long)
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    best = Best(torch.zeros(3, 1, 1, 1))
    for mark, losses, logits in (
        (1.0, [5.0, 1.0, 1.0], [right, right, right]),
        (2.0, [1.0, 2.0, 0.5], [wrong, right, right]),
        (3.0, [9.0, 0.0, 0.1], [right, wrong, right]),
    ):
        images = torch.full((3, 1, 1, 1), mark)
        best.update(images, Value(torch.tensor(losses), torch.tensor(logits)), labels)
    assert best.images.flatten().tolist() == [2.0, 3.0, 1.0]
    assert best.wrong.tolist() == [True, True, False]
    assert best.logits.tolist() == [wrong, wrong, right]


def test_apgds_checkpoints_and_squares_schedule():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    shares = [share(q, 10_000, 0.8) for q in (0, 11, 51, 201, 501, 1001, 8001)]
    assert shares == [0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.8 / 512]
    assert share(50, 500, 0.8) == share(1000, 10_000, 0.8)
    assert (side(0.8, 28), side(0.01, 28), side(1e-6, 28)) == (25, 3, 1)


def test_draws_belong_to_the_image():
    whole, part = Draws([(3, i) for i in range(5)]), Draws([(3, 4)])
    assert torch.equal(whole.normal((2, 2))[4], part.normal((2, 2))[0])
    mask = torch.tensor([False, False, True, False, True])
    later = whole.only(mask).uniform(0, 1, (3,))
    assert torch.equal(later[1], part.uniform(0, 1, (3,))[0])


def test_attacks_that_cannot_be_are_refused(toy, examples):
    with pytest.raises(ValidationError, match="random_start"):
        PGD(restarts=2, random_start=False)
    with pytest.raises(ValidationError, match="loss: dlr"):
        APGD(targets=3)
    with pytest.raises(StageFailed, match="no partner"):
        robust(toy, Transfer(), examples, 0.1)


def test_rows_and_the_worst_case_of_each_example(toy):
    images, labels = PIXELS[1500:1520], LABELS[1500:1520].clone()
    labels[0] = (toy(images[:1]).argmax(1) + 1) % 10  # misclassified from the start
    ids = [f"image{i}" for i in range(20)]
    clean = toy(images)
    found = []
    for name, attack in {"pgd": PGD(steps=10), "square": Square(queries=20)}.items():
        outcome = attack_images(toy, attack, images, labels, 0.08, SEEDS[:20])
        found += rows(name, attack, 0.08, outcome, images, clean, labels, ids)
    assert len(found) == 40
    assert found[0]["clean_correct"] == found[0]["robust"] == 0
    worst = worst_case(found)
    by_attack = [{r["id"]: r["robust"] for r in found if r["attack"] == n}
                 for n in ("pgd", "square")]
    assert worst == {(i, "linf", 0.08): min(a[i] for a in by_attack) for i in ids}
    assert all(0 <= r["distance"] <= 0.08 + 1e-6 for r in found)
    assert all(r["zero_gradient"] >= 0 for r in found if r["attack"] == "pgd")


def test_an_objective_of_routing_needs_experts():
    from stages.models.images import Classifier
    from stages.models.vision import from_scratch
    from stages.models.vision_spec import VisionSpec

    dense = VisionSpec(size="tiny", hidden=16, neurons=16, depth=1, patch=4, image_size=8,
                       channels=1, labels=10)
    classifier = Classifier(*from_scratch(dense))
    with pytest.raises(StageFailed, match="no choice of experts"):
        Objective(classifier, PGD(routing="soft"), PIXELS[:2], LABELS[:2])


class _NoSlope(torch.autograd.Function):
    """The images forward; no number backward."""

    @staticmethod
    def forward(context, images):
        return images.clone()

    @staticmethod
    def backward(context, gradient):
        return torch.full_like(gradient, torch.nan)


@pytest.mark.parametrize("attack", [PGD(steps=3, norm="l2"), APGD(steps=3, norm="l2")])
def test_a_gradient_that_is_no_number_breaks_no_image(toy, examples, attack):
    """Starts, of a budget too small to mislead anybody, are all that is left; and it is told."""
    images, labels = (part[:8] for part in examples)
    outcome = attack_images(
        lambda pixels: toy(_NoSlope.apply(pixels)), attack, images, labels, 1e-3, SEEDS[:8])
    assert outcome.images.isfinite().all() and (outcome.logits.argmax(1) == labels).all()
    assert (outcome.images - images).flatten(1).norm(dim=1).max() <= 1e-3 + 1e-6
    assert outcome.zero_gradient.eq(1).all()
