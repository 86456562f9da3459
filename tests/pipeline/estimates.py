"""Sweeps of the project, planned and estimated."""

from pathlib import Path

from pipeline.checks import check, check_plan
from pipeline.estimate import Estimator
from pipeline.plan import build
from pipeline.store import Store
from pipeline.sweep_file import load

SWEEPS = Path(__file__).parents[2] / "sweeps"
IMAGENET = SWEEPS / "adversarial_moe" / "imagenet.yaml"


def planned(file, *overrides):
    sweep = load(file, list(overrides))
    plan = build(sweep, check(sweep, file))
    check_plan(plan, file)
    return plan


def estimator(file, tmp_path, *overrides):
    return Estimator(planned(file, *overrides), Store(str(tmp_path)), file.parent)
