"""Peak memory of an evaluation with 10,000 and with 100,000 requests.

    python benchmarks/request_memory.py [FOLDER]

Parts, each in a process of its own: a *worker* holds the model and answers shard after shard,
as the actors of a pass do; the *driver* makes the requests, cuts them into shards, packs these for
the workers and scores the stored responses. The driver is given made-up responses, so that its part
needs no model; the worker's model is FOLDER or a tiny random one. Requests are questions with four
choices. Exits with 1 where one of the two needs more than 1.1 times as much for the many.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

COUNTS = (10_000, 100_000)
MOST = 1.1
SHARD = 64


def peak() -> float:
    """Largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def questions(start: int, end: int):
    import pandas as pd

    return pd.DataFrame(
        {
            "id": [str(n) for n in range(start, end)],
            "document": [str(n) for n in range(start, end)],
            "question": [f"What is {n} and one, without {n % 7}?" for n in range(start, end)],
            "choices": [[f"{n + 1}", f"{n}", "none", "all of them"] for n in range(start, end)],
            "answer": [n % 4 for n in range(start, end)],
            "context": "",
        }
    )


def worker(count: int, folder: str) -> None:
    import pyarrow.parquet as pq
    import torch

    from stages.evaluate.engine import Engine
    from stages.evaluate.shards import responses_to_table
    from stages.evaluate.truthfulness import MultipleChoice

    torch.set_num_threads(1)
    engine, evaluation = Engine(Path(folder), threads=1), MultipleChoice(dataset="quiz")
    with tempfile.TemporaryDirectory() as output:
        for start in range(0, count, SHARD):
            rows = questions(start, min(start + SHARD, count))
            responses = engine.respond(evaluation.requests({"quiz": rows}))
            pq.write_table(responses_to_table(responses), f"{output}/{start}.parquet")


def data(count: int, folder: str) -> None:
    """The prepared data set and the responses, as other processes leave them."""
    import pyarrow.parquet as pq

    from stages.evaluate.base import Response
    from stages.evaluate.shards import plan_shards, responses_to_table
    from stages.evaluate.truthfulness import MultipleChoice

    rows = questions(0, count)
    rows.to_parquet(f"{folder}/test.parquet")
    for shard in plan_shards(MultipleChoice(dataset="quiz").requests({"quiz": rows}), SHARD):
        made = [Response(r.id, (-1.0, -2.0, -3.0, -4.0), (1, 1, 1, 1)) for r in shard.requests]
        pq.write_table(responses_to_table(made), f"{folder}/{shard.id}.parquet")


def driver(count: int, folder: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from stages.evaluate.shards import plan_shards, requests_to_table, responses_from_table
    from stages.evaluate.stage import requests_for, score_node
    from stages.evaluate.truthfulness import MultipleChoice

    root, evaluation = Path(folder), MultipleChoice(dataset="quiz")
    inputs = {"data/quiz": root}
    requests = requests_for(evaluation, inputs)
    pq.write_table(requests_to_table(requests), root / "requests.parquet")
    planned = plan_shards(requests, SHARD)
    del requests
    packed = [pa.BufferOutputStream() for _ in planned]
    for shard, sink in zip(planned, packed, strict=True):
        pq.write_table(shard.table, sink)
    shards = [shard.id for shard in planned]
    del planned, packed
    answered = (
        response
        for shard in shards
        for response in responses_from_table(pq.read_table(root / f"{shard}.parquet"))
    )
    score_node(evaluation, inputs, answered, root)


PARTS = {"data": data, "driver": driver, "worker": worker}


def measured(part: str, count: int, folder: str) -> float:
    done = subprocess.run(
        [sys.executable, __file__, folder, "--part", part, "--count", str(count)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="", help="a Hugging Face model folder")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        PARTS[arguments.part](arguments.count, arguments.folder)
        print(json.dumps(peak()))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or name
        if not arguments.folder:
            from stages.models.tiny import tiny_model, tiny_tokenizer

            tokenizer = tiny_tokenizer()
            tiny_model("llama", tokenizer, seed=0).save_pretrained(name)
            tokenizer.save_pretrained(name)
        found = {"driver": [], "worker": []}
        for count in COUNTS:
            with tempfile.TemporaryDirectory() as prepared:
                measured("data", count, prepared)
                found["driver"].append(measured("driver", count, prepared))
            found["worker"].append(measured("worker", count, folder))
        for part, (few, many) in found.items():
            print(f"{part}: {few:.0f} MiB with {COUNTS[0]:,} requests, {many:.0f} MiB with "
                  f"{COUNTS[1]:,}: {many / few:.2f} times")  # fmt: skip
        raise SystemExit(any(many > MOST * few for few, many in found.values()))


if __name__ == "__main__":
    main()
