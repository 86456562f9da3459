"""What a search costs besides its trials: stub trials on 8 simulated machines.

    python benchmarks/search.py [--trials 1000]

A stub trial gives its objective at once, so all the time is that of Ray Tune, the proposals and the
ledger. Starting the cluster is not counted, starting the drivers is. Fails above 200 ms per trial.
The processor time of all processes together is shown beside it; it depends less on what else the
machine does.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter

import psutil
import ray
from ray.cluster_utils import Cluster

from pipeline.search.ledger import Ledger, Report
from pipeline.search.space import Space
from pipeline.search.spec import Search
from pipeline.search.tuning import run_trials
from pipeline.store import Store
from stages.finetune.spec import Recipe

MACHINES, CPUS = 8, 4
AT_ONCE = 8
BUDGET_SECONDS = 0.2


def stub(values: dict, past: list[Report]):
    """A trial whose objective is a function of its values."""
    score = -abs(values["learning_rate"] - 1e-3)
    yield Report(1, [score], score, values=values)


def run(trials: int, folder: str) -> Counter:
    """Run a search of stub trials in a store on the connected cluster; how many ended how."""
    search = Search.model_validate({
        "base": "sft", "space": {"learning_rate": {"log_uniform": (1e-5, 1e-1)},
                                 "weight_decay": {"uniform": (0.0, 0.1)}},
        "objectives": ({"score": "stub/score"},), "trials": trials})
    base = Recipe(data=({"dataset": "none"},), steps=1, batch_size=1, learning_rate=1e-3)
    store, place = Store(folder), "search/stub@0"
    run_trials(search, Space(base, search.space), trials, Ledger(store, place), stub,
               spent=lambda values, past: (0, 0), maximize=[True], upwards=True,
               storage=store.path(place), concurrent=AT_ONCE, tell=lambda trial: None)
    return Counter(trial.status for trial in Ledger(store, place).trials.values())


def processor_seconds() -> float:
    """Used so far by this process, the machines' daemons and the workers that are alive."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    trials = parser.parse_args().trials
    cluster = Cluster(initialize_head=True,
                      head_node_args={"num_cpus": CPUS, "include_dashboard": True})
    for _ in range(MACHINES - 1):
        cluster.add_node(num_cpus=CPUS)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    folder = tempfile.mkdtemp(prefix="search-benchmark-")
    try:
        used, started = processor_seconds(), time.perf_counter()
        ended = run(trials, folder)
        seconds = (time.perf_counter() - started) / trials
        processor = (processor_seconds() - used) / trials
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder)
    print(f"{trials} stub trials on {MACHINES} simulated machines, {AT_ONCE} at once: "
          f"{seconds * 1000:.0f} ms per trial ({dict(ended)}), of the processors "
          f"{processor * 1000:.0f} ms; budget {BUDGET_SECONDS * 1000:.0f} ms")
    return 0 if seconds <= BUDGET_SECONDS and ended == {"finished": trials} else 1


if __name__ == "__main__":
    sys.exit(main())
