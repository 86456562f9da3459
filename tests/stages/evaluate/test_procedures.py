"""An evaluation that holds the model: its rows are sharded, answered and resumed like requests."""

import math
from typing import ClassVar, Literal

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from stages.evaluate.base import Evaluation, Request, mean_of
from stages.evaluate.engine import Engine
from stages.evaluate.examples import results
from stages.evaluate.registry import KINDS
from stages.evaluate.shards import (
    plan_shards,
    requests_from_table,
    requests_to_table,
    responses_from_table,
    responses_to_table,
)
from stages.models.tiny import tiny_model, tiny_tokenizer

TEXTS = [f"text number {number} " * (1 + number % 5) for number in range(23)]


class Steepness(Evaluation):
    """Length of the gradient of a text's loss with respect to its embeddings, times ``scale``."""

    kind: Literal["steepness"] = "steepness"
    scale: float = 1.0

    axis: ClassVar[str] = "adversarial"
    primary: ClassVar[str] = "steepness"

    def requests(self, data):
        return [self.procedure_request(f"{n}", {"text": text}) for n, text in enumerate(TEXTS)]

    def procedure(self, model, tokenizer, rows):
        for row in rows:
            tokens = tokenizer(row["text"], return_tensors="pt")["input_ids"]
            embedded = model.get_input_embeddings()(tokens).requires_grad_()
            loss = model(inputs_embeds=embedded, labels=tokens, use_cache=False).loss
            length = torch.autograd.grad(loss, embedded)[0].norm().item()
            yield {"steepness": self.scale * length, "nothing": math.nan}

    def score(self, data, responses):
        ids = [request.id for request in self.requests(data)]
        return pd.DataFrame({"example_id": ids, **pd.DataFrame(results(ids, responses))})

    def metrics(self):
        return (mean_of("steepness"),)


@pytest.fixture
def evaluation(monkeypatch):
    monkeypatch.setitem(KINDS, "steepness", Steepness)
    return Steepness(scale=2.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_model("mixtral", tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def table(folder, shards, workers, evaluation, stored=()):
    """Scores from so many engines, each with shards of its own; ``stored`` are answered already."""
    responses = {response.id: response for response in stored}
    there = set(responses)
    left = [shard for shard in shards if shard.requests[0].id not in there]
    for worker in range(workers):
        engine = Engine(folder, threads=1)
        for shard in left[worker::workers]:
            responses |= {r.id: r for r in engine.respond(shard.requests)}
    return evaluation.score({}, responses)


def test_workers_and_a_restart_change_no_bit(folder, evaluation, tmp_path):
    shards = plan_shards(evaluation.requests({}), 64)
    assert [len(shard.requests) for shard in shards] == [4, 4, 4, 4, 4, 3]
    one = table(folder, shards, 1, evaluation)
    assert one["steepness"].gt(0).all() and one["nothing"].isna().all()
    pd.testing.assert_frame_equal(table(folder, shards, 2, evaluation), one, check_exact=True)
    # Killed after two shards, whose files hold all that the rest of the run needs.
    stored = []
    for shard in shards[:2]:
        asked = requests_from_table(requests_to_table(shard.requests))
        answered = responses_to_table(Engine(folder, threads=1).respond(asked))
        pq.write_table(answered, tmp_path / f"{shard.id}.parquet")
        stored += responses_from_table(pq.read_table(tmp_path / f"{shard.id}.parquet"))
    resumed = table(folder, shards, 1, evaluation, stored)
    pd.testing.assert_frame_equal(resumed, one, check_exact=True)


def test_procedures_of_two_evaluations_and_questions_share_an_engine(folder, evaluation):
    double = Steepness(scale=5.0).procedure_request("double", {"text": TEXTS[0]})
    single, question = evaluation.requests({})[0], Request("q", "Is it", (" so", " not"))
    engine = Engine(folder, threads=1)
    answered = engine.respond([double, question, single])
    assert [response.id for response in answered] == ["double", "q", "0"]
    found = results(["double", "0"], {response.id: response for response in answered})
    assert found[0]["steepness"] == 2 * found[1]["steepness"]
    assert engine.respond([question]) == [answered[1]]
    assert not any(parameter.requires_grad for parameter in engine.model.parameters())


def test_a_file_without_the_newer_columns_is_read(evaluation):
    requests = [Request("a", "b", ("c",))]
    older = requests_to_table(requests).drop_columns(["procedure", "row"])
    assert requests_from_table(older) == requests
