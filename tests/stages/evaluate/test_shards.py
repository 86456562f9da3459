"""Shards are a function of the requests alone, and their files give back what was put in."""

import gc
import random
import subprocess
import sys

import pyarrow.parquet as pq

from stages.evaluate.base import Request, Response
from stages.evaluate.shards import (
    plan_shards,
    requests_from_table,
    requests_to_table,
    responses_from_table,
    responses_to_table,
)

REQUESTS = [
    *(Request(f"c{i}", "x" * (i * 7 % 11), (" yes", " no")) for i in range(11)),
    *(Request(f"g{i}", "x" * i, max_new_tokens=8, chat=True) for i in range(5)),
]


def test_every_request_is_in_one_shard_with_its_like():
    shards = plan_shards(REQUESTS, 4)
    assert [len(shard.requests) for shard in shards] == [4, 1, 4, 4, 3]
    assert sorted(r.id for s in shards for r in s.requests) == sorted(r.id for r in REQUESTS)
    assert all(len({bool(r.choices) for r in s.requests}) == 1 for s in shards)
    lengths = [len(r.context) for s in shards for r in s.requests if r.choices]
    assert lengths == sorted(lengths, reverse=True) == list(range(10, -1, -1))


def test_the_same_requests_give_the_same_shards_in_any_order():
    shuffled = random.Random(0).sample(REQUESTS, len(REQUESTS))
    assert plan_shards(shuffled, 4) == plan_shards(REQUESTS, 4)


def test_a_shard_is_named_by_its_content():
    shards = plan_shards(REQUESTS, 4)
    assert len({shard.id for shard in shards}) == len(shards)
    # A change of one request renames its own shard and no other.
    changed = [Request("c0", "", (" yes", " NO")), *REQUESTS[1:]]
    ids = {shard.id for shard in plan_shards(changed, 4)}
    assert [shard.id in ids for shard in shards] == [True, True, True, True, False]
    # Fixed for good: stored responses are found by it.
    assert plan_shards([Request("a", "b", ("c",))], 1)[0].id == "c42360c7ff0bfa38"


def test_tables_give_back_what_was_put_in(tmp_path):
    requests = [*REQUESTS, Request("ü\n", "", ("",))]
    responses = [
        Response("a", logprobs=(-0.1, -1e-300, float("-inf")), tokens=(1, 2, 3)),
        Response("b", tokens=(5,), text="line\n\tü", finished=False),
    ]
    pq.write_table(requests_to_table(requests), tmp_path / "requests.parquet")
    pq.write_table(responses_to_table(responses), tmp_path / "responses.parquet")
    assert requests_from_table(pq.read_table(tmp_path / "requests.parquet")) == requests
    assert responses_from_table(pq.read_table(tmp_path / "responses.parquet")) == responses
    assert requests_from_table(requests_to_table([])) == []


def test_planned_shards_hold_tables_and_no_objects():
    """A pass may take days, and its driver holds the planned shards for so long."""

    def alive():
        gc.collect()
        return sum(isinstance(each, Request) for each in gc.get_objects())

    before = alive()
    shards = plan_shards((Request(str(n), f"text {n}", ("a", "b")) for n in range(9000)), 64)
    assert alive() == before
    assert [len(shard.table) for shard in shards] == [64] * 140 + [40]
    assert sum(shard.table.nbytes for shard in shards) < 9000 * 150


def test_planning_imports_no_torch():
    code = "import sys, stages.evaluate.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_table_of_many_requests_is_made_in_parts():
    requests = [Request(str(n), f"text {n}", ("a", "b")) for n in range(9000)]
    table = requests_to_table(requests)
    assert table.column("id").num_chunks == 3
    assert requests_from_table(table) == requests
    assert requests_to_table([]).num_rows == 0
