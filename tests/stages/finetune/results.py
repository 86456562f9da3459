"""A small recipe for two workers, and what its runs with and without expert parallelism left."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from stages.finetune.evidence import asked
from stages.finetune.spec import FinetuneSpec, TrainSet

BASE = {
    "data": (TrainSet(dataset="reviews", template="sentiment"),),
    "steps": 3,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "workers": 2,
    "micro_batch": 2,
    "seed": 5,
}


def spec(**fields):
    return FinetuneSpec.model_validate(BASE | fields)


def curve(folder):
    return pd.read_parquet(folder / "training_curve.parquet")


def evidence(folder):
    return json.loads((folder / "recipe_evidence.json").read_text())


def measured(folder, knob):
    return evidence(folder)["knobs"][knob]["measured"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def moved(folder, source):
    """Roles of the parameters that differ from the source's."""
    before, found = weights(source), set()
    for name, value in weights(folder).items():
        if not torch.equal(value, before[name]):
            parts = (("shared_expert", "shared_expert"), ("gate.weight", "router"),
                     ("experts", "expert"), ("embed", "embedding"))  # fmt: skip
            found.add(next((role for part, role in parts if part in name), "backbone"))
    return found


def assert_same_training(runs, name):
    """The runs NAME-ep1 and NAME-ep2 computed the same."""
    one, two = curve(runs / f"{name}-ep1"), curve(runs / f"{name}-ep2")
    for column in ("loss", "gradient_norm", "router_entropy", "expert_load_variation"):
        assert two[column].to_numpy() == pytest.approx(one[column].to_numpy(), rel=2e-5), column
    ours, theirs = weights(runs / f"{name}-ep2"), weights(runs / f"{name}-ep1")
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=2e-4)


def assert_same_evidence(runs, name, knobs):
    """The runs NAME-ep1 and NAME-ep2 have the same evidence of all that the recipe's fields ask."""
    one, two = (evidence(runs / f"{name}-ep{size}")["knobs"] for size in (1, 2))
    assert list(one) == list(two) == list(asked(spec(**knobs)))
    for knob, found in one.items():
        assert found["asked"] == two[knob]["asked"] and found["measured"], knob
        flat, spread = (pd.json_normalize(f["measured"]).iloc[0] for f in (found, two[knob]))
        assert list(flat.index) == list(spread.index), knob
        for what, value in flat.items():
            same = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert spread[what] == same, f"{knob}: {what}"
