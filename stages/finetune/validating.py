"""The loss of held-out rows, in the middle of training and without a trace in it."""

import time

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from stages.finetune.batches import Example, ImageExample, micro_batch
from stages.models.modes import evaluating


@torch.no_grad()
def validate(
    engine: nn.Module, examples: list[Example] | list[ImageExample], size: int
) -> dict[str, float]:
    """The mean negative log-likelihood over the answer tokens of all examples, as the model is in
    evaluation: without the recipe's noise and dropout. ``validation_loss`` in nats, the same on
    every rank, and ``validation_seconds``.

    Each rank looks at every so many-th example, ``size`` at a time. All take equally many forward
    passes, since experts that are spread over them wait for each other; what fills up the last ones
    does not count.
    """
    start = time.perf_counter()
    rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = examples[rank::workers]
    rounds = -(-len(examples) // (workers * size))
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    with evaluating(engine):
        for place in range(0, rounds * size, size):
            real = own[place : place + size]
            part = micro_batch(real or examples[:1], engine.module.config, engine.device)
            out = engine(**part.arguments, use_cache=False)
            if real:
                loss = negative_log_likelihood(out, out.logits[part.answers].float(), part.targets)
                sums += torch.stack([loss.double(), sums.new_tensor(len(part.targets))])
    torch.distributed.all_reduce(sums)
    total, answers = sums.tolist()
    return {
        "validation_loss": total / answers,
        "validation_seconds": time.perf_counter() - start,
    }


def negative_log_likelihood(
    out: ModelOutput, logits: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Summed over the targets (A,); of an ensemble, the mean of its members', each of which learns
    by itself."""
    each = out.get("member_logits")
    if each is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    each = each[: len(targets)].float()  # the clean images, where attacked ones stand behind them
    repeated = targets.repeat_interleave(each.shape[1])
    return F.cross_entropy(each.flatten(0, 1), repeated, reduction="sum") / each.shape[1]
