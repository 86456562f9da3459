"""One node as work to be done anywhere: in this process, in a Ray task, on another machine."""

import contextlib
import importlib
import importlib.metadata
import json
import platform
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.plan import Node, Plan
from pipeline.store import PROGRESS, Store
from pipeline.sweep import MachineKind
from stages.errors import BadInput, StageFailed
from stages.evaluate.spec import JUDGE

STAGES = {
    "data": "stages.data.stage",
    "model": "stages.models.stage",
    "judge": "stages.evaluate.judge_stage",
    "compare": "stages.compare.stage",
}
"""Stages that are one call of ``run(spec, inputs, output)``, by the module that holds it."""

PROJECT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "deepspeed", "ray", "datasets", "pyarrow", "numpy", "scipy")


@dataclass(frozen=True)
class Job:
    """A node with all that its work needs to know."""

    node: Node
    inputs: dict[str, str]
    """Role to the folder of the finished upstream node."""
    contents: dict[str, str]
    """Role to what stands for that input in fingerprints (``Node.content``)."""
    store: str
    sweep_folder: str
    """Where a relative ``file:`` source starts from."""
    gaps: dict[str, str]
    """Role to the reason why its input is missing (comparison only)."""
    machines: tuple[MachineKind, ...] = ()
    """What the cluster can grow to."""

    @classmethod
    def of(cls, node: Node, plan: Plan, store: Store, folder: Path,
           gaps: dict[str, str] | None = None) -> "Job":
        """The job of a plan's node; roles with a gap are left out of the inputs."""
        gaps = gaps or {}
        nodes = {r: plan.nodes[k] for r, k in node.inputs.items() if r not in gaps}
        inputs = {role: upstream.folder for role, upstream in nodes.items()}
        contents = {role: upstream.content for role, upstream in nodes.items()}
        startable = plan.sweep.resources.machines
        return cls(node, inputs, contents, store.uri, str(folder), gaps, startable)


@dataclass(frozen=True)
class Outcome:
    """How a node's work ended."""

    status: Literal["done", "failed", "blocked"]
    message: str = ""
    seconds: float = 0.0
    died: bool = False
    """The work did not fail by itself: its process or machine was lost."""
    lacks: dict[str, str] = field(default_factory=dict)
    """Of an evaluation, the roles of judges that failed when they were asked, each with the reason:
    what is done is the one without them (``Plan.leave_out``)."""


@dataclass
class Event:
    """Something to tell the person who watches."""

    kind: str
    """``start``, ``progress``, ``waits`` (another command works at it) or an outcome's status."""
    node: Node
    outcome: Outcome | None = None
    progress: dict = field(default_factory=dict)


def run_stage(job: Job) -> Outcome:
    """Do the work of a data, model or compare node and commit it."""
    store = Store(job.store)

    def work() -> str:
        with store.attempt(job.node.folder) as (attempt, output):
            compute(job, store, output)
            if job.node.stage == "compare":
                store.publish(output, report_folder(job.node.name))
        return attempt

    return committed(job, store, work)


def report_folder(sweep: str) -> str:
    """Where in the store the newest report of a sweep lies."""
    return f"reports/{sweep}"


def compute(job: Job, store: Store, output: Path) -> None:
    """Call the stage on local folders."""
    run = importlib.import_module(STAGES[job.node.stage]).run
    # A report says what came of a judge, and asks it nothing.
    inputs = {role: store.fetch(folder, weights=not role.startswith(JUDGE))
              for role, folder in job.inputs.items()}
    extra = {"gaps": job.gaps} if job.node.stage == "compare" else {}
    with beside_the_sweep(job):
        run(job.node.spec, inputs, output, **extra)


def reads_files(node: Node) -> bool:
    """Whether a node's work reads files that lie where the command was given."""
    source = str(getattr(node.spec, "source", ""))
    evaluation = getattr(node.spec, "evaluation", None)
    return source.startswith("file:") or getattr(evaluation, "include_path", None) is not None


def beside_the_sweep(job: Job) -> contextlib.AbstractContextManager:
    """The sweep file's folder as working directory, where a node reads files.

    The fingerprint knows a file by its digest; only the work needs its place.
    """
    return contextlib.chdir(job.sweep_folder) if reads_files(job.node) else contextlib.nullcontext()


def committed(job: Job, store: Store, work: Callable[[], str]) -> Outcome:
    """Run work that returns its attempt, write the manifest, and turn failures into outcomes."""
    node, started = job.node, time.time()
    try:
        attempt = work()
    except Exception as error:
        return Outcome("failed", explain(error, job, store), time.time() - started)
    finished = time.time()
    if job.gaps:
        # A report with gaps is shown, but the node stays unfinished: the next run fills them.
        store.delete(f"{node.folder}/{attempt}")
        return Outcome("done", f"without {len(job.gaps)} result(s)", finished - started)
    store.commit(node.folder, {
        "node": node.key,
        "fingerprint": node.fingerprint,
        "version": node.spec.VERSION,
        "identity": node.spec.identity(),
        "run_time": json.loads(
            node.spec.model_dump_json(include=node.spec.run_time_fields())
        ),
        "inputs": job.inputs,
        "attempt": attempt,
        "started": started,
        "finished": finished,
        **environment(),
    })
    return Outcome("done", seconds=finished - started)


def explain(error: Exception, job: Job, store: Store) -> str:
    """One line about a failure; the traceback of an unforeseen one goes beside the node."""
    lines = str(error).strip().splitlines() or ["no message"]  # Ray Data adds some of its own
    if isinstance(error, StageFailed | BadInput):
        return lines[0]
    path = f"{job.node.folder}/error.txt"
    store.write_bytes(path, "".join(traceback.format_exception(error)).encode())
    return f"{type(error).__name__}: {lines[0][:300]}; the traceback is in {store.path(path)}"


def environment() -> dict:
    """Versions of what computed a result, for its manifest."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        packages["vllm"] = importlib.metadata.version("vllm")
    head = subprocess.run(["git", "-C", str(PROJECT), "rev-parse", "HEAD"],
                          capture_output=True, text=True, check=False)
    return {
        "packages": packages,
        "python": platform.python_version(),
        "commit": head.stdout.strip() or None,
    }


def report_progress(
    store: Store, node: Node, done: int, total: int, text: str, **more: int
) -> None:
    """Tell whoever watches how far a node's work is, with what ``more`` there is to count."""
    store.write_json(f"{node.folder}/{PROGRESS}",
                     {"done": done, "total": total, "text": text, "time": time.time(), **more})
