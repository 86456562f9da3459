"""All evaluations of one checkpoint in one Ray Data pass over an actor pool.

Each evaluation's requests are cut into shards whose content depends on the requests alone. An actor
loads the model once and writes each shard's responses as soon as it has them, so a pass that was
killed repeats at most the shards in flight, and its scores equal those of an uninterrupted one.
The requests lie in the store, a row group per shard, and are read where they are answered: Ray
moves the places of shards and nothing else, and neither its object store nor the process that
drives the pass holds an evaluation's requests.
Shards of generations go to vLLM instead where the sweep says so (``vllm_engine.py``).
A judge that fails when it is asked costs its own metrics: the evaluation is scored and stored as
the one without that judge, and the next run asks it again, with all other answers at hand.
"""

import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.exceptions import RayTaskError

from pipeline.job import (
    Job,
    Outcome,
    beside_the_sweep,
    committed,
    explain,
    report_progress,
)
from pipeline.node import fingerprint
from pipeline.store import UNJUDGED, Store
from stages.errors import StageFailed
from stages.evaluate.base import Response
from stages.evaluate.engine import Engine, device_of
from stages.evaluate.engines import takes
from stages.evaluate.partial import without
from stages.evaluate.shards import (
    REQUEST_SCHEMA,
    RESPONSE_SCHEMA,
    Shard,
    plan_shards,
    requests_from_table,
    responses_from_table,
    responses_to_table,
    shard_id,
)
from stages.evaluate.spec import AMATEUR, JUDGE, JUDGE_DTYPE, SURROGATE
from stages.evaluate.stage import judgements_for, requests_for, score_node
from stages.memory import release_memory

RESPONSES = "responses"
REQUESTS, JUDGEMENTS = "requests", "judgements"
"""Files of what the model and a judge are asked."""
BLOCKS = 64
"""Most blocks of shards for each actor: as many as are kept track of, however many shards."""


@dataclass(frozen=True)
class Asked:
    """A shard of a node, as it lies in the store."""

    id: str
    file: str
    """Of the requests, in the store."""
    group: int
    """The file's row group."""
    by_vllm: bool
    """Whether vLLM can answer it."""

    def read(self, store: Store) -> Shard:
        """Its requests."""
        return Shard(self.id, _group(store, self.file, self.group))


class Responder:
    """An actor that holds the model and answers whole shards.

    ``files`` are files of requests in the store, each with the folder of its node.
    """

    def __init__(self, store: str, files: list[tuple[str, str]], checkpoint: str, dtype: str,
                 cpus: float, gpus: float, amateurs: dict[str, str], surrogates: dict[str, str]):
        self.store, self.files, self.checkpoint = Store(store), files, checkpoint
        self.options = {"dtype": dtype, "device": device_of(gpus),
                        "threads": None if gpus else max(1, int(cpus))}
        self.others = {"amateurs": amateurs, "surrogates": surrogates}
        self.unable: dict[str, str] = {}  # folders of nodes whose requests the model cannot answer

    @cached_property
    def engine(self) -> Engine:
        """The model; loaded with the first shard, because Ray hides why an actor could not begin.
        """
        others = {role: {name: self.store.fetch(folder) for name, folder in models.items()}
                  for role, models in self.others.items()}
        return Engine(self.store.fetch(self.checkpoint), **self.options, **others)

    def __call__(self, batch: dict) -> dict:
        """Answer the shards of a batch and write them; what the model cannot do is the problem of
        its node alone."""
        engine, problems = self.engine, []
        for number, group in zip(batch["file"], batch["group"], strict=True):
            file, folder = self.files[number]
            if folder not in self.unable:
                requests = requests_from_table(_group(self.store, file, int(group)))
                path = _responses_file(folder, shard_id(requests))
                try:
                    responses = engine.respond(requests)
                except StageFailed as error:
                    self.unable[folder] = str(error)
                else:
                    self.store.write_bytes(path, _packed([responses_to_table(responses)]))
            problems.append(self.unable.get(folder, ""))
        return {"file": batch["file"], "problem": problems}


def run_pass(jobs: list[Job]) -> dict[str, Outcome]:
    """Answer the missing shards of all jobs (evaluations of one checkpoint, in one dtype), then
    score each."""
    store, dtype = Store(jobs[0].store), jobs[0].node.spec.dtype
    planned: dict[str, list[Asked]] = {}
    outcomes: dict[str, Outcome] = {}
    for job in jobs:
        try:
            planned[job.node.key] = _prepare(job, store)
        except Exception as error:
            outcomes[job.node.key] = Outcome("failed", explain(error, job, store))
    jobs = [job for job in jobs if job.node.key not in outcomes]
    try:
        checkpoint = jobs[0].inputs["checkpoint"] if jobs else ""
        outcomes |= _respond(jobs, planned, store, checkpoint, dtype)
    except Exception as error:
        return outcomes | {j.node.key: Outcome("failed", explain(error, j, store)) for j in jobs}
    jobs = [job for job in jobs if job.node.key not in outcomes]
    shards = {key: [shard.id for shard in found] for key, found in planned.items()}
    failed, lacks = _judge(jobs, shards, store)
    outcomes |= failed
    for job in jobs:
        if job.node.key not in outcomes:
            outcomes[job.node.key] = _score(job, shards[job.node.key], store, lacks[job.node.key])
    return outcomes


def _judge(
    jobs: list[Job], shards: dict[str, list[str]], store: Store
) -> tuple[dict[str, Outcome], dict[str, dict[str, str]]]:
    """Have the judges that are models read the stored responses, one pass for each judge, in
    float32 whatever the jobs' precision.

    Adds their shards to those of the nodes; returns the outcomes of nodes that failed, and for each
    node the roles of judges that did, with the reason.
    """
    failed: dict[str, Outcome] = {}
    lacks: dict[str, dict[str, str]] = {job.node.key: {} for job in jobs}
    by_judge: dict[str, dict[str, tuple[str, list[Asked]]]] = {}
    for job in jobs:
        try:
            asked = judgements_for(job.node.spec.evaluation, _inputs(job, store),
                                   _responses(job, shards[job.node.key], store))
        except Exception as error:
            failed[job.node.key] = Outcome("failed", explain(error, job, store))
            continue
        for judge, requests in asked.items():
            role = f"{JUDGE}{judge}"
            cut = plan_shards(requests, job.node.spec.shard_size)
            planned = _written(job, store, cut, f"{JUDGEMENTS}-{judge}")
            by_judge.setdefault(job.inputs[role], {})[job.node.key] = role, planned
    for folder, asked in by_judge.items():
        asking = [job for job in jobs if job.node.key in asked]
        parts = {key: planned for key, (_, planned) in asked.items()}
        try:
            reasons = {key: outcome.message for key, outcome in
                       _respond(asking, parts, store, folder, JUDGE_DTYPE).items()}
        except Exception as error:
            reasons = {job.node.key: explain(error, job, store) for job in asking}
        for key, (role, _) in asked.items():
            if key in reasons:
                lacks[key][role] = f"failed when asked: {reasons[key]}"
            else:
                shards[key] = [*shards[key], *(shard.id for shard in parts[key])]
    return failed, lacks


def _prepare(job: Job, store: Store) -> list[Asked]:
    with beside_the_sweep(job):
        shards = plan_shards(requests_for(job.node.spec.evaluation, _inputs(job, store)),
                             job.node.spec.shard_size)
    asked = _written(job, store, shards, REQUESTS)
    del shards
    release_memory()
    return asked


def _written(job: Job, store: Store, shards: list[Shard], name: str) -> list[Asked]:
    """Write a node's requests, a row group per shard."""
    file = f"{job.node.folder}/{name}.parquet"
    store.write_bytes(file, _packed([shard.table for shard in shards], REQUEST_SCHEMA))
    # A shard holds generations alone, or none.
    return [Asked(shard.id, file, group, takes(requests_from_table(shard.table.slice(0, 1))[0]))
            for group, shard in enumerate(shards)]


def _inputs(job: Job, store: Store) -> dict[str, Path]:
    """The folders that scoring reads; weights stay where they are."""
    return {role: store.fetch(folder, weights=False) for role, folder in job.inputs.items()
            if role.startswith(("data/", JUDGE))}


def _responses(job: Job, shards: list[str], store: Store) -> Iterator[Response]:
    """The stored responses of a node's shards."""
    for shard in shards:
        file = store.read_bytes(_responses_file(job.node.folder, shard))
        yield from responses_from_table(pq.read_table(pa.BufferReader(file)))


@dataclass(frozen=True)
class Missing:
    """A shard whose responses are still to be had, and the folder of its node."""

    node: str
    folder: str
    shard: Asked


def _responses_file(folder: str, shard: str) -> str:
    return f"{folder}/{RESPONSES}/{shard}.parquet"


def _respond(
    jobs: list[Job], shards: dict[str, list[Asked]], store: Store, checkpoint: str, dtype: str
) -> dict[str, Outcome]:
    """Answer every shard without stored responses, by actors with that checkpoint in that
    precision or by vLLM.

    Returns the outcomes of nodes some of whose requests the model cannot or vLLM could not answer.
    """
    gc.collect()  # what a failed pass before this one holds
    by_key = {job.node.key: job for job in jobs}
    ours, others, waiting = [], [], {}
    for job in jobs:
        there = store.files(f"{job.node.folder}/{RESPONSES}")
        missing = [s for s in shards[job.node.key] if f"{s.id}.parquet" not in there]
        waiting[job.node.key] = len(missing)
        for shard in missing:
            elsewhere = job.node.spec.engine == "vllm" and shard.by_vllm
            (others if elsewhere else ours).append(Missing(job.node.key, job.node.folder, shard))

    def stored(key: str) -> None:
        waiting[key] -= 1
        total = len(shards[key])
        report_progress(store, by_key[key].node, total - waiting[key], total, "shards")

    failed: dict[str, Outcome] = {}
    for key, problem in _by_actors(ours, jobs, store, checkpoint, dtype) if ours else ():
        if problem:
            failed.setdefault(key, Outcome("failed", problem))
        else:
            stored(key)
    try:
        for missing, problem in _by_vllm(others, jobs, store, checkpoint) if others else ():
            if problem:
                failed.setdefault(missing.node, Outcome("failed", problem))
            else:
                stored(missing.node)
    except Exception as error:
        failed |= {key: Outcome("failed", explain(error, by_key[key], store))
                   for key in {missing.node for missing in others}}
    return failed


def _by_actors(
    missing: list[Missing], jobs: list[Job], store: Store, checkpoint: str, dtype: str
) -> Iterator[tuple[str, str]]:
    """Send shards through an actor pool; yields the node of each, with the problem of one that is
    not stored."""
    resources = jobs[0].node.resources
    files = {(each.shard.file, each.folder): each.node for each in missing}
    nodes, numbers = list(files.values()), {file: n for n, file in enumerate(files)}
    rows = [{"file": numbers[each.shard.file, each.folder], "group": each.shard.group}
            for each in missing]
    # A block per shard as long as there are few, else several, the long and the short alike.
    blocks = min(len(rows), BLOCKS * resources.workers)
    rows = [row for start in range(blocks) for row in rows[start::blocks]]
    answered = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        Responder,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(resources.workers, len(rows)), max_tasks_in_flight_per_actor=2
        ),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
        fn_constructor_kwargs={
            "store": store.uri, "files": list(files), "checkpoint": checkpoint, "dtype": dtype,
            "cpus": resources.cpus, "gpus": resources.gpus,
            "amateurs": _named(jobs, AMATEUR), "surrogates": _named(jobs, SURROGATE),
        },
    )
    answered.context.raise_original_map_exception = True  # so that the reason is the actor's own
    try:
        for row in answered.iter_rows():
            yield nodes[row["file"]], row["problem"]
    except RayTaskError as error:
        raise error.cause from error


def _by_vllm(
    missing: list[Missing], jobs: list[Job], store: Store, checkpoint: str
) -> Iterator[tuple[Missing, str]]:
    """Store what vLLM answers; yields each shard, with the problem of one that is not stored."""
    from pipeline import vllm_engine

    spec, resources = jobs[0].node.spec, jobs[0].node.resources
    shards = [each.shard.read(store) for each in missing]
    for index, answered in vllm_engine.answer(shards, store, checkpoint, spec, resources):
        each, failures = missing[index], answered.failures
        if not failures:
            store.write_bytes(_responses_file(each.folder, each.shard.id),
                              _packed([responses_to_table(answered.responses)]))
            yield each, ""
            continue
        id, reason = next(iter(failures.items()))
        yield each, (f"vLLM did not answer {len(failures)} of the {len(shards[index].table)} "
                     f"requests of a shard, first {id}: {reason}; run again, what is stored stays")


def _named(jobs: list[Job], role: str) -> dict[str, str]:
    """The inputs of some nodes whose role begins so, by the rest of it."""
    return {key.removeprefix(role): folder for job in jobs
            for key, folder in job.inputs.items() if key.startswith(role)}


def _score(job: Job, shards: list[str], store: Store, lacks: dict[str, str]) -> Outcome:
    """Score one evaluation from its stored responses and commit it, without the judges that it
    ``lacks`` as the evaluation that has none of them."""
    scored = _without(job, lacks) if lacks else job

    def work() -> str:
        responses = _responses(job, shards, store)
        with store.attempt(scored.node.folder) as (attempt, output), beside_the_sweep(job):
            score_node(scored.node.spec.evaluation, _inputs(scored, store), responses, output)
        return attempt

    if not lacks:
        return committed(job, store, work)
    store.write_json(f"{job.node.folder}/{UNJUDGED}", lacks)
    there = bool(store.finished([scored.node.folder]))
    outcome = Outcome("done") if there else committed(scored, store, work)
    if outcome.status != "done":
        return outcome
    message = "; ".join(f"{role} {reason}" for role, reason in lacks.items())
    return replace(outcome, message=message, lacks=lacks)


def _without(job: Job, roles: Iterable[str]) -> Job:
    """The job of the same evaluation without some judges, which are known by their roles."""
    judges = {role.removeprefix(JUDGE) for role in roles}
    rest = without(job.node.spec.evaluation, (), judges)
    spec = job.node.spec.model_copy(update={"evaluation": rest})
    inputs = {role: folder for role, folder in job.inputs.items() if role not in roles}
    found = fingerprint(job.node.stage, spec, {role: job.contents[role] for role in inputs})
    keys = {role: job.node.inputs[role] for role in inputs}
    return replace(
        job, node=replace(job.node, spec=spec, inputs=keys, fingerprint=found), inputs=inputs)


def _packed(tables: list[pa.Table], schema: pa.Schema = RESPONSE_SCHEMA) -> bytes:
    """Tables as the bytes of a Parquet file, a row group each."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema) as writer:
        for table in tables:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _group(store: Store, file: str, group: int) -> pa.Table:
    """A row group of a Parquet file."""
    with store.open(file) as stream:
        return pq.ParquetFile(stream).read_row_group(group)
