"""What it costs to record the routes of a forward pass.

    python benchmarks/routes.py FOLDER [FOLDER ...] [--threads 2] [--rounds 20]

The same model reads the same tokens plainly and with its routes recorded, in turns; the medians of
the rounds count, in seconds of processor time, so that other work on the machine counts little.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from stages.models.load import load
from stages.models.routes import routed


def seconds(model, tokens: torch.Tensor, record: bool) -> float:
    start = time.process_time()
    if record:
        with routed(model):
            model(input_ids=tokens, use_cache=False)
    else:
        model(input_ids=tokens, use_cache=False)
    return time.process_time() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for folder in options.folders:
        model = load(folder)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (1, options.tokens), generator=generator)
        seconds(model, tokens, True)
        ratios = [
            seconds(model, tokens, True) / seconds(model, tokens, False)
            for _ in range(options.rounds)
        ]
        print(f"{folder}: recorded / plain {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
