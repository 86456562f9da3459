"""The passes that procedures are estimated to take, against those that a model makes."""

import json

import pandas as pd
import pytest
import torch

from stages.attack.image_spec import APGD, PGD, Noise, PaperPGD, Square, Transfer
from stages.attack.questions import Victim
from stages.data import stage as data_stage
from stages.data.spec import DataSpec
from stages.evaluate import passes
from stages.evaluate.engine import Engine
from stages.evaluate.held_prompts import SafetyExperts, TargetAttack
from stages.evaluate.image_attacks import ImageAttacks
from stages.evaluate.image_probes import ImageGeometry, ImageInterventions, ImageLipschitz
from stages.evaluate.probes import ExpertInterventions, LocalLipschitz, RouterGeometry
from stages.evaluate.sharpness import Sharpness
from stages.evaluate.specialisation import ExpertSpecialisation, ImageSpecialisation
from stages.evaluate.text_attacks import TextAttacks
from stages.models import stage as model_stage
from stages.models.images import Classifier
from stages.models.tiny import tiny_model, tiny_tokenizer
from tests.stages.evaluate.shown_images import DENSE, SPARSE

SHOP = {"dataset": "shop", "template": "sentiment"}
DIGITS = {"dataset": "digits"}
ROUTINGS = ("as_is", "soft", "frozen", "targeted", "joint")
LAYERS = {"sparse": 2, "dense": 0, "mixtral": 4, "llama": 0}
IMAGES = 4


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    made = {}
    for name, spec in {"sparse": SPARSE, "dense": DENSE}.items():
        folder = tmp_path_factory.mktemp(name)
        model_stage.run(spec, {}, folder)
        made[name] = Engine(folder)
    for name in ("mixtral", "llama"):
        folder, tokenizer = tmp_path_factory.mktemp(name), tiny_tokenizer()
        tiny_model(name, tokenizer, seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = Engine(folder)
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    spec = DataSpec(task="images", source="builtin:digits", splits={"train": 0.6, "test": 0.4},
                    rows={"train": IMAGES, "test": IMAGES})
    data_stage.run(spec, {}, folder)
    images = {s: pd.read_parquet(folder / f"{s}.parquet") for s in ("train", "test")}
    texts = pd.DataFrame({"id": ["0", "1"], "document": ["0", "1"],
                          "text": ["Great little thing", "Awful dull thing"],
                          "label": ["positive", "negative"]})
    return {"digits": images["test"], "digits#train": images["train"],
            "shop": texts, "shop#train": texts}


@pytest.fixture
def made(monkeypatch):
    """Passes made: inputs that went forward, and two for each gradient."""
    count = [0]

    def counting(function, weight, inputs):
        def wrapped(*arguments, **options):
            count[0] += weight * len(arguments[inputs])
            return function(*arguments, **options)

        return wrapped

    monkeypatch.setattr(Victim, "logprobs", counting(Victim.logprobs, 1, 1))
    monkeypatch.setattr(Classifier, "__call__", counting(Classifier.__call__, 1, 1))
    monkeypatch.setattr(torch.autograd, "grad", counting(torch.autograd.grad, 2, 1))
    # What one block computes is no pass.
    monkeypatch.setattr("stages.probe.block_slopes.steepest_tokens",
                        lambda function, clean, *_, **__: clean[..., 0])
    return count


def run(engine, evaluation, data):
    rows = [json.loads(request.row) for request in evaluation.requests(data)]
    list(evaluation.procedure(engine.model, engine.tokenizer, rows))
    return rows


ATTACKS = {
    "pgd": PGD(steps=3, restarts=2),
    "from_it": PGD(steps=3, random_start=False, restarts=1),
    **{f"apgd_{r}": APGD(steps=3, routing=r) for r in ROUTINGS},
    **{f"pgd_{r}": PGD(steps=2, routing=r) for r in ROUTINGS},
    "targets": APGD(steps=2, loss="dlr", targets=2),
    "noise": Noise(queries=5),
    "paper": PaperPGD(steps=3),
}
OF_IMAGES = {
    "attacks": ImageAttacks(**DIGITS, budgets=(0.1, 0.2), attacks=ATTACKS, checked=0),
    "interventions": ImageInterventions(
        **DIGITS, shares=(0.5, 1.0), top_k=(1, 3), prune=(1,), calibration_rows=4, random_masks=3),
    "attacked": ImageInterventions(**DIGITS, budget=0.1, steps=4),
    "geometry": ImageGeometry(**DIGITS, steps=3),
    "lipschitz": ImageLipschitz(**DIGITS, steps=3, restarts=2, samples=5, radii=(0.1, 1)),
    "specialisation": ImageSpecialisation(**DIGITS),
}


def asked_of(evaluations, moe, dense):
    """Every evaluation and the model with experts, and those that are not about experts alone."""
    return [(name, moe) for name in evaluations] + [("attacks", dense), ("lipschitz", dense)]


@pytest.mark.parametrize(("name", "model"), asked_of(OF_IMAGES, "sparse", "dense"))
def test_passes_of_images_are_those_made(engines, data, made, monkeypatch, name, model):
    evaluation = OF_IMAGES[name]
    # How often it iterates is assumed; twice is enough to see what an iteration takes.
    monkeypatch.setattr("stages.probe.slopes.MOST_ITERATIONS", 2)
    monkeypatch.setattr("stages.probe.slopes.TOLERANCE", -1.0)
    monkeypatch.setattr(passes, "POWER_ITERATIONS", 2)
    run(engines[model], evaluation, data)
    # The pixels of one image are those that usage is counted on: four more.
    expected = IMAGES * passes.of_image(evaluation, LAYERS[model]) + passes.calibration(evaluation)
    # A norm's gradients with respect to its own two rows are as many as images.
    assert made[0] == expected


def test_passes_of_attacks_on_images_by_hand():
    plain = ImageAttacks(**DIGITS, budgets=(0.1,), checked=8, attacks={
        "pgd": PGD(steps=10, restarts=2), "square": Square(queries=50)})
    # Clean, with its mirror image and in bfloat16: 4. Two starts of 10 gradients and a last look,
    # the clean gradient: 65; 50 queries; 100 points of noise, their control; all seen again; a
    # random perturbation and the worst seen: 3.
    assert passes.of_image(plain, 0) == 4 + 65 + 50 + 100 + 3 + 3
    # Both pairs of routes as they are, weighed anew and in each of 6 layers.
    assert passes.of_image(plain, 6) == 225 + 2 * 8
    # Twice the steps, as many starts again, twice the queries, both without a bound.
    assert passes.of_image(plain, 0, checked=True) == 225 + 125 + 65 + 100 + 65 + 50
    transfer = ImageAttacks(**DIGITS, budgets=(0.1, 0.2), attacks={"transfer": Transfer(steps=4)})
    assert passes.of_image(transfer, 0, checked=True) == 4 + 2 * (4 * 3 + 3 + 1 + 1 + 101 + 3)


def test_passes_of_sharpness_by_hand():
    """A product with the Hessian is two gradients, each image's part three."""
    evaluation = Sharpness(**DIGITS, vectors=4, parts=("head",))
    assert passes.of_image(evaluation, 0) == 1 + 2 * (1 + 40 * 6 + 5 * 9)


OF_TEXTS = {
    "attacks": TextAttacks(**SHOP, swap_layers=True, checked=0, attacks=[
        {"kind": "embedding_pgd", "name": r, "steps": 2, "routing": r} for r in ROUTINGS]),
    "interventions": ExpertInterventions(
        **SHOP, shares=(0.5, 1.0), top_k=(1, 3), random_masks=2),
    "attacked": ExpertInterventions(
        **SHOP, epsilon=0.1, steps=3, prune=(1,), calibration_rows=2),
    "geometry": RouterGeometry(**SHOP, steps=3),
    "lipschitz": LocalLipschitz(**SHOP, steps=3, restarts=2, samples=5, radii=(0.2,)),
    "specialisation": ExpertSpecialisation(**SHOP),
}


@pytest.mark.parametrize(("name", "model"), asked_of(OF_TEXTS, "mixtral", "llama"))
def test_passes_of_texts_are_those_made(engines, data, made, name, model):
    evaluation = OF_TEXTS[name]
    rows = run(engines[model], evaluation, data)
    expected = passes.calibration(evaluation) + sum(
        passes.of_text(evaluation, len(row["text"]), LAYERS[model], row.get("checked", False))
        for row in rows)
    assert made[0] == expected


@pytest.mark.parametrize("routing", ["as_is", "frozen", "targeted"])
def test_a_search_takes_at_most_so_many_passes(engines, data, made, routing):
    """It stops where it succeeds, and drops candidates that are no texts; so do the checks."""
    evaluation = TextAttacks(**SHOP, checked=1, attacks=[
        {"kind": "gcg", "steps": 3, "candidates": 8, "routing": routing},
        {"kind": "embedding_pgd", "steps": 3, "routing": routing}])
    rows = run(engines["mixtral"], evaluation, data)
    most = sum(passes.of_text(evaluation, len(r["text"]), 4, r["checked"]) for r in rows)
    assert 0.2 * most < made[0] <= most


def test_passes_of_edits_by_hand():
    """60 characters are 10 words of 5 letters; dense, so nothing is exchanged."""
    def asked(**attack):
        return passes.of_text(TextAttacks(**SHOP, attacks=[attack], checked=1), 60, 0)

    assert asked(kind="deep_word_bug", edits=2, operations=["swap", "delete"]) == 4 + 11 + 20 + 2
    assert asked(kind="word_neighbours", edits=3, neighbours=8) == 4 + 11 + 24 + 2
    assert asked(kind="homoglyphs", edits=2) == 4 + 11 + 10 + 2
    gcg = TextAttacks(**SHOP, checked=1, attacks=[
        {"kind": "gcg", "steps": 20, "candidates": 32, "substitutions": 2}])
    one = 1 + 20 * (3 + 32)
    assert passes.of_text(gcg, 60, 0) == 4 + one + 2
    # Twice the steps, other draws, four times the steps without a bound, one and four tokens; its
    # own budget is only looked at again.
    checks = (2 + 40 * 35) + (1 + one) + (2 + 80 * 35) + 2 * (1 + one) + 1
    assert passes.of_text(gcg, 60, 0, checked=True) == 4 + one + 2 + checks


def test_tokens_of_prompts_by_hand():
    attack = TargetAttack(harmful=["bad"], suffix="x x x x", target="Sure, here is", steps=20,
                          candidates=32, max_new_tokens=24)
    row = {"prompt": "a" * 40, "checked": False}
    read, written = passes.of_prompts(attack, row, {}, 4.0)
    # 10 tokens of prompt, 4 of suffix, 3 of target.
    assert read == 5 * 17 + (1 + 20 * 35) * 7 + 10 + 3 * 14 and written == 72
    # As many steps again, searches with other draws and half the budget, with an answer each; and
    # 60 steps of free embeddings.
    more, further = passes.of_prompts(attack, row | {"checked": True}, {}, 4.0)
    assert more - read == 3 * ((1 + 20 * 35) * 7 + 14) + 181 * 7 and further == 144
    experts = SafetyExperts(harmful=["bad"], benign=["fine"], silenced=(2, 4), max_new_tokens=8)
    prompts = [{"example_id": f"{name}/{n}", "prompt": "a" * 40, "measured": n == 1}
               for name in ("bad", "fine") for n in (0, 1)]
    read, written = passes.of_prompts(experts, {"prompts": prompts}, {"bad": 2.0}, 4.0)
    # Of each kind one ranks (read twice), one is measured (plain and three rankings of two sizes);
    # the harmful ones stand for two each.
    assert read == 3 * 10 * (2 + 7) and written == 3 * 8 * (1 + 7)
