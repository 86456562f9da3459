"""Peak memory of an evaluation pass over 10,000 and over 100,000 requests.

    python benchmarks/request_memory.py [--counts 10000 100000] [--workers 2]

The pass is the pipeline's own (``pipeline.evaluate.run_pass``): it makes the requests, has actors
under Ray Data answer and store them shard after shard, reads the responses back, scores them and
commits the node. The requests are short questions with two choices, the model is a tiny random
Mixtral. Each count has a store, a Ray cluster and processes of its own; the data set and the model
are prepared in another process before.

Told are the largest resident set of the process that drives the pass, that of its largest actor,
and the most bytes in Ray's object store, which holds the places of shards. Exits with 1 where one
of them needs more than 1.1 times as much for the many, and more than 1 MiB more.
"""

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MOST = 1.1
LEAST = 1.0
"""MiB below which a difference is no growth."""
ACTOR = "MapWorker(MapBatches(Responder))"
SWEEP = """
name: memory
datasets: {{quiz: {{task: multiple_choice, source: "file:quiz.jsonl"}}}}
models: {{dense: {{source: "tiny:llama"}}, moe: {{source: "tiny:mixtral"}}}}
pairs: [{{moe: moe, dense: dense}}]
recipes: {{}}
evaluations: {{quiz: {{kind: multiple_choice, dataset: quiz}}}}
resources: {{evaluate: {{workers: {workers}, cpus: 1}}}}
"""
PASS, JOB = "evaluate/moe-none-quiz", "job.pickle"
MIB = 2**20


def prepare(folder: Path, count: int, workers: int) -> None:
    """A store with what the pass reads, and its job as the pipeline hands it to another process."""
    from pipeline.checks import check
    from pipeline.job import Job, run_stage
    from pipeline.plan import build
    from pipeline.store import Store
    from pipeline.sweep_file import load

    with (folder / "quiz.jsonl").open("w") as file:
        for n in range(count):
            row = {"question": f"{n} + 1?", "choices": [f"{n + 1}", f"{n}"], "answer": n % 2}
            file.write(json.dumps(row) + "\n")
    file = folder / "sweep.yaml"
    file.write_text(SWEEP.format(workers=workers))
    sweep = load(file)
    plan, store = build(sweep, check(sweep, file)), Store(str(folder / "store"))
    for key in plan.nodes:
        if key in plan.needs({PASS}) - {PASS}:
            outcome = run_stage(Job.of(plan.nodes[key], plan, store, folder))
            assert outcome.status == "done", outcome.message
    (folder / JOB).write_bytes(pickle.dumps(Job.of(plan.nodes[PASS], plan, store, folder)))


class Watch(threading.Thread):
    """Largest resident set of the pass's actors and most bytes in the object store, sampled."""

    def __init__(self):
        super().__init__(daemon=True)
        self.actors: dict[int, float] = {}
        self.stored = 0.0
        self.stopped = threading.Event()

    def run(self) -> None:
        import psutil
        import ray

        # As Ray Data itself asks for its statistics; there is no public way.
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        while not self.stopped.wait(0.5):
            used = get_memory_info_reply(state).store_stats.object_store_bytes_used
            self.stored = max(self.stored, used / MIB)
            for process in psutil.Process().children(recursive=True):
                try:
                    if ACTOR in process.cmdline()[0]:
                        self.actors[process.pid] = resident(process.pid)
                except (psutil.Error, IndexError, OSError, StopIteration):
                    continue  # it has just ended


def resident(process: int | str) -> float:
    """Largest resident set of a process so far, in MiB.

    Not ``ru_maxrss``, which a new process inherits from the one that started it.
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def drive(folder: Path, count: int, workers: int) -> None:
    """The pass; prints what it took as the last line."""
    import ray.data

    from pipeline.evaluate import run_pass
    from pipeline.execute import connect
    from pipeline.store import Store

    job = pickle.loads((folder / JOB).read_bytes())
    connect("local")
    ray.data.DataContext.get_current().enable_progress_bars = False
    before, watch = resident("self"), Watch()
    watch.start()
    start = time.monotonic()
    outcomes = run_pass([job])
    seconds = time.monotonic() - start
    watch.stopped.set()
    watch.join()
    assert outcomes[PASS].status == "done", outcomes[PASS].message
    node = Store(job.store).fetch(job.node.folder)
    summary = json.loads((node / "summary.json").read_text())
    assert summary["accuracy"]["n"] == count and len(watch.actors) == workers
    print(json.dumps({
        "driver": resident("self"), "actor": max(watch.actors.values()),
        "object store": watch.stored, "seconds": seconds, "before": before}))  # fmt: skip


PARTS = {"prepare": prepare, "drive": drive}


def measured(count: int, workers: int) -> dict[str, float]:
    """What a pass over so many requests takes, each part in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            done = subprocess.run(
                [sys.executable, __file__, "--part", part, "--folder", folder,
                 "--counts", str(count), "--workers", str(workers)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", nargs="+", type=int, default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, default=2, help="actors, of one CPU each")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        PARTS[arguments.part](arguments.folder, arguments.counts[0], arguments.workers)
        return
    found = {}
    for count in arguments.counts:
        found[count] = measured(count, arguments.workers)
        print(f"{count:,} requests: {found[count]['seconds']:.0f} s, "
              f"the driver had {found[count]['before']:.0f} MiB before", flush=True)  # fmt: skip
    grown = False
    for part in ("driver", "actor", "object store"):
        few, many = (found[count][part] for count in (min(found), max(found)))
        print(f"{part}: {few:.2f} MiB with {min(found):,} requests, {many:.2f} MiB with "
              f"{max(found):,}: {many / few:.2f} times")  # fmt: skip
        grown |= many > MOST * few and many - few > LEAST
    raise SystemExit(grown)


if __name__ == "__main__":
    main()
