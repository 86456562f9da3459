"""Every verb as the README's table has it, typed in a folder that holds a finished sweep."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from smoke import ROOT
from test_readme import section

TOLD = re.findall(r"^\| `([^`]+)` \|", section("The command line"), re.M)
STANDS_FOR = {
    "SWEEP…": "sweeps/smoke.yaml", "[SWEEP]": "sweeps/smoke.yaml", "SWEEP": "sweeps/smoke.yaml",
    "MODEL": "exported", "A,B": "questions,edits --sweep sweeps/smoke.yaml", "E": "questions",
    "M": "tiny-moe", "FOLDER": "exported",
}  # fmt: skip
SAYS = {
    "plan": "compare/smoke",
    "run": "smoke: 27 nodes, all done",
    "evaluate": "questions",
    "report": "reports/smoke/report.html",
    "status": "████ 16/16",
    "show": " of 8 examples",
    "gc": "could be freed; --yes deletes",  # what `report` made anew
    "data list": "reviews",
    "data fetch": "reviews",
    "export": "exported",
    "models": "mixtral",
    "doctor": "torch",
}
"""What each verb prints, but for those that have a test of their own."""


def verb(command: str) -> str:
    words = command.split()
    return " ".join(words[:2]) if words[0] == "data" else words[0]


def typed(command: str) -> list[str]:
    """The words of a command of the table, with names for what stands for something."""
    filled = " ".join(STANDS_FOR.get(word, word) for word in command.split())
    return [sys.executable, "-m", "pipeline", *shlex.split(filled)]


@pytest.fixture(scope="module")
def folder(job, tmp_path_factory):
    """A working directory with the sweep and its finished store, where the README's are."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "sweeps").mkdir()
    shutil.copy(ROOT / "sweeps/smoke.yaml", folder / "sweeps")
    shutil.copytree(ROOT / "sweeps/smoke", folder / "sweeps/smoke")
    shutil.copytree(job.folder, folder / "store")
    return folder


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def test_every_verb_of_the_table_is_typed_here():
    assert {verb(command) for command in TOLD} == {*SAYS, "ui", "search"}


SLOW = pytest.mark.families  # in `make test-families`


# A folder is exported before it is evaluated.
@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=SLOW) if verb(c) == "evaluate" else c
     for c in sorted((c for c in TOLD if verb(c) in SAYS), key=lambda c: verb(c) in (
         "evaluate", "gc"))],
)  # fmt: skip
def test_a_verb_does_what_is_told_and_ends_well(folder, cluster, command):
    words = typed(command)
    if verb(command) == "evaluate":
        words += ["--address", cluster.address]
    done = subprocess.run(words, cwd=folder, env=ENVIRONMENT, text=True, capture_output=True,
                          check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAYS[verb(command)] in done.stdout, done.stdout


@SLOW
def test_the_runs_of_the_finished_sweep_are_served_on_loopback(folder):
    (command,) = (c for c in TOLD if verb(c) == "ui")
    process = subprocess.Popen([*typed(command), "--port", "5917"], cwd=folder, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                with urllib.request.urlopen("http://127.0.0.1:5917/health", timeout=5) as answer:
                    assert answer.read() == b"OK"
                break
            except OSError:
                time.sleep(0.5)
    finally:
        process.terminate()
        process.wait()
    assert (Path(folder) / "store/mlflow.db").exists()
