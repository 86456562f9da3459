"""What is to be hard in the whole sweeps stands beside a set that differs in that alone."""

from pathlib import Path

import pytest

from pipeline.sweep_file import load

FOLDER = Path(__file__).parents[2] / "sweeps" / "moe_rbench"


@pytest.mark.parametrize(
    ("name", "source"),
    [("cpu", "file:cpu/{}_premises.jsonl"), ("paper", "catalogue:freshqa_{}_premises"),
     ("modern", "catalogue:freshqa_{}_premises")])
def test_corrections_of_false_premises_have_true_ones_as_their_control(name, source):
    """A model that negates whatever it is asked would correct them all."""
    sweep = load(FOLDER / f"{name}.yaml")
    evaluation = sweep.evaluations["false_premises"]
    for premises in ("false", "true"):
        (dataset,) = getattr(evaluation, premises)
        assert sweep.datasets[dataset].source == source.format(premises)
    assert {"corrected_rate", "contradicted_rate"} <= {m.name for m in evaluation.metrics()}
