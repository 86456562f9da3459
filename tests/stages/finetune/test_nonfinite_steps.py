"""A run whose first step is not finite goes on, and measures its knobs in the first that is."""

import functools
import json
import math
from pathlib import Path

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


def _tell(folder: Path) -> None:
    """Keeps what the loop reports."""
    from tests.stages.finetune import runs

    def report(self, metrics, checkpoint):
        with (folder / "told.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    runs.Recorder.report = report


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    folder, planned = tmp_path_factory.mktemp("nonfinite"), []
    for name, steps in (("first", (0,)), ("all", (0, 1))):
        (folder / name).mkdir()
        inputs = {"model": models["mixtral"], **data}
        prepare = functools.partial(_poison, steps)
        planned.append(Run(spec(**KNOBS), inputs, folder / name, prepare=prepare))
    # As "all", whose prepare stays, but its second bad step is one too many.
    (folder / "told").mkdir()
    planned.append(Run(spec(**KNOBS | {"max_nonfinite_steps": 2}), inputs, folder / "told",
                       prepare=functools.partial(_tell, folder / "told")))
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


def test_a_step_that_fails_is_told_with_the_tokens_up_to_it(runs):
    first, second = map(json.loads, (runs / "told" / "told.jsonl").read_text().splitlines())
    tokens = curve(runs / "first")["tokens"].tolist()  # of the same batches
    assert (first["step"], first["total_tokens"]) == (1, tokens[0])
    assert (second["step"], second["total_steps"], second["total_tokens"]) == (2, 2, sum(tokens))
    assert math.isnan(second["loss"])
    assert "step 2" in (runs / "told" / "failed_0.txt").read_text()
