"""The score columns that the comparison looks for are those that attacks and probes write."""

import pandas as pd
import pytest

from stages.compare.claims import Claims
from stages.compare.hypotheses import TITLES
from stages.compare.measured import Measured
from stages.compare.quantities import PARTS, quantities
from stages.compare.robustness_figures import robustness_figures
from stages.compare.spec import CompareSpec, Pair
from stages.data import stage as data_stage
from stages.data.spec import DataSpec
from stages.evaluate.engine import Engine
from stages.models import stage as model_stage
from stages.models.card import ModelCard
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.vision_spec import VisionSpec
from tests.stages.compare.attacked import card

IMAGES = {
    "attacks": {"kind": "image_attacks", "dataset": "digits", "budgets": [0.02, 0.1], "checked": 0,
                "attacks": {"pgd": {"kind": "pgd", "steps": 2}, "noise": {"kind": "noise"}}},
    "slopes": {"kind": "image_lipschitz", "dataset": "digits", "steps": 2, "samples": 2},
    "interventions": {"kind": "image_interventions", "dataset": "digits"},
    "geometry": {"kind": "image_geometry", "dataset": "digits", "steps": 2},
}  # fmt: skip
SHOP = {"dataset": "shop", "template": "sentiment"}
TEXTS = {
    "attacks": {"kind": "text_attacks", **SHOP, "checked": 1,
                "attacks": [{"kind": "embedding_pgd", "steps": 2}]},
    "slopes": {"kind": "local_lipschitz", **SHOP, "steps": 2, "samples": 2},
    "interventions": {"kind": "expert_interventions", **SHOP},
    "geometry": {"kind": "router_geometry", **SHOP, "steps": 2},
}  # fmt: skip
HEADLINE = {
    "attacks": ["clean", "robust", "prediction_change", "routing_change/attack",
                "routing_change/random", "routing_change/noise", "routing_change/chance",
                "swap/attacked_clean", "swap/clean_attacked"],
    "interventions": ["own", "substitution/next_ranked", "substitution/random",
                      "substitution/drop_first", "substitution/drop_output",
                      "substitution/permuted"],
    "geometry": ["disagreement", "disagreement_next", "disagreement_random"],
    "lipschitz": ["lipschitz", "lipschitz_frozen"],
}  # fmt: skip
FIGURES = {"routing", "substitution", "loss"}


def vision(folder):
    """Digits and two untrained classifiers of them."""
    (folder / "digits").mkdir()
    data_stage.run(
        DataSpec(task="images", source="builtin:digits", splits={"test": 1.0}, rows={"test": 4}),
        {}, folder / "digits",
    )  # fmt: skip
    dense = VisionSpec(size="tiny", hidden=16, neurons=16, depth=2, heads=2, patch=4, image_size=8,
                       channels=1, labels=10)  # fmt: skip
    sparse = {"experts": 4, "top_k": 1, "layers": (0, 1), "shared_start": False}
    for name, spec in {"moe": dense.model_copy(update=sparse), "dense": dense}.items():
        (folder / name).mkdir()
        model_stage.run(spec, {}, folder / name)
    return {"digits": pd.read_parquet(folder / "digits" / "test.parquet")}


def language(folder):
    """Four texts and two random language models."""
    for name, family in {"moe": "mixtral", "dense": "llama"}.items():
        tokenizer = tiny_tokenizer()
        tiny_model(family, tokenizer, seed=0).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        card("vmoe-4" if name == "moe" else "vit").write(folder / name)
    ids = list("abcd")
    texts = ["Great little thing", "Awful dull thing", "A nice warm day", "Not my day"]
    rows = {"id": ids, "document": ids, "text": texts, "label": ["positive", "negative"] * 2}
    return {"shop": pd.DataFrame(rows)}


@pytest.mark.parametrize(("made", "evaluations"), [(vision, IMAGES), (language, TEXTS)])
def test_every_row_claim_and_figure_finds_its_columns(tmp_path, made, evaluations):
    data = made(tmp_path)
    spec = CompareSpec(
        title="", pairs=[Pair(name="moe vs dense", moe="moe", dense="dense")], recipes=("none",),
        seeds=(0,), evaluations=evaluations, resamples=100, hypotheses=True,
    )  # fmt: skip
    inputs = {}
    for model in ("moe", "dense"):
        engine = Engine(tmp_path / model)
        for name, evaluation in spec.evaluations.items():
            if model == "dense" and evaluation.of_experts:
                continue
            responses = engine.respond(evaluation.requests(data))
            scores = evaluation.score(data, {r.id: r for r in responses})
            inputs[f"scores/{model}/none/0/{name}"] = folder = tmp_path / "scores" / model / name
            folder.mkdir(parents=True)
            scores.to_parquet(folder / "scores.parquet")
    measured = Measured(spec, inputs, {})
    for part in PARTS:
        rows = quantities(part, measured.evaluation(part), measured.columns(part))
        names = [row.name for row in rows]
        assert [name for name in HEADLINE[part] if name not in names] == []
        for row in rows:
            assert measured.level(part, row.columns, "moe", "none") is not None
    cards = {name: ModelCard.read(tmp_path / name) for name in ("moe", "dense")}
    equal = {"moe": cards["moe"], "dense": cards["dense"].model_copy(
        update={"flops_per_token": cards["moe"].flops_per_token})}  # fmt: skip
    for hypothesis in set(TITLES) - {"H2"}:
        claims, _, _ = Claims(measured, equal, "none").of(hypothesis)
        assert all(claim.found.documents == 4 for claim in claims)
    drawn = {figure.file.stem.removesuffix("_none") for figure in robustness_figures(
        measured, ["none"], tmp_path)}  # fmt: skip
    assert drawn - FIGURES <= {"budget", "attacks", "checked"} and FIGURES <= drawn
