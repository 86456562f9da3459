"""Vision models through the same loop: equal to a plain one, spread, resumed, and evaluated."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from transformers import get_linear_schedule_with_warmup

from stages.attack.image_geometry import sizes
from stages.attack.image_spec import APGD, PGD, PaperPGD, Square
from stages.data import stage as data_stage
from stages.data.spec import Corruption, DataSpec
from stages.errors import StageFailed
from stages.evaluate import stage as evaluate_stage
from stages.evaluate.image_attacks import ImageAttacks
from stages.evaluate.spec import EvaluateSpec
from stages.evaluate.vision import ImageClassification
from stages.finetune.adversary import divergence, perturbed, router_divergence
from stages.finetune.batches import global_batch, load_examples, micro_batch
from stages.finetune.dense import for_dense
from stages.finetune.recipe import AdversarialPGD, Alternate, FreeLB, Router, Trades
from stages.finetune.refusals import contradictions, inapplicable
from stages.finetune.spec import FinetuneSpec, TrainSet
from stages.finetune.training import _seed
from stages.models import stage as model_stage
from stages.models.families import family
from stages.models.images import Classifier, load_processor
from stages.models.load import load
from stages.models.routes import routed
from stages.models.sources import Facts, describe
from stages.models.vision_spec import VisionSpec
from stages.probe.change import routing_changes
from tests.stages.finetune.reference import curve, plain, weights
from tests.stages.finetune.runs import Run, launch

DENSE = VisionSpec(
    size="tiny", hidden=32, neurons=48, depth=2, patch=4, image_size=8, channels=1, labels=10
)
SPARSE = DENSE.model_copy(
    update={"experts": 4, "top_k": 2, "layers": (1,), "shared_start": False}
)
SPEC = FinetuneSpec(
    data=(TrainSet(dataset="digits"),),
    steps=4,
    batch_size=8,
    learning_rate=3e-3,
    warmup_steps=2,
    gradient_clipping=0.5,
    workers=2,
    micro_batch=2,
    checkpoint_every=2,
    seed=5,
)
BALANCED = {"importance_loss_weight": 0.3, "gshard_loss_weight": 0.2}
NOISY = {"router": Router(noise="1/E"), "load_loss_weight": 0.5, "importance_loss_weight": 0.3}
TURNS = {"adversarial": Trades(budget=0.1, steps=3, router_beta=5.0),
         "alternate": Alternate(every=1, first="router"), "warmup_steps": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models, and data sets of digits, by name."""
    made = {}
    for name, spec in {"dense": DENSE, "sparse": SPARSE}.items():
        made[name] = tmp_path_factory.mktemp(name)
        model_stage.run(spec, {}, made[name])
    digits = DataSpec(task="images", source="builtin:digits", splits={"train": 0.5, "test": 0.5},
                      rows={"train": 20, "test": 12})
    noisy = digits.model_copy(update={"corruption": Corruption(kind="noise", level=5)})
    for name, spec in {"digits": digits, "noisy": noisy}.items():
        made[name] = tmp_path_factory.mktemp(name)
        data_stage.run(spec, {}, made[name])
    return made


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """The outputs of fine-tunes in two processes, by name."""
    folder, planned = tmp_path_factory.mktemp("runs"), []
    data = {"data/digits": folders["digits"]}

    def plan(name, model, changes, **fields):
        (folder / name).mkdir(exist_ok=True)
        spec = SPEC.model_copy(update=changes)
        inputs = {"model": folders[model], **data}
        planned.append(Run(spec, inputs, folder / name, **fields))

    kept = tmp_path_factory.mktemp("checkpoints")
    plan("dense", "dense", {})
    plan("spread", "sparse", BALANCED | {"expert_parallel": 2})
    plan("noisy", "sparse", NOISY, checkpoints=kept)
    plan("resumed", "sparse", NOISY, checkpoints=kept)  # from the checkpoint of step 2
    plan("pgd", "dense", {"adversarial": AdversarialPGD(budget=0.1, steps=3)})
    plan("trades", "dense", {"adversarial": Trades(budget=0.1, steps=3, norm="l2")})
    plan("turns", "sparse", TURNS)
    launch(2, planned, tmp_path_factory.mktemp("store") / "store")
    return folder


def losses_of_routers(seen):
    """Importance and GShard losses of the one sparse layer, from its logits (T, E)."""
    p = seen[0].softmax(-1)
    importance = p.sum(0)
    variation = (importance.std(correction=0) / importance.mean()) ** 2
    best = torch.nn.functional.one_hot(p.argmax(-1), 4).float().mean(0)
    return 0.3 * variation + 0.2 * 4 * (best * p.mean(0)).sum()


def reference(spec, folder, data):
    """A plain PyTorch loop: its losses, gradient norms and weights."""
    model = plain(folder).train()
    examples = load_examples(spec, {"data/digits": data}, load_processor(folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, spec.warmup_steps, spec.steps)
    seen, rows = [], []
    for router in family(model).modules(model, "router").values() if family(model).is_moe else ():
        router.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    for step in range(spec.steps):
        batch = global_batch(len(examples), spec.batch_size, spec.seed, step)
        losses, extra = [], []
        for start in range(0, spec.batch_size, spec.micro_batch):
            part = [examples[i] for i in batch[start : start + spec.micro_batch]]
            pixels = (part[0].processor.decode([e.image for e in part]) - 0.5) / 0.5
            seen.clear()
            logits = model(pixel_values=pixels).logits
            labels = torch.tensor([e.label for e in part])
            nll = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            losses.append(nll / spec.batch_size)
            if seen:
                extra.append(losses_of_routers(seen) / 4)
        (sum(losses) + sum(extra)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), spec.gradient_clipping)
        rows.append((sum(losses).item(), norm.item()))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return rows, model.state_dict()


@pytest.mark.parametrize("name", ["dense", "spread"])
def test_training_is_a_plain_loops(runs, folders, name):
    model = "dense" if name == "dense" else "sparse"
    expected, state = reference(SPEC, folders[model], folders["digits"])
    got = curve(runs / name)
    assert got["loss"].tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert got["gradient_norm"].tolist() == pytest.approx([n for _, n in expected], rel=1e-4)
    for key, value in weights(runs / name).items():
        if key.endswith("k_proj.bias"):  # shifts all scores of a query: its gradient is rounding
            continue
        torch.testing.assert_close(value, state[key], rtol=0, atol=2e-4)
    assert load_processor(runs / name) == load_processor(folders[model])
    assert got["tokens"].tolist() == [8 * 5] * 4


def test_noise_of_one_over_the_experts_and_all_losses_act_and_resume(runs):
    whole, resumed = curve(runs / "noisy"), curve(runs / "resumed")
    columns = ["loss", "gradient_norm", "importance_loss", "load_loss"]
    pd.testing.assert_frame_equal(whole[columns], resumed[columns], rtol=1e-6)
    assert (whole["load_loss"] > 0).all() and whole["gshard_loss"].isna().all()
    knobs = json.loads((runs / "noisy/recipe_evidence.json").read_text())["knobs"]
    square = knobs["router.noise"]["measured"]["mean_square_of_the_noise"]
    assert square == pytest.approx(1 / 16, rel=0.3)  # a quarter, for four experts
    for knob in ("load_loss_weight", "importance_loss_weight"):
        assert knobs[knob]["measured"]["router_gradient_norm"] > 1e-3
    for name, value in weights(runs / "noisy").items():
        torch.testing.assert_close(value, weights(runs / "resumed")[name], rtol=0, atol=1e-6)


def test_importance_is_that_of_the_router_without_noise(runs, folders):
    """At the first step, whose weights are the model's: the mean over the micro-batches."""
    model, seen = plain(folders["sparse"]).train(), []
    (router,) = family(model).modules(model, "router").values()
    router.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    processor = load_processor(folders["sparse"])
    examples = load_examples(SPEC, {"data/digits": folders["digits"]}, processor)
    batch = global_batch(len(examples), SPEC.batch_size, SPEC.seed, 0)
    for start in range(0, SPEC.batch_size, SPEC.micro_batch):
        part = [examples[i].image for i in batch[start : start + SPEC.micro_batch]]
        model(pixel_values=(processor.decode(part) - 0.5) / 0.5)
    sums = torch.stack([logits.softmax(-1).sum(0) for logits in seen])
    expected = (sums.std(1, correction=0) / sums.mean(1)).square().mean().item()
    assert curve(runs / "noisy")["importance_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_adversarial_training_sees_worse_images(runs):
    """On the first batch, before anything is learnt: PGD's loss is higher than that of the clean
    images, TRADES keeps theirs and adds the divergence."""
    clean = curve(runs / "dense")["loss"][0]
    assert curve(runs / "pgd")["loss"][0] > 1.02 * clean
    trades = curve(runs / "trades")
    assert trades["loss"][0] == pytest.approx(clean, rel=1e-5)
    assert trades["gradient_norm"][0] != pytest.approx(curve(runs / "dense")["gradient_norm"][0])
    for name in ("pgd", "trades"):
        knobs = json.loads((runs / name / "recipe_evidence.json").read_text())["knobs"]
        found = knobs["adversarial"]["measured"]
        assert 0.05 < found["size_of_the_perturbation"] <= 0.1 + 1e-6
        assert name == "pgd" or found["divergence"] > 1e-4


def test_routers_and_the_rest_take_turns_under_an_attack_on_both(runs, folders):
    got = curve(runs / "turns")
    assert (got["router_change"] > 0).tolist() == [True, False, True, False]
    knobs = json.loads((runs / "turns/recipe_evidence.json").read_text())["knobs"]
    assert knobs["alternate"]["measured"]["steps_that_moved_the_routers"] == 2
    # The first step by hand: a turn of the routers.
    spec = SPEC.model_copy(update=TURNS)
    model, processor = load(folders["sparse"]), load_processor(folders["sparse"])
    examples = load_examples(spec, {"data/digits": folders["digits"]}, processor)
    batch = global_batch(len(examples), 8, spec.seed, 0)
    model.train().requires_grad_()
    turned = []
    for place in range(0, 8, 2):
        part = [examples[i] for i in batch[place : place + 2]]
        labels = torch.tensor([e.label for e in part])
        clean = processor.decode([e.image for e in part])
        classifier = Classifier(model, processor)
        torch.manual_seed(_seed(spec.seed, 0, place))
        images = perturbed(classifier, clean, labels, spec.adversarial)
        with routed(model) as routes:
            before, after = classifier(torch.cat([clean, images])).chunk(2)
        p, q = routes[0].logits.softmax(-1).chunk(2)
        turned.append(2 * (p * (p / q).log()).sum(-1).mean())
        loss = torch.nn.functional.cross_entropy(before, labels, reduction="sum")
        loss = loss + 6 * divergence(before, after) + 5 * turned[-1]
        (loss / 8).backward()
    (router,) = family(model).modules(model, "router").values()
    assert got["gradient_norm"][0] == pytest.approx(router.weight.grad.norm().item(), rel=1e-3)
    found = knobs["adversarial"]["measured"]["router_divergence"]
    # Of the first rank.
    assert found == pytest.approx(sum(turned[:2]).item() / 4, rel=1e-3) and found > 1e-3
    fields, dropped = for_dense(spec)
    assert fields["adversarial"].router_beta == 0 and fields["alternate"] is None
    assert dropped == {"alternate": {"every": 1, "first": "router"},
                       "adversarial.router_beta": 5.0}


def test_an_attack_on_the_routers_moves_them_more(folders):
    classifier = Classifier(load(folders["sparse"]), load_processor(folders["sparse"]))
    rows = pd.read_parquet(folders["digits"] / "test.parquet")
    clean = classifier.processor.decode(rows["image"])
    labels = torch.tensor(rows["label"].astype(int).to_numpy())
    moved = {}
    for weight in (0.0, 100.0):
        torch.manual_seed(0)
        images = perturbed(classifier, clean, labels, Trades(steps=5, router_beta=weight))
        with routed(classifier.model) as before:
            classifier(clean)
        with routed(classifier.model) as after:
            classifier(images)
        pairs = [(a.logits, b.logits) for a, b in zip(before, after, strict=True)]
        moved[weight] = router_divergence(pairs, len(clean)).item()
    assert moved[100.0] > 1.2 * moved[0.0] > 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [AdversarialPGD, Trades])
def test_an_adversary_stays_in_its_ball_and_climbs(folders, kind, norm):
    classifier = Classifier(load(folders["dense"]), load_processor(folders["dense"]))
    rows = pd.read_parquet(folders["digits"] / "test.parquet")
    clean = classifier.processor.decode(rows["image"])
    labels = torch.tensor(rows["label"].astype(int).to_numpy())
    torch.manual_seed(0)
    images = perturbed(classifier, clean, labels, kind(budget=0.2, steps=5, norm=norm))
    assert sizes(images - clean, norm).max() <= 0.2 + 1e-6
    assert images.min() >= 0 and images.max() <= 1 and not images.requires_grad
    assert all(p.grad is None for p in classifier.parameters())
    before, after = classifier(clean), classifier(images)
    if kind is Trades:
        p, q = before.softmax(-1), after.softmax(-1)
        torch.testing.assert_close(divergence(before, after), (p * (p / q).log()).sum())
        random = classifier((clean + 1e-3 * torch.randn_like(clean)).clamp(0, 1))
        assert divergence(before, after) > 10 * divergence(before, random)
    else:
        cross = torch.nn.functional.cross_entropy
        assert cross(after, labels) > cross(before, labels) + 0.01


def score(folder, evaluation, folders, output):
    output.mkdir()
    inputs = {"checkpoint": folder}
    inputs |= {f"data/{name}": folders[name] for name in evaluation.datasets()}
    evaluate_stage.run(EvaluateSpec(evaluation=evaluation, shard_size=5), inputs, output)
    return pd.read_parquet(output / "scores.parquet"), json.loads(
        (output / "summary.json").read_text()
    )


@torch.no_grad()
def test_accuracy_on_clean_and_shifted_images(runs, folders, tmp_path):
    evaluation = ImageClassification(dataset="digits", shifted=("noisy",))
    scores, summary = score(runs / "spread", evaluation, folders, tmp_path / "out")
    model, processor = load(runs / "spread"), load_processor(runs / "spread")
    for name in ("digits", "noisy"):
        rows = pd.read_parquet(folders[name] / "test.parquet")
        logits = model(processor.normalised(processor.decode(rows["image"]))).logits
        mine = scores[scores["domain"] == name]
        assert mine["prediction"].tolist() == [str(i) for i in logits.argmax(1).tolist()]
        labels = torch.tensor(rows["label"].astype(int).to_numpy())
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        assert mine["loss"].tolist() == pytest.approx(loss.tolist(), rel=1e-4)
        right = (logits.argmax(1) == labels).float().mean().item()
        metric = "accuracy" if name == "digits" else "accuracy/noisy"
        assert summary[metric]["value"] == pytest.approx(right)
    lost = summary["accuracy"]["value"] - summary["accuracy/noisy"]["value"]
    assert summary["accuracy_lost"]["value"] == pytest.approx(lost)
    # A noisy image is the clean one in another form: they are one document.
    pairs = scores.groupby("document")["domain"].agg(list)
    assert len(pairs) == 12 and all(domains == ["digits", "noisy"] for domains in pairs)
    assert list(summary)[0] == evaluation.primary == "shifted_accuracy"
    assert ImageClassification(dataset="digits").primary == "accuracy"


@pytest.mark.parametrize("model", ["dense", "spread"])
def test_attacks_as_an_evaluation(runs, folders, tmp_path, model):
    attacks = {"soft": APGD(steps=2, routing="soft"), "square": Square(queries=3),
               "paper": PaperPGD(steps=2, gshard_loss_weight=0.01)}
    evaluation = ImageAttacks(dataset="digits", budgets=(0.1, 0.3), attacks=attacks)
    scores, summary = score(runs / model, evaluation, folders, tmp_path / "out")
    assert len(scores) == 12 and evaluation.primary == evaluation.metrics()[0].name
    shown = ["25.5", "76.5"]
    for budget in shown:
        columns = [f"robust/{name}/{budget}" for name in attacks if name != "paper"]
        assert (scores[f"worst/{budget}"] == scores[columns].min(axis=1)).all()
        assert scores[f"worst/{budget}"].le(scores["correct"]).all()
        value = summary[f"robust_accuracy_{budget}"]["value"]
        assert value == pytest.approx(scores[f"worst/{budget}"].mean())
    mean = scores[[f"worst/{budget}" for budget in shown]].mean(axis=1)
    assert scores["robust"].tolist() == pytest.approx(mean.tolist())
    changes = scores[[f"routing_change/{name}/76.5" for name in attacks]].to_numpy()
    if model == "dense":
        assert np.isnan(changes).all()
    else:
        assert (changes >= 0).all() and (changes > 0).any() and (changes <= 1).all()
    if model == "dense":  # what acts on experts runs without that there, as often
        again, _ = score(runs / model, evaluation, folders, tmp_path / "again")
        pd.testing.assert_frame_equal(scores, again)


@torch.no_grad()
def test_routing_change_by_hand(runs, folders):
    """Two of four experts a token: sets that share one of them have an IoU of 1/3."""
    classifier = Classifier(load(runs / "spread"), load_processor(runs / "spread"))
    generator = torch.Generator().manual_seed(0)
    images, others = torch.rand(2, 3, 1, 8, 8, generator=generator)

    def chosen(pixels):
        with routed(classifier.model) as routes:
            classifier(pixels)
        return routes, [set(row) for row in routes[0].experts.tolist()]

    before, first = chosen(images)
    after, second = chosen(others)
    each = [1 - len(a & b) / len(a | b) for a, b in zip(first, second, strict=True)]
    expected = [sum(each[5 * i : 5 * i + 5]) / 5 for i in range(3)]
    found = routing_changes(before, after, 3)
    assert [list(of) for of in found] == [["vit.layers.1.mlp"]] * 3
    assert [of["vit.layers.1.mlp"] for of in found] == pytest.approx(expected)
    assert 0 < sum(expected) and sum(routing_changes(before, before, 3)[1].values()) == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"attacks": {"a": PGD(), "b": PGD(norm="l2")}}, "differ in norm"),
        ({"attacks": {"a": PaperPGD()}}, "paper alone"),
        ({"budgets": (0.2, 0.1)}, "smallest first"),
    ],
)
def test_attacks_that_cannot_be_are_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        ImageAttacks(**{"dataset": "digits", "budgets": (0.1,)} | fields)


def test_recipes_that_cannot_act_are_refused(folders):
    def problems(facts=None, **changes):
        spec = SPEC.model_copy(update=changes)
        found = [*contradictions(spec), *(inapplicable(spec, facts) if facts else ())]
        return {field for field, _ in found}

    assert problems(load_loss_weight=0.1) == {"load_loss_weight"}
    assert problems(load_loss_weight=0.1, router=Router(noise=0.5)) == set()
    assert problems(describe(DENSE), gshard_loss_weight=0.1) == {"gshard_loss_weight"}
    assert problems(describe(SPARSE), gshard_loss_weight=0.1) == set()
    assert problems(describe(DENSE), adversarial=FreeLB()) == {"adversarial"}
    assert problems(describe(DENSE), adversarial=Trades()) == set()
    assert problems(Facts("dense", "llama"), adversarial=AdversarialPGD()) == {"adversarial"}
    assert FinetuneSpec.model_validate_json(
        SPEC.model_copy(update={"adversarial": FreeLB(steps=2)}).model_dump_json()
    ).adversarial == FreeLB(steps=2)
    jamba = Facts("moe", "switch_transformers", experts=4, top_k=1)
    noisy = {"load_loss_weight": 0.1, "router": Router(noise=0.5)}
    assert "load_loss_weight" in problems(jamba, **noisy)


def test_labels_that_the_model_lacks_are_named(folders):
    processor = load_processor(folders["dense"])
    few = processor.__class__(**vars(processor) | {"labels": ("0", "1", "2")})
    with pytest.raises(StageFailed, match="is none of the model's"):
        load_examples(SPEC, {"data/digits": folders["digits"]}, few)
    examples = load_examples(SPEC, {"data/digits": folders["digits"]}, processor)
    part = micro_batch(examples[:3], load(folders["dense"]).config, torch.device("cpu"))
    assert part.arguments["pixel_values"].shape == (3, 1, 8, 8)
    assert part.arguments["pixel_values"].min() == -1 and part.targets.shape == (3,)
