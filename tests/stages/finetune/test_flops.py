"""The utilisation of a device counts the operations of the model as the recipe trains it."""

import pytest

from stages.models.card import ModelCard
from tests.stages.finetune.results import curve, spec
from tests.stages.finetune.runs import Run, launch

V, D = 259, 64
"""Vocabulary and hidden size of the tiny models."""
LABEL = len(" positive")
"""Tokens of a label of the reviews, one a byte."""


def _count() -> None:
    """Makes the utilisation that of a device of one operation per second."""
    from stages.finetune import training

    training.model_flops_utilisation = lambda flops, precision, workers: flops


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    folder, planned = tmp_path_factory.mktemp("flops"), []
    reviews = ({"dataset": "reviews", "template": "sentiment"},)
    for name, model, knobs in (
        ("top_1", "mixtral", {"router": {"top_k": 1}}),
        ("head", "mixtral", {"head": "classification"}),
        ("freelb", "mixtral", {"adversarial": {"kind": "freelb", "steps": 2}}),
        ("t5", "t5", {}),
    ):
        (folder / name).mkdir()
        recipe = spec(steps=1, workers=1, data=reviews, **knobs)
        planned.append(Run(recipe, {"model": models[model], **data}, folder / name, prepare=_count))
    launch(1, planned, folder / "store")
    return folder


def counted(folder):
    """Operations and tokens of the only step."""
    row = curve(folder).iloc[0]
    return row["model_flops_utilisation"] * row["seconds"], row["tokens"]


def test_experts_per_token_and_head_are_the_recipes(runs):
    flops, tokens = counted(runs / "top_1")
    assert flops == pytest.approx(330_112 * tokens)  # with its own two experts 526,720
    flops, tokens = counted(runs / "head")
    assert flops == pytest.approx((526_720 - 2 * V * D + 2 * 2 * D) * tokens)
    flops, tokens = counted(runs / "freelb")
    assert flops == pytest.approx(2 * 526_720 * tokens)  # an ascent is a pass


def test_an_encoder_decoders_tokens_pass_one_stack_each(runs, models):
    flops, tokens = counted(runs / "t5")
    card = ModelCard.read(models["t5"])
    written = spec().batch_size * LABEL
    rest = card.flops_per_token - card.flops_per_read_token
    assert flops == pytest.approx(
        card.flops_per_read_token * (tokens - written) + rest * written
    )
    assert flops < 0.7 * card.flops_per_token * tokens
