"""A run whose first step is not finite goes on, and measures its knobs in the first that is."""

import functools
import math

import pytest

from tests.stages.finetune.results import curve, evidence, spec
from tests.stages.finetune.runs import Run, launch

KNOBS = {
    "steps": 2,
    "max_nonfinite_steps": 3,
    "router": {"noise": 0.3},
    "auxiliary_loss_weight": 0.05,
    "adversarial": {"kind": "freelb", "max_norm": 0.03},
    "workers": 1,
}


def _poison(steps: tuple[int, ...]) -> None:
    """Makes the loss of these steps, counted from 0, NaN."""
    from stages.finetune import training

    loss, step, now = training.negative_log_likelihood, training.Training.step, []

    def noted(self, number):
        now[:] = [number]
        return step(self, number)

    def poisoned(*given):
        return loss(*given) * (math.nan if now[0] in steps else 1)

    training.Training.step, training.negative_log_likelihood = noted, poisoned


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    folder, planned = tmp_path_factory.mktemp("nonfinite"), []
    for name, steps in (("first", (0,)), ("all", (0, 1))):
        (folder / name).mkdir()
        inputs = {"model": models["mixtral"], **data}
        prepare = functools.partial(_poison, steps)
        planned.append(Run(spec(**KNOBS), inputs, folder / name, prepare=prepare))
    launch(1, planned, folder / "store")
    return folder


def test_evidence_is_that_of_the_first_step_that_was_applied(runs):
    assert curve(runs / "first")["skipped"].tolist() == [1, 0]
    found = evidence(runs / "first")["knobs"]  # whose file takes no NaN
    assert found["max_nonfinite_steps"]["measured"] == {"nonfinite_steps": 1}
    shares = found["adversarial"]["measured"]
    assert 0 < shares["loss_share_in_ascent_1"] < shares["loss_share_in_ascent_2"] * 2
    noise = found["router.noise"]["measured"]["mean_square_of_the_noise"]
    assert noise == pytest.approx(0.09, rel=0.1)


def test_a_run_none_of_whose_steps_was_applied_fails_and_says_so(runs):
    message = (runs / "all" / "failed_0.txt").read_text()
    assert message.startswith("none of the 2 steps was applied") and "\n" not in message
