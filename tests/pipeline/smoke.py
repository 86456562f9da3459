"""The smoke sweep as tests use it: its plan, and commands on it."""

import subprocess
import sys
from pathlib import Path

from pipeline.checks import check
from pipeline.plan import Plan, build
from pipeline.sweep_file import load

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "sweeps" / "smoke.yaml"
SECRET = "not-to-be-seen-3f81"


def planned(*overrides: str) -> Plan:
    """The plan of the smoke sweep with some fields set."""
    sweep = load(SMOKE, list(overrides))
    return build(sweep, check(sweep, SMOKE))


def command(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    """``python -m pipeline`` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, text=True,
                          capture_output=True, check=False, timeout=timeout)
