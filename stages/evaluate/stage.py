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
from stages.evaluate.base import Evaluation, Request, Response
from stages.evaluate.shards import plan_shards, requests_to_table, responses_to_table
from stages.evaluate.spec import EvaluateSpec
from stages.statistics import summarise


def run(spec: EvaluateSpec, inputs: dict[str, Path], output: Path) -> None:
    """Evaluate a checkpoint in this process.

    Writes ``requests.parquet``, ``responses/<shard>.parquet`` and what ``score_node`` writes.
    """
    from stages.evaluate.engine import Engine

    requests = requests_for(spec.evaluation, inputs)
    pq.write_table(requests_to_table(requests), output / "requests.parquet")
    engine = Engine(
        inputs["checkpoint"], dtype=spec.dtype, device="cuda" if spec.gpus else "cpu"
    )
    (output / "responses").mkdir()
    responses = []
    for shard in plan_shards(requests, spec.shard_size):
        answered = engine.respond(shard.requests)
        pq.write_table(responses_to_table(answered), output / "responses" / f"{shard.id}.parquet")
        responses += answered
    score_node(spec.evaluation, inputs, responses, output)


def requests_for(evaluation: Evaluation, inputs: dict[str, Path]) -> list[Request]:
    """The requests of an evaluation on its data sets' folders."""
    return evaluation.requests(_read(evaluation, inputs))


def score_node(
    evaluation: Evaluation,
    inputs: dict[str, Path],
    responses: Iterable[Response],
    output: Path,
) -> None:
    """Write ``scores.parquet``, one row per example, and ``summary.json``.

    The summary holds value, ci_low, ci_high, n and documents of every metric. Raises StageFailed
    when responses are missing.
    """
    data = _read(evaluation, inputs)
    scores = evaluation.score(data, {response.id: response for response in responses})
    scores.to_parquet(output / "scores.parquet", index=False)
    summary = summarise(scores, evaluation.metrics())
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


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
