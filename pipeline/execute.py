"""Runs a plan on Ray: every node an ordinary task, submitted when its inputs are there.

Ray schedules, retries and spreads the tasks; what survives is the store. Fine-tune and evaluation
nodes are small driver tasks that hold no CPU themselves: their workers do. Because those drivers
would otherwise start more worker groups than fit, a node is submitted only when the workers of all
running nodes, together with its own, fit into the cluster.
"""

import math
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private.state import state  # the one place that knows how far a cluster scales
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.job import PROJECT, Event, Job, Outcome, reads_files, run_stage
from pipeline.plan import Node, Plan
from pipeline.store import PROGRESS, Store
from stages.errors import BadInput

SECRETS = (
    "HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
)
"""Environment variables that workers on other machines get through the runtime environment."""
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in a submitted job, whose runtime environment the workers inherit by themselves."""


@dataclass
class Unit:
    """Nodes that one task works on: one node, or all evaluations of one checkpoint."""

    nodes: list[Node]

    @property
    def demand(self) -> dict[str, float]:
        """CPUs and GPUs that its workers take together."""
        return self.nodes[0].demand


def connect(address: str | None) -> None:
    """Join the Ray cluster at an address, or start a local one; once in a command."""
    if ray.is_initialized():
        return
    # Ray's own default joins whatever cluster happens to run on this machine.
    address = address or os.environ.get("RAY_ADDRESS", "local")
    options: dict = {}
    if IN_JOB not in os.environ:
        if address == "local":
            # Ray Train frees the resources of a run that died through the dashboard's State API.
            options = {"include_dashboard": True}
        else:
            options = {"runtime_env": {
                "working_dir": str(PROJECT),
                "excludes": [".venv", ".git", "store", "mlflow.db"],
                "env_vars": {name: os.environ[name] for name in SECRETS if name in os.environ},
            }}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except ConnectionError as error:
        raise BadInput(f"--address {address}: {str(error).splitlines()[0]}; start a cluster with "
                       "`ray start --head`, or leave --address out for a local one") from None


def check_cluster(plan: Plan, keys: set[str], store: Store) -> None:
    """Refuse what the cluster can never run, and a store that its nodes do not share."""
    total = capacity()
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for node in (plan.nodes[key] for key in keys):
        workers, each = node.resources.workers, _share(node)
        for kind, amount in node.demand.items():
            if amount > total[kind]:
                raise BadInput(
                    f"resources.{node.stage}: {workers} worker(s) need {amount:g} "
                    f"{kind} together, the cluster has {total[kind]:g}; "
                    "lower workers or the worker's share, or use a larger cluster")
        found = places(node)
        if found < workers:
            shown = " and ".join(f"{amount:g} {kind}" for kind, amount in each.items())
            raise BadInput(
                f"resources.{node.stage}: " + (
                    f"the cluster's machines have room for {found} of {workers} workers of {shown}"
                    if found else f"no machine of the cluster has {shown} for one worker"
                ) + "; lower workers, cpus or gpus")
    if len(machines) > 1:
        _check_shared(store)


def capacity() -> dict[str, float]:
    """CPUs and GPUs that the cluster has or, where it scales by itself, can grow to."""
    largest = state.get_max_resources_from_cluster_config() or {}
    now = ray.cluster_resources()
    return {kind: max(now.get(kind, 0), largest.get(kind, 0)) for kind in ("CPU", "GPU")}


def places(node: Node) -> int:
    """How many workers of a node the cluster has room for; all where they take nothing.

    Counted machine by machine, since no worker spreads over two. Of a cluster that scales by itself
    only the sum is known.
    """
    growing = state.get_max_resources_from_cluster_config() is not None
    machines = [capacity()] if growing else [n["Resources"] for n in ray.nodes() if n["Alive"]]
    # A tenth of a GPU fits ten times, whatever floating-point division says.
    return sum(
        math.floor(min((machine.get(kind, 0) / amount for kind, amount in _share(node).items()),
                       default=node.resources.workers) + 1e-9)
        for machine in machines)


def _share(node: Node) -> dict[str, float]:
    """What one worker takes, without kinds of which it takes nothing."""
    r = node.resources
    return {kind: amount for kind, amount in (("CPU", r.cpus), ("GPU", r.gpus)) if amount}


def _check_shared(store: Store) -> None:
    token, path = uuid.uuid4().hex, f".shared-{uuid.uuid4().hex[:8]}"
    store.write_bytes(path, token.encode())
    read = ray.remote(num_cpus=0, max_retries=0)(_read_token)
    try:
        for machine in (node for node in ray.nodes() if node["Alive"]):
            affinity = NodeAffinitySchedulingStrategy(machine["NodeID"], soft=False)
            found = ray.get(read.options(scheduling_strategy=affinity).remote(store.uri, path))
            if found != token:
                raise BadInput(
                    f"--store {store.uri}: machine {machine['NodeManagerAddress']} does not see "
                    "what the driver wrote there; use a bucket (s3://, gs://) or a folder that "
                    "all machines mount")
    finally:
        store.fs.delete_file(f"{store.root}/{path}")


def _read_token(uri: str, path: str) -> str | None:
    try:
        return Store(uri).read_bytes(path).decode()
    except OSError:
        return None


def execute(
    plan: Plan,
    todo: set[str],
    store: Store,
    folder: Path,
    tell: Callable[[Event], None],
    one_by_one: bool = False,
) -> dict[str, Outcome]:
    """Run the nodes ``todo`` of a plan; nodes outside it count as done. Returns an outcome each.

    Nodes share the cluster as far as their workers fit, or follow each other ``one_by_one``. A
    node whose input failed is blocked; the comparison runs all the same, with gaps.
    """
    total = capacity()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    outcomes = {key: Outcome("done") for key in plan.nodes if key not in todo}
    waiting = _units(plan, todo)
    running: dict[ray.ObjectRef, Unit] = {}
    shown: dict[str, dict] = {}
    while waiting or running:
        for unit in _ready(waiting, plan, outcomes, running, total):
            if one_by_one and running:
                break
            waiting.remove(unit)
            nodes = _unblocked(unit, plan, outcomes, store, tell)
            if not nodes:
                continue
            jobs = [
                Job.of(node, plan, store, folder, _gaps(node, plan, outcomes)) for node in nodes
            ]
            running[_submit(jobs, here)] = Unit(nodes)
            for node in nodes:
                tell(Event("start", node))
        finished, _ = ray.wait(list(running), num_returns=1, timeout=1.0) if running else ([], [])
        for reference in finished:
            unit = running.pop(reference)
            for key, outcome in _result(reference, unit).items():
                outcomes[key] = outcome
                tell(Event(outcome.status, plan.nodes[key], outcome))
        for unit in running.values():
            for node in unit.nodes:
                progress = store.read_json(f"{node.folder}/{PROGRESS}")
                if progress and progress != shown.get(node.key):
                    shown[node.key] = progress
                    tell(Event("progress", node, progress=progress))
    return outcomes


def _units(plan: Plan, todo: set[str]) -> list[Unit]:
    """The nodes to do, in plan order; evaluations of one checkpoint share a unit."""
    units: list[Unit] = []
    passes: dict[str, Unit] = {}
    for node in plan.nodes.values():
        if node.key not in todo:
            continue
        if node.stage == "evaluate":
            checkpoint = plan.nodes[node.inputs["checkpoint"]].folder
            if checkpoint in passes:
                passes[checkpoint].nodes.append(node)
                continue
            passes[checkpoint] = Unit([])
            units.append(passes[checkpoint])
            passes[checkpoint].nodes.append(node)
        else:
            units.append(Unit([node]))
    return units


def _ready(
    waiting: list[Unit], plan: Plan, outcomes: dict[str, Outcome], running: dict, total: dict
) -> Iterator[Unit]:
    """Units whose inputs are decided and whose workers fit beside what runs."""
    used = {kind: sum(unit.demand[kind] for unit in running.values()) for kind in ("CPU", "GPU")}
    for unit in list(waiting):
        decided = all(key in outcomes for node in unit.nodes for key in node.inputs.values())
        fits = all(used[k] + v <= total[k] for k, v in unit.demand.items())
        if decided and fits:
            for kind, amount in unit.demand.items():
                used[kind] += amount
            yield unit


def _unblocked(
    unit: Unit, plan: Plan, outcomes: dict[str, Outcome], store: Store,
    tell: Callable[[Event], None],
) -> list[Node]:
    nodes = []
    for node in unit.nodes:
        gaps = _gaps(node, plan, outcomes)
        if gaps and plan.leave_out(node.key, gaps):
            node = plan.nodes[node.key]
            if store.finished([node.folder]):
                outcomes[node.key] = Outcome("done")
                tell(Event("done", node, outcomes[node.key]))
                continue
        elif gaps and node.stage != "compare":
            outcomes[node.key] = Outcome("blocked", next(iter(gaps.values())))
            tell(Event("blocked", node, outcomes[node.key]))
            continue
        nodes.append(node)
    return nodes


def _gaps(node: Node, plan: Plan, outcomes: dict[str, Outcome]) -> dict[str, str]:
    """Roles whose node did not finish, with the reason at the root."""
    return {
        role: (f"{key} failed: {outcomes[key].message}" if outcomes[key].status == "failed"
               else outcomes[key].message)
        for role, key in node.inputs.items() if outcomes[key].status != "done"
    }


def _submit(jobs: list[Job], here: NodeAffinitySchedulingStrategy) -> ray.ObjectRef:
    node = jobs[0].node
    # Otherwise a task would stay in the placement group of a search's trial that asks for it.
    options: dict = {"name": node.key, "num_cpus": 0, "scheduling_strategy": "DEFAULT"}
    if node.stage not in ("finetune", "evaluate"):
        options |= {"num_cpus": node.resources.cpus, "num_gpus": node.resources.gpus}
    if any(reads_files(job.node) for job in jobs):
        options["scheduling_strategy"] = here
    return ray.remote(_drive).options(**options).remote(jobs)


def _drive(jobs: list[Job]) -> dict[str, Outcome]:
    """Body of a task; imports what the stage needs on the machine that does it."""
    stage = jobs[0].node.stage
    if stage == "evaluate":
        from pipeline.evaluate import run_pass

        return run_pass(jobs)
    if stage == "finetune":
        from pipeline.train import fit

        return {jobs[0].node.key: fit(jobs[0])}
    return {jobs[0].node.key: run_stage(jobs[0])}


def _result(reference: ray.ObjectRef, unit: Unit) -> dict[str, Outcome]:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        message = f"its task died: {lines[0][:300]}; run again, unfinished work goes on"
        return {node.key: Outcome("failed", message, died=True) for node in unit.nodes}
