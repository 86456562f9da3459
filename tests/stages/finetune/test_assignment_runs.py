"""Families that choose inside their blocks train with other choices, and with their experts spread
out as with one copy of them."""

import pytest

from stages.models.tiny import tiny_model, tiny_tokenizer
from tests.stages.finetune.results import assert_same_training, curve, measured, spec
from tests.stages.finetune.runs import Run, launch
from tests.stages.models.tiny_folders import save

WAYS = {"moduleformer": "random", "switch_transformers": "balanced"}


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder, planned = tmp_path_factory.mktemp("assigned"), []
    for name, way in WAYS.items():
        model = save(tiny_model(name, tiny_tokenizer(), seed=3), tmp_path_factory.mktemp(name))
        for variant, fields in (
            ("plain", {}),
            ("ep1", {"router": {"assignment": way}}),
            ("ep2", {"router": {"assignment": way}, "expert_parallel": 2}),
        ):
            (folder / f"{name}-{variant}").mkdir()
            recipe = spec(steps=2, auxiliary_loss_weight=0.05, micro_batch=4, **fields)
            inputs = {"model": model, **data}
            planned.append(Run(recipe, inputs, folder / f"{name}-{variant}"))
    launch(2, planned, folder / "store")
    return folder


@pytest.mark.parametrize("name", WAYS)
def test_assigned_experts_are_trained(runs, name):
    assert_same_training(runs, name)
    plain, assigned = curve(runs / f"{name}-plain"), curve(runs / f"{name}-ep1")
    assert abs(plain["loss"][0] - assigned["loss"][0]) > 1e-4
    seen = measured(runs / f"{name}-ep2", "router.assignment")
    assert seen["share_of_choices_changed"] > 0.05
    if WAYS[name] == "balanced":
        # An expert has one token more than another at most, in each of the micro-batches.
        assert assigned["expert_load_variation"].max() < 0.1 < plain["expert_load_variation"].min()
        assert assigned["dropped_choices"].max() == 0
