"""Interventions on attacked images, beside the same on clean ones."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from stages.evaluate.base import Response
from stages.evaluate.image_attacks import ImageAttacks
from stages.evaluate.image_probes import ImageInterventions
from stages.models.routes import another_k
from stages.models.vision import from_scratch
from stages.models.vision_spec import VisionSpec

SPEC = VisionSpec(size="tiny", hidden=16, neurons=16, depth=2, heads=2, patch=4, image_size=8,
                  channels=1, labels=3, experts=4, top_k=2, shared_start=False)


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    ids = [str(n) for n in range(6)]
    images = [encoded(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in ids]
    return {"shop": pd.DataFrame(
        {"id": ids, "document": ids, "image": images, "label": ["0", "1", "2"] * 2})}


def scores_of(model, processor, data, **fields):
    evaluation = ImageInterventions(
        dataset="shop", substitutions=("drop_output",), top_k=(1,), **fields)
    rows = [json.loads(request.row) for request in evaluation.requests(data)]
    found = evaluation.procedure(model, processor, rows)
    responses = {row["id"]: Response(row["id"], result=json.dumps(result))
                 for row, result in zip(rows, found, strict=True)}
    return evaluation.score(data, responses)


def test_everything_is_asked_about_the_attacked_images(data):
    model, processor = from_scratch(SPEC)
    model.requires_grad_(False)
    clean = scores_of(model, processor, data)
    attacked = scores_of(model, processor, data, budget=0.1, steps=5)
    pixels = processor.normalised(processor.decode(data["shop"]["image"]))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    cross = torch.nn.functional.cross_entropy
    plain = cross(model(pixel_values=pixels).logits, labels, reduction="none")
    assert clean["loss"].tolist() == pytest.approx(plain.tolist(), rel=1e-4)
    with another_k(model, 1):
        one = cross(model(pixel_values=pixels).logits, labels, reduction="none")
    assert clean["loss/top_1"].tolist() == pytest.approx((one - plain).tolist(), abs=1e-5)
    assert (attacked["loss"] > clean["loss"] + 1e-3).all()
    assert not np.allclose(attacked["loss/top_1"], clean["loss/top_1"], atol=1e-5)
    # Of two experts one is left: half of the experts' two matrices of 16 × 16 in one of two layers.
    own = 2 * (16 * 16 + 2 * (4 * 16 * 16) + 2 * 16 * 16 + 4 * 16 + 2 * 2 * 16 * 16)
    expected = 1 - 2 * 2 * 16 * 16 / own
    assert clean["operations/top_1"].tolist() == pytest.approx([expected] * 6)


def test_a_token_that_no_expert_took_has_changed_by_the_published_rule_alone(data):
    """One of four experts each and room for half of an image's tokens."""
    model, processor = from_scratch(SPEC.model_copy(update={
        "top_k": 1, "layers": (1,), "eval_capacity_factor": 0.5, "group_size": 1}))
    model.requires_grad_(False)
    evaluation = ImageAttacks(dataset="shop", budgets=(0.05,), checked=0, attacks={
        "paper": {"kind": "paper", "steps": 2}, "pgd": {"kind": "pgd", "steps": 2, "restarts": 1}})
    rows = [json.loads(request.row) for request in evaluation.requests(data)]
    found = evaluation.procedure(model, processor, rows)
    scores = evaluation.score(data, {
        row["id"]: Response(row["id"], result=json.dumps(result))
        for row, result in zip(rows, found, strict=True)})
    for attack in ("paper", "pgd"):
        change, kept, none = (scores[f"{name}/{attack}/12.75"] for name in (
            "routing_change", "experts_kept", "experts_none"))
        assert none.gt(0.2).all()
        expected = (1 - none) * (1 - kept) + none if attack == "paper" else 1 - kept
        assert change.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
