"""The number of workers changes no bit: shards and threads are the plan's, whoever answers them."""

import pandas as pd
import pytest

from stages.evaluate.base import Request
from stages.evaluate.engine import Engine
from stages.evaluate.language_modelling import Perplexity
from stages.evaluate.shards import plan_shards
from stages.evaluate.techniques import DoLa, SelfConsistency, applied
from stages.models.tiny import tiny_model, tiny_tokenizer

WORDS = "a model of several experts reads texts of very different lengths".split()
REQUESTS = [
    *(Request(f"c{n}", " ".join(WORDS[: n + 1]), (" yes", " no way")) for n in range(10)),
    *(Request(f"g{n}", " ".join(WORDS[n:]), max_new_tokens=2 + n) for n in range(8)),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Experts without a capacity, and experts with one."""
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer()
    for name in ("mixtral", "switch_transformers"):
        tiny_model(name, tokenizer, seed=0).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def answered(folder, shards, workers: int) -> dict:
    """The shards dealt out to so many engines, each in an order of its own."""
    responses = {}
    for worker in range(workers):
        engine = Engine(folder, threads=1)
        mine = shards[worker::workers]
        for shard in mine[::-1] if worker % 2 else mine:
            responses |= {r.id: r for r in engine.respond(shard.requests)}
    return responses


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_one_two_and_three_workers_give_the_same_responses(folders, name):
    requests = list(REQUESTS)
    if name == "mixtral":
        drawn = SelfConsistency(kind="self_consistency", samples=2, temperature=1.5)
        dola = DoLa(kind="dola", candidate_layers=(1, 2))
        renamed = [Request(f"d{r.id}", r.context, r.choices) for r in REQUESTS[:10]]
        requests += [*applied(drawn, REQUESTS[10:]), *applied(dola, renamed)]
    shards = plan_shards(requests, 4)
    one = answered(folders / name, shards, 1)
    assert len(one) == len(requests)
    assert answered(folders / name, shards, 2) == one
    assert answered(folders / name, shards, 3) == one


def test_experts_with_a_capacity_see_no_neighbours(folders):
    engine = Engine(folders / "switch_transformers", threads=1)
    assert engine.respond(REQUESTS) == [engine.respond([request])[0] for request in REQUESTS]


def test_tables_are_the_same(folders):
    evaluation = Perplexity(in_domain=("a",), out_of_domain=("b",), window=16)
    texts = [" ".join(WORDS[n:]) for n in range(7)]
    ids = [str(n) for n in range(7)]
    data = dict.fromkeys("ab", pd.DataFrame({"id": ids, "document": ids, "text": texts}))
    shards = plan_shards(evaluation.requests(data), 3)
    tables = [evaluation.score(data, answered(folders / "mixtral", shards, n)) for n in (1, 2, 3)]
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    pd.testing.assert_frame_equal(tables[0], tables[2], check_exact=True)
