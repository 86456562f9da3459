"""Time, memory and disk of whole commands, each beside its budget.

    python benchmarks/budgets.py            # smoke sweep and plans, about 5 minutes
    python benchmarks/budgets.py --quickstart

Memory is the rise of what the machine has in use, sampled every half second, so that Ray's own
processes count; run it on an otherwise quiet machine. Every sweep runs in a new, temporary store.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

SWEEPS = Path(__file__).resolve().parent.parent / "sweeps"


class Memory(threading.Thread):
    """Watches the machine's memory in use until stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.peak = self._used()
        self.stopped = threading.Event()

    @staticmethod
    def _used() -> int:
        memory = psutil.virtual_memory()
        return memory.total - memory.available

    def run(self) -> None:
        while not self.stopped.wait(0.5):
            self.peak = max(self.peak, self._used())

    def stop(self) -> float:
        """GiB by which memory in use rose at most."""
        self.stopped.set()
        return (self.peak - self.before) / 2**30


def measure(*arguments: str, log: Path) -> tuple[float, float, int]:
    """Seconds, GiB and exit code of one ``python -m pipeline`` command."""
    memory = Memory()
    memory.start()
    start = time.monotonic()
    with log.open("a") as file:
        done = subprocess.run([sys.executable, "-m", "pipeline", *arguments], stdout=file,
                              stderr=subprocess.STDOUT, cwd=SWEEPS.parent, check=False)
    return time.monotonic() - start, memory.stop(), done.returncode


def line(what: str, seconds: float, budget: float, rest: str = "") -> None:
    mark = "✓" if seconds <= budget else "✗"
    print(f"{mark} {what:<34} {seconds:7.1f} s  (at most {budget:g} s){rest}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", action="store_true", help="the quickstart instead")
    options = parser.parse_args()
    name, budget = ("quickstart", 720) if options.quickstart else ("smoke", 240)
    with tempfile.TemporaryDirectory() as folder:
        store, log = Path(folder) / "store", Path(folder) / "log"
        sweep = ("run", str(SWEEPS / f"{name}.yaml"), "--store", str(store))
        seconds, gib, code = measure(*sweep, log=log)
        if code:
            sys.exit(f"the {name} sweep failed:\n{log.read_text()}")
        disk = sum(f.stat().st_size for f in store.rglob("*") if f.is_file()) / 1e9
        line(f"run {name}", seconds, budget, f", {gib:.1f} GiB, {disk:.1f} GB of disk")
        seconds, _, _ = measure(*sweep, log=log)
        line(f"run {name} again", seconds, 10)
        seeds = f"seeds={list(range(1000))}"
        seconds, _, _ = measure("plan", str(SWEEPS / "smoke.yaml"), "--store", str(store),
                                "--set", seeds, log=log)
        line("plan of 10,000 nodes", seconds, 5)
        seconds, _, code = measure("run", str(SWEEPS / "smoke.yaml"), "--store", str(store),
                                   "--set", "recipes.sft.learning_rate=fast", log=log)
        line("refusal of a wrong sweep", seconds, 3, f", exit code {code}")


if __name__ == "__main__":
    main()
