"""Evaluate stage: requests, the model's responses, one score row per example, a summary.

``run`` does all of it in one process. Spread over many workers, the requests are cut into shards
(``shards.py``) and answered by an ``Engine`` each; ``requests_for`` and ``score_node`` are the two
ends of that.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from stages.errors import StageFailed
from stages.evaluate.base import TEXT_COLUMNS, Evaluation, Metric, Request, Response
from stages.evaluate.partial import complete
from stages.evaluate.shards import plan_shards, requests_to_table, responses_to_table
from stages.evaluate.spec import (
    AMATEUR,
    JUDGE,
    JUDGE_DTYPE,
    JUDGE_FILE,
    SURROGATE,
    EvaluateSpec,
)
from stages.evaluate.techniques import SelfConsistency, applied, collected
from stages.memory import release_memory
from stages.statistics import summarise


def run(spec: EvaluateSpec, inputs: dict[str, Path], output: Path) -> None:
    """Evaluate a checkpoint in this process, by transformers.

    Writes ``requests.parquet``, ``responses/<shard>.parquet`` and what ``score_node`` writes.
    """
    from stages.evaluate.engine import Engine, device_of

    if spec.engine != "transformers":
        raise StageFailed(f"engine: {spec.engine} runs under Ray (moe-reliability evaluate)")
    requests = requests_for(spec.evaluation, inputs)
    pq.write_table(requests_to_table(requests), output / "requests.parquet")
    (output / "responses").mkdir()

    def answered(folder: Path, asked: list[Request], dtype: str, **others: dict) -> list[Response]:
        engine = Engine(folder, dtype=dtype, device=device_of(spec.gpus), **others)
        responses = []
        for shard in plan_shards(asked, spec.shard_size):
            found = engine.respond(shard.requests)
            pq.write_table(responses_to_table(found), output / "responses" / f"{shard.id}.parquet")
            responses += found
        return responses

    responses = answered(
        inputs["checkpoint"],
        requests,
        spec.dtype,
        amateurs=named(inputs, AMATEUR),
        surrogates=named(inputs, SURROGATE),
    )
    judges = named(inputs, JUDGE)
    for judge, asked in judgements_for(spec.evaluation, inputs, responses).items():
        responses += answered(judges[judge], asked, JUDGE_DTYPE)
    score_node(spec.evaluation, inputs, responses, output)


def named(inputs: dict[str, Path], role: str) -> dict[str, Path]:
    """The inputs whose role begins so, by the rest of it."""
    return {key.removeprefix(role): path for key, path in inputs.items() if key.startswith(role)}


def requests_for(evaluation: Evaluation, inputs: dict[str, Path]) -> list[Request]:
    """The requests of an evaluation on its data sets' folders, under its technique."""
    return applied(evaluation.technique, evaluation.requests(_read(evaluation, inputs)))


def judgements_for(
    evaluation: Evaluation, inputs: dict[str, Path], responses: Iterable[Response]
) -> dict[str, list[Request]]:
    """What each judge that is a model is asked about the responses; nothing for most evaluations.

    Raises StageFailed when responses are missing.
    """
    if not evaluation.judge_models():
        return {}
    data = _read(evaluation, inputs)
    asked: dict[str, list[Request]] = {}
    for request in evaluation.judgements(data, _collected(evaluation, data, responses)):
        asked.setdefault(request.model, []).append(request)
    return asked


def score_node(
    evaluation: Evaluation,
    inputs: dict[str, Path],
    responses: Iterable[Response],
    output: Path,
) -> None:
    """Write ``scores.parquet``, one row per example, and ``summary.json``.

    The summary holds value, ci_low, ci_high, n and documents of every metric, but for those over
    data sets that were left out and, of a dense model, those on experts. Where the evaluation has
    them, ``curves.parquet`` holds the same of metrics by layer and budget, and ``hygiene.parquet``
    the checks of the attack. Raises StageFailed when responses are missing.
    """
    scores = _scored(evaluation, inputs, responses)
    scores.to_parquet(output / "scores.parquet", index=False)
    scores = scores.drop(columns=list(TEXT_COLUMNS))
    release_memory()  # for the bootstrap
    metrics = [m for m in complete(evaluation) if not (m.of_experts and _absent(m, scores))]
    summary = summarise(scores, metrics)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if curves := summarise(scores, evaluation.curves(scores)):
        table = pd.DataFrame(curves.values()).assign(metric=list(curves))
        table.to_parquet(output / "curves.parquet", index=False)
    if checks := evaluation.checks(scores):
        pd.DataFrame(checks).to_parquet(output / "hygiene.parquet", index=False)


def _absent(metric: Metric, scores: pd.DataFrame) -> bool:
    """Whether no example has what a metric on experts is computed from."""
    return not metric.statistics(scores).any()


def _scored(
    evaluation: Evaluation, inputs: dict[str, Path], responses: Iterable[Response]
) -> pd.DataFrame:
    """The score rows; data and responses are let go of before anything is summed up."""
    data = _read(evaluation, inputs)
    scores = evaluation.score(data, _collected(evaluation, data, responses))
    for judge, folder in named(inputs, JUDGE).items():
        file = folder / JUDGE_FILE  # not in a folder that no judge stage has made
        commit = json.loads(file.read_text()).get("commit") if file.exists() else None
        if commit:
            scores[f"judge_{judge}"] += f", commit {commit}"
    return scores


def _collected(
    evaluation: Evaluation, data: dict[str, pd.DataFrame], responses: Iterable[Response]
) -> dict[str, Response]:
    """The responses by id, several samples of an answer made one."""
    by_id = {response.id: response for response in responses}
    if isinstance(evaluation.technique, SelfConsistency):
        asked = evaluation.requests(data)
        return by_id | collected(evaluation.technique, asked, by_id, evaluation.voter(data))
    return by_id


def _read(evaluation: Evaluation, inputs: dict[str, Path]) -> dict[str, pd.DataFrame]:
    data = {}
    for key, (dataset, split) in evaluation.sources().items():
        file = inputs[f"data/{dataset}"] / f"{split}.parquet"
        try:
            data[key] = pd.read_parquet(file)
        except (OSError, ValueError) as error:
            raise StageFailed(
                f"data set {dataset!r}: {file} cannot be read ({error}); prepare the data again"
            ) from error
    return data
