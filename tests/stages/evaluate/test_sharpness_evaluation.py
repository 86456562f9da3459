"""Sharpness as an evaluation: one request, one row per image, means that are the batch's own."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from pipeline.evaluation_checks import EvaluationChecks
from pipeline.sweep import Sweep
from stages.evaluate import sharpness as module
from stages.evaluate.engine import Engine
from stages.evaluate.shards import plan_shards
from stages.evaluate.sharpness import Sharpness
from stages.evaluate.stage import _absent
from stages.models.images import Classifier
from stages.models.stage import run
from stages.models.vision_spec import VisionSpec
from stages.probe.sharpness import Hessian, sharpness, twice_differentiable
from stages.statistics import summarise

MODEL = VisionSpec(
    size="tiny", hidden=8, heads=2, neurons=8, depth=1, patch=4, image_size=8, channels=1, labels=3,
    head="sparse_moe", head_experts=2, head_top_k=1, head_neurons=4,
)  # fmt: skip
SPEC = Sharpness(dataset="digits", limit=7, parts=("router", "head"), vectors=3)
EXPERTS = {
    f"{name}/router" for name in ("eigenvalue", "trace", "trace_per_parameter", "trace_error")
}


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


DATA = {
    "digits": pd.DataFrame(
        {"id": [f"i{n}" for n in range(9)], "document": [f"d{n}" for n in range(9)],
         "image": [png(n) for n in range(9)], "label": [str(n % 3) for n in range(9)]}
    )
}  # fmt: skip


def scored(folder):
    (request,) = SPEC.requests(DATA)
    (response,) = Engine(folder).respond([request])
    return SPEC.score(DATA, {request.id: response})


def test_its_means_are_the_numbers_of_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 3)
    run(MODEL, {}, tmp_path)
    assert [len(s.requests) for s in plan_shards(SPEC.requests(DATA), 16)] == [1]
    scores = scored(tmp_path)
    assert list(scores["example_id"]) == [f"digits/i{n}" for n in range(7)]
    engine = Engine(tmp_path)
    classifier = Classifier(engine.model, engine.tokenizer)
    pixels = engine.tokenizer.decode(list(DATA["digits"]["image"][:7]))
    labels = torch.tensor([n % 3 for n in range(7)])
    router = engine.model.classifier.gate.weight
    with twice_differentiable(engine.model):
        def losses():
            return cross_entropy(classifier(pixels), labels, reduction="none")

        for of, chosen in (("", list(engine.model.parameters())), ("/router", [router])):
            expected = sharpness(Hessian([losses], chosen), vectors=3, tolerance=1e-3, seed=0)
            summary = summarise(scores, SPEC.metrics())
            assert summary[f"eigenvalue{of}"]["value"] == pytest.approx(
                expected.eigenvalue, rel=5e-3
            )
            assert summary[f"trace{of}"]["value"] == pytest.approx(expected.trace, rel=1e-3)
            assert summary[f"trace_error{of}"]["value"] == pytest.approx(
                expected.trace_error, rel=1e-2
            )
            assert summary[f"trace_per_parameter{of}"]["value"] == pytest.approx(
                expected.trace / expected.parameters, rel=1e-3
            )
        with torch.no_grad():
            assert summary["loss"]["value"] == pytest.approx(losses().mean().item(), rel=1e-5)
            assert summary["accuracy"]["value"] == pytest.approx(
                (classifier(pixels).argmax(1) == labels).float().mean().item()
            )


def test_a_part_that_a_model_lacks_has_no_number(tmp_path):
    dense = MODEL.model_copy(update={"head": "dense"})
    run(dense, {}, tmp_path)
    scores = scored(tmp_path)
    assert {m.name for m in SPEC.metrics() if m.of_experts and _absent(m, scores)} == EXPERTS
    assert scores["eigenvalue/router"].isna().all() and scores["trace/router/0"].isna().all()
    summary = summarise(scores, SPEC.metrics())
    assert summary["eigenvalue/head"]["value"] <= summary["eigenvalue"]["value"] * 1.01
    assert {m.name for m in SPEC.metrics() if m.of_experts} == EXPERTS


def test_it_may_look_at_what_a_recipe_trains_on(tmp_path):
    def problems(kind):
        sweep = Sweep.model_validate(
            {
                "name": "s",
                "datasets": {"digits": {"task": "images", "source": "builtin:digits",
                                        "splits": {"train": 0.5, "test": 0.5}}},
                "models": {name: {"vision": MODEL.model_dump()} for name in "ab"},
                "pairs": [{"moe": "a", "dense": "b"}],
                "recipes": {"r": {"data": [{"dataset": "digits"}], "steps": 1, "batch_size": 1,
                                  "learning_rate": 1e-3}},
                "evaluations": {"e": {"kind": kind, "dataset": "digits", "split": "train"}},
            }
        )  # fmt: skip
        return [p for p in EvaluationChecks(sweep, tmp_path).evaluations() if "trains" in p]

    assert problems("sharpness") == []
    assert len(problems("image_classification")) == 1
