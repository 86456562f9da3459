"""Training with experts spread and whole, beside DDP, transformers' Trainer and one plain process.

    python benchmarks/training.py [FOLDER] [--steps 6] [--rounds 1]

`EP=2` is our loop with the experts shared by two ranks, `EP=1` the same with whole experts on both,
`DDP` a plain loop over PyTorch's DistributedDataParallel.

8 sequences of 64 tokens per step over all ranks, fp32, gradient norm clipped at 1, fused AdamW,
every side on the same model, batches and schedule. Without a folder a random Mixtral of the size
of an upcycled SmolLM2-135M (374 M parameters) is made. Each side runs in processes of its own, one
after the other; the median step without the first counts, the best of the rounds. Memory is the
largest resident set of a rank, loading included. Exits with 1 if a loss differs or a budget is
missed.
"""

import argparse
import os
import resource
import socket
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

TOKENS, BATCH = 64, 8
RATE, CLIP = 1e-4, 1.0
WORKERS = {"EP=2": 2, "EP=1": 2, "DDP": 2, "Trainer": 2, "one process": 1}


def batches(vocabulary: int, steps: int) -> np.ndarray:
    """Token ids of every step, shape (steps, 8, 64)."""
    return np.random.default_rng(0).integers(10, vocabulary, (steps, BATCH, TOKENS))


def ours(folder: Path, ids: np.ndarray, expert_parallel: int) -> tuple[list[float], list[float]]:
    """Losses and seconds of the steps of our loop over two ranks."""
    from stages.finetune import loop, training
    from stages.finetune.batches import Example
    from stages.finetune.spec import FinetuneSpec, TrainSet

    torch.distributed.init_process_group("gloo")
    spec = FinetuneSpec(
        data=(TrainSet(dataset="random"),), steps=len(ids), batch_size=BATCH, learning_rate=RATE,
        schedule="constant", gradient_clipping=CLIP, workers=2, expert_parallel=expert_parallel,
    )  # fmt: skip
    loop.start_distributed()
    examples = [Example(tuple(row), TOKENS - 1) for row in ids.reshape(-1, TOKENS).tolist()]
    # The same order for every side: row after row.
    training.global_batch = lambda rows, size, seed, step: np.arange(step * size, (step + 1) * size)
    run, *_ = loop.build(spec, folder, examples)
    rows = [run.step(step) for step in range(len(ids))]
    return [row["loss"] for row in rows], [row["seconds"] for row in rows]


def with_trainer(folder: Path, ids: np.ndarray) -> tuple[list[float], list[float]]:
    """The same of transformers' Trainer, data-parallel over two ranks."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from stages.models.load import load

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.start)

    model = load(folder)
    model.config.use_cache = False
    rows = [{"input_ids": row, "labels": row} for row in ids.reshape(-1, TOKENS).tolist()]
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model,
            TrainingArguments(
                output, per_device_train_batch_size=BATCH // 2, max_steps=len(ids),
                learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=CLIP,
                optim="adamw_torch_fused", train_sampling_strategy="sequential", use_cpu=True,
                ddp_backend="gloo", logging_steps=1, save_strategy="no", report_to="none",
                disable_tqdm=True, dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            data_collator=lambda rows: {k: torch.tensor([r[k] for r in rows]) for k in rows[0]},
            callbacks=[Clock],
        )  # fmt: skip
        trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], Clock.seconds


def plain(folder: Path, ids: np.ndarray, workers: int) -> tuple[list[float], list[float]]:
    """The same of a plain PyTorch loop, data-parallel where there are several workers."""
    from stages.models.load import load

    model, rank = load(folder).train(), 0
    if workers > 1:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    losses, seconds = [], []
    for batch in torch.from_numpy(ids):
        start = time.perf_counter()
        share = batch.chunk(workers)[rank]
        loss = model(input_ids=share, labels=share, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / workers
        if workers > 1:
            torch.distributed.all_reduce(total)
        losses.append(total.item())
        seconds.append(time.perf_counter() - start)
    return losses, seconds


SIDES = {
    "EP=2": partial(ours, expert_parallel=2),
    "EP=1": partial(ours, expert_parallel=1),
    "DDP": partial(plain, workers=2),
    "Trainer": with_trainer,
    "one process": partial(plain, workers=1),
}


def worker(rank: int, side: str, port: int, folder: Path, steps: int, results: Path) -> None:
    from transformers import AutoConfig

    workers = WORKERS[side]
    torch.set_num_threads(2 // workers)
    if workers > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    losses, seconds = SIDES[side](
        folder, batches(AutoConfig.from_pretrained(folder).vocab_size, steps)
    )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    torch.save((losses, seconds, memory), results / f"{side}-{rank}.pt")


def measure(side: str, folder: Path, steps: int) -> tuple[list[float], float, float]:
    """Losses, seconds per step and the largest GiB of a rank."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as results:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        os.environ["OMP_NUM_THREADS"] = str(2 // WORKERS[side])
        torch.multiprocessing.spawn(
            worker, (side, port, folder, steps, Path(results)), nprocs=WORKERS[side]
        )
        ranks = [torch.load(file) for file in sorted(Path(results).glob("*.pt"))]
    step = max(statistics.median(seconds[1:]) for _, seconds, _ in ranks)
    return ranks[0][0], step, max(memory for *_, memory in ranks)


def random_mixtral(folder: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, num_local_experts=4,
        num_experts_per_tok=2, tie_word_embeddings=True, sliding_window=None,
        max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="Hugging Face folder of an MoE model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        if arguments.folder is None:
            random_mixtral(folder)
        figures: dict[str, tuple[list[float], float, float]] = {}
        for _ in range(arguments.rounds):
            for side in arguments.sides:
                losses, step, memory = measure(side, folder, arguments.steps)
                if side not in figures or step < figures[side][1]:
                    figures[side] = losses, step, memory
    for side, (losses, step, memory) in figures.items():
        print(
            f"{side:11} {step:6.2f} s/step {BATCH * TOKENS / step:7.1f} tokens/s "
            f"{memory:5.2f} GiB per rank, losses {' '.join(f'{loss:.4f}' for loss in losses)}"
        )
    if len(figures) == len(SIDES):
        raise SystemExit(not all(judge(figures)))


def judge(figures: dict[str, tuple[list[float], float, float]]) -> list[bool]:
    """Print each budget with what was measured; which of them are kept."""
    mine, peer, alone = (figures[side] for side in ("EP=2", "Trainer", "one process"))
    difference = max(
        abs(a - b) / b
        for losses, *_ in figures.values()
        for a, b in zip(losses, alone[0], strict=True)
    )
    budgets = [
        ("tokens/s of EP=2 against Trainer", peer[1] / mine[1], 0.9, True),
        ("s/step of EP=2 against one process", mine[1] / alone[1], 1.3, False),
        ("memory per rank of EP=2 against Trainer", mine[2] / peer[2], 0.75, False),
        ("largest relative difference of a loss", difference, 1e-4, False),
    ]
    kept = []
    for name, value, bound, at_least in budgets:
        kept.append(value >= bound if at_least else value <= bound)
        mark = "✓" if kept[-1] else "✗"
        print(f"{mark} {name}: {value:.2g} ({'at least' if at_least else 'at most'} {bound:g})")
    return kept


if __name__ == "__main__":
    main()
