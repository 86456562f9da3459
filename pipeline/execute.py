"""Runs a plan on Ray: every node an ordinary task, submitted when its inputs are there.

Ray schedules, retries and spreads the tasks; what survives is the store. Fine-tune and evaluation
nodes are small driver tasks that hold no CPU themselves: their workers do. Because those drivers
would otherwise start more worker groups than fit, a node is submitted only when the workers of all
running nodes, together with its own, find places on the cluster's machines.
"""

import gc
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.job import PROJECT, Event, Job, Outcome, reads_files, run_stage
from pipeline.leases import Leases
from pipeline.machines import Machine, machines, placed, this_machine
from pipeline.plan import Node, Plan
from pipeline.store import PROGRESS, Store
from pipeline.survey import settle
from pipeline.sweep import Resources
from stages.errors import BadInput

SECRETS = (
    "HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
)
"""Environment variables that workers on other machines get through the runtime environment."""
DRIVEN = ("finetune", "evaluate")
"""Stages whose task holds nothing itself; their workers lie on any machine."""
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in a submitted job, whose runtime environment the workers inherit by themselves."""


@dataclass
class Unit:
    """Nodes that one task works on: one node, or all evaluations of one checkpoint in one dtype."""

    nodes: list[Node]

    @property
    def resources(self) -> Resources:
        """What its workers take."""
        return self.nodes[0].resources


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
    room = machines(plan.sweep.resources.machines)
    checked = set()
    for node in (plan.nodes[key] for key in keys):
        bound = node.stage not in DRIVEN and reads_files(node)
        if (node.stage, node.resources, bound) in checked:
            continue
        checked.add((node.stage, node.resources, bound))
        workers, found = node.resources.workers, placed(room, [node.resources])
        if found < workers:
            raise BadInput(
                f"resources.{node.stage}: " + (
                    f"the cluster's machines have room for {found} of {workers} workers of"
                    if found else "no machine of the cluster has, for one worker,"
                ) + f" {_shown(node)}; lower workers, cpus or gpus, or name the machines that the "
                "cluster can start under resources.machines")
        if bound and placed([this_machine()], [node.resources]) < workers:
            raise BadInput(
                f"resources.{node.stage}: {node.name} reads files of the machine that runs this "
                f"command, which does not have {_shown(node)}; lower cpus or gpus (0 is allowed)")
    if sum(machine["Alive"] for machine in ray.nodes()) > 1:
        _check_shared(store)


def _shown(node: Node) -> str:
    """What one of its workers takes."""
    r = node.resources
    return " and ".join(f"{n:g} {kind}" for kind, n in (("CPU", r.cpus), ("GPU", r.gpus)) if n)


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
    node whose input failed is blocked; the comparison runs all the same, with gaps. A node that
    another command works at is waited for, and done here only if that one leaves it undone.
    """
    with closing(Leases(store)) as leases:
        return _execute(plan, todo, store, folder, tell, one_by_one, leases)


def _execute(
    plan: Plan,
    todo: set[str],
    store: Store,
    folder: Path,
    tell: Callable[[Event], None],
    one_by_one: bool,
    leases: Leases,
) -> dict[str, Outcome]:
    room = machines(plan.sweep.resources.machines)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    outcomes = {key: Outcome("done") for key in plan.nodes if key not in todo}
    waiting = _units(plan, todo)
    running: dict[ray.ObjectRef, Unit] = {}
    shown: dict[str, dict] = {}
    told: set[str] = set()
    while waiting or running:
        for unit in _ready(waiting, plan, outcomes, running, room):
            if one_by_one and running:
                break
            waiting.remove(unit)
            nodes = _unblocked(unit, plan, outcomes, tell)
            nodes, elsewhere = _leased(nodes, leases, told, tell)
            if elsewhere:
                waiting.append(Unit(elsewhere))
            nodes = _undone(nodes, outcomes, store, leases, tell)
            if not nodes:
                continue
            jobs = [
                Job.of(node, plan, store, folder, _gaps(node, plan, outcomes)) for node in nodes
            ]
            running[_submit(jobs, here)] = Unit(nodes)
            for node in nodes:
                tell(Event("start", node))
        finished: list[ray.ObjectRef] = []
        if running:
            finished, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        elif waiting:  # for another command
            time.sleep(1.0)
        leases.renew()
        for reference in finished:
            unit = running.pop(reference)
            for node in unit.nodes:
                leases.release(node.work_folder)
            for key, outcome in _result(reference, unit).items():
                outcomes[key] = outcome
                if plan.nodes[key].stage == "data" and outcome.status == "done":
                    settle(plan, store)
                if outcome.lacks:
                    plan.leave_out(key, outcome.lacks)
                tell(Event(outcome.status, plan.nodes[key], outcome))
        for unit in running.values():
            for node in unit.nodes:
                progress = store.read_json(f"{node.folder}/{PROGRESS}")
                if progress and progress != shown.get(node.key):
                    shown[node.key] = progress
                    tell(Event("progress", node, progress=progress))
    return outcomes


def _units(plan: Plan, todo: set[str]) -> list[Unit]:
    """The nodes to do, in plan order; evaluations of one checkpoint in one dtype share a unit."""
    units: list[Unit] = []
    passes: dict[tuple[str, str], Unit] = {}
    for node in plan.nodes.values():
        if node.key not in todo:
            continue
        if node.stage == "evaluate":
            model = plan.nodes[node.inputs["checkpoint"]].folder, node.spec.dtype
            if model in passes:
                passes[model].nodes.append(node)
                continue
            passes[model] = Unit([])
            units.append(passes[model])
            passes[model].nodes.append(node)
        else:
            units.append(Unit([node]))
    return units


def _ready(
    waiting: list[Unit],
    plan: Plan,
    outcomes: dict[str, Outcome],
    running: dict[ray.ObjectRef, Unit],
    room: list[Machine],
) -> Iterator[Unit]:
    """Units whose inputs are decided and whose workers fit beside what runs."""
    loads = [unit.resources for unit in running.values()]
    too_large: set[Resources] = set()
    for unit in list(waiting):
        decided = all(key in outcomes for node in unit.nodes for key in node.inputs.values())
        if not decided or unit.resources in too_large:
            continue
        beside = [*loads, unit.resources]
        if placed(room, beside) == sum(load.workers for load in beside):
            loads = beside
            yield unit
        else:
            too_large.add(unit.resources)


def _unblocked(
    unit: Unit, plan: Plan, outcomes: dict[str, Outcome], tell: Callable[[Event], None]
) -> list[Node]:
    """The nodes whose inputs are there, as the plan has them by now; the others are blocked."""
    nodes = []
    for node in unit.nodes:
        gaps = _gaps(node, plan, outcomes)
        if gaps and node.stage != "compare" and not plan.leave_out(node.key, gaps):
            outcomes[node.key] = Outcome("blocked", next(iter(gaps.values())))
            tell(Event("blocked", node, outcomes[node.key]))
            continue
        nodes.append(plan.nodes[node.key])
    return nodes


def _leased(
    nodes: list[Node], leases: Leases, told: set[str], tell: Callable[[Event], None]
) -> tuple[list[Node], list[Node]]:
    """The nodes that this command may work at now, and those that another works at."""
    mine, elsewhere = [], []
    for node in nodes:
        other = leases.take(node.work_folder)
        if other is None:
            mine.append(node)
            continue
        elsewhere.append(node)
        if node.key not in told:
            told.add(node.key)
            tell(Event("waits", node, progress={"text": f"{other} works at it"}))
    return mine, elsewhere


def _undone(
    nodes: list[Node], outcomes: dict[str, Outcome], store: Store, leases: Leases,
    tell: Callable[[Event], None],
) -> list[Node]:
    """The nodes without a result: a data set that was made may have given the plan other ones, and
    another command may have been here. A comparison is shown as the newest all the same."""
    done = store.finished([node.folder for node in nodes])
    undone = []
    for node in nodes:
        if node.folder not in done or node.stage == "compare":
            undone.append(node)
            continue
        leases.release(node.work_folder)
        outcomes[node.key] = Outcome("done")
        tell(Event("done", node, outcomes[node.key]))
    return undone


def _gaps(node: Node, plan: Plan, outcomes: dict[str, Outcome]) -> dict[str, str]:
    """Roles whose node did not finish, or failed when it was asked, with the reason at the root."""
    gaps = {
        role: (f"{key} failed: {outcomes[key].message}" if outcomes[key].status == "failed"
               else outcomes[key].message)
        for role, key in node.inputs.items() if outcomes[key].status != "done"
    }
    for key in node.inputs.values():
        gaps |= outcomes[key].lacks
    return gaps


def _submit(jobs: list[Job], here: NodeAffinitySchedulingStrategy) -> ray.ObjectRef:
    node = jobs[0].node
    # Otherwise a task would stay in the placement group of a search's trial that asks for it.
    options: dict = {"name": node.key, "num_cpus": 0, "scheduling_strategy": "DEFAULT"}
    if node.stage not in DRIVEN:
        options |= {"num_cpus": node.resources.cpus, "num_gpus": node.resources.gpus}
    if any(reads_files(job.node) for job in jobs):
        options["scheduling_strategy"] = here
    return ray.remote(_drive).options(**options).remote(jobs)


def _drive(jobs: list[Job]) -> dict[str, Outcome]:
    """Body of a task; imports what the stage needs on the machine that does it."""
    stage = jobs[0].node.stage
    if stage == "evaluate":
        from pipeline.evaluate import run_pass

        outcomes = run_pass(jobs)
        # A pass that failed lives on in its traceback, which refers to itself, and with it the
        # actors and their CPUs and GPUs, for as long as this process waits for other tasks.
        gc.collect()
        return outcomes
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
