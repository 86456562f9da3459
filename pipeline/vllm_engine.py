"""Generations of one checkpoint by vLLM, through Ray Data's LLM processor (``ray.data.llm``).

The processor is given prompts as token ids and returns token ids; none of its stages around the
engine (chat template, tokenizer, detokenizer) is used. An actor spreads a model over all of its
GPUs by tensor parallelism. The weights are read by vLLM from the store.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from pipeline.store import Store
from pipeline.sweep import EvaluateResources
from stages.evaluate.base import Request, Response
from stages.evaluate.shards import Shard
from stages.evaluate.spec import EvaluateSpec
from stages.evaluate.vllm_requests import Interpreter
from stages.models.families import family

ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
"""vLLM reports its use to its makers otherwise; a checkpoint is never looked for on a hub."""
IN_FLIGHT = 1024
"""Rows that an actor has at once: as many as vLLM decodes together on the largest GPUs."""
RESTARTS = 2
"""Of an actor, before its death is a failure."""
ERROR = "__inference_error__"
"""The column in which the processor says why it could not answer a row."""


@dataclass(frozen=True)
class Answered:
    """The responses to a shard's requests, or the reasons why some of them have none."""

    responses: list[Response]
    failures: dict[str, str]
    """Request id to the engine's reason."""


def answer(
    shards: list[Shard],
    store: Store,
    checkpoint: str,
    spec: EvaluateSpec,
    resources: EvaluateResources,
) -> Iterator[tuple[int, Answered]]:
    """The number of each shard of generations, as soon as vLLM has dealt with all its requests.

    ``checkpoint`` is the model's folder in the store.
    """
    interpreter = Interpreter(store.fetch(checkpoint, weights=False))
    tables = [_table(number, shard, interpreter) for number, shard in enumerate(shards)]
    longest = max(map(_longest, tables, shards))
    arguments = engine_arguments(spec, resources, interpreter.config, longest)
    source = store.path(store.attempt_of(checkpoint))
    process = processor(source, spec, resources, arguments, len(shards))
    found: list[dict[int, dict]] = [{} for _ in shards]
    for row in process(ray.data.from_arrow(tables)).iter_rows():
        number = row["shard"]
        found[number][row["request"]] = row
        if len(found[number]) == len(shards[number].table):
            rows, found[number] = found[number], {}
            yield number, _read(interpreter, shards[number].requests, rows)


def _read(interpreter: Interpreter, requests: list[Request], rows: dict[int, dict]) -> Answered:
    """What a shard's rows, by the place of their requests, say."""
    failures = {each.id: rows[place][ERROR]
                for place, each in enumerate(requests) if rows[place][ERROR]}
    if failures:
        return Answered([], failures)
    return Answered([interpreter.response(each, rows[place]["generated_tokens"])
                     for place, each in enumerate(requests)], {})


def _table(number: int, shard: Shard, interpreter: Interpreter) -> pa.Table:
    """A shard's prompts, one row each: (shard, request) are their places."""
    requests = shard.requests
    return pa.table({
        "shard": pa.array([number] * len(requests), pa.int32()),
        "request": pa.array(range(len(requests)), pa.int32()),
        "prompt_tokens": pa.array(
            [interpreter.prompt(request) for request in requests], pa.list_(pa.int32())),
        "sampling": [json.dumps(interpreter.sampling(request)) for request in requests],
    })


def _longest(table: pa.Table, shard: Shard) -> int:
    """Most tokens that a prompt and its longest answer take."""
    lengths = pc.list_value_length(table["prompt_tokens"])
    return pc.max(pc.add(lengths, shard.table["max_new_tokens"])).as_py()


def engine_arguments(
    spec: EvaluateSpec, resources: EvaluateResources, config: dict, longest: int
) -> dict:
    """vLLM's arguments for a checkpoint with the ``config.json`` ``config``, whose longest prompt
    and answer have so many tokens together."""
    entry = family(config)
    spread = resources.expert_parallel and bool(entry.sparse_layers(config))
    return {
        "dtype": spec.dtype,
        "tensor_parallel_size": max(1, int(resources.gpus)),
        "enable_expert_parallel": spread,  # vLLM refuses it for a dense model
        "max_model_len": longest,
        "generation_config": "vllm",  # the checkpoint's own sampling settings do not act
        "disable_log_stats": True,
    }


def processor(
    source: str, spec: EvaluateSpec, resources: EvaluateResources, arguments: dict, shards: int
):
    """The processor of ray.data.llm, from rows of ``_table`` to their generated tokens."""
    workers = min(resources.workers, shards)
    gpus = int(resources.gpus)
    bundles = [{"CPU": resources.cpus, **({"GPU": 1} if gpus else {})}]
    config = vLLMEngineProcessorConfig(
        model_source=source,
        engine_kwargs=arguments,
        batch_size=spec.shard_size,
        max_concurrent_batches=max(8, math.ceil(IN_FLIGHT / spec.shard_size)),
        concurrency=(workers, workers),
        should_continue_on_error=True,
        log_engine_metrics=False,
        runtime_env={"env_vars": ENVIRONMENT},
        placement_group_config={"bundles": bundles + [{"GPU": 1}] * (gpus - 1)},
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    # What lies around the engine is small: one process at a time, on no CPU that engines wait for.
    light = {"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(size=1)}
    process = build_processor(
        config, preprocess=_asked, postprocess=_answered,
        preprocess_map_kwargs=light, postprocess_map_kwargs=light)
    # An actor whose engine died ends itself, and Ray Data would start it anew without end.
    process.get_stage_by_name("vLLMEngineStage").map_batches_kwargs.update(
        max_restarts=RESTARTS, max_task_retries=RESTARTS)
    return process


def _asked(row: dict) -> dict:
    return {
        "tokenized_prompt": row["prompt_tokens"],
        "sampling_params": json.loads(row["sampling"]),
    }


def _answered(row: dict) -> dict:
    return {name: row[name] for name in ("shard", "request", "generated_tokens")}
