"""How long a recipe trains, and how its learning rates move."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from stages.errors import StageFailed
from stages.finetune.recipe import Recipe, Step

_TRANSFORMERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def total_steps(recipe: Recipe, rows: int) -> int:
    """Optimiser steps of a recipe on ``rows`` examples per epoch.

    Raises StageFailed when the warm-up is longer.
    """
    steps = recipe.steps or math.ceil(recipe.epochs * rows / recipe.batch_size)
    if recipe.warmup_steps > steps:
        raise StageFailed(
            f"warmup_steps: {recipe.warmup_steps} is more than the {steps} steps that "
            f"{recipe.epochs} epoch(s) of {rows} rows make; lower it"
        )
    return steps


def epoch(recipe: Recipe, rows: int, step: int) -> int:
    """The epoch that the first example of an optimiser step belongs to; both count from 0."""
    return step * recipe.batch_size // rows


def scheduler(recipe: Recipe, rows: int, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The schedule of all parameter groups, each from its own learning rate."""
    steps = total_steps(recipe, rows)
    warmup = recipe.warmup_steps or math.ceil(recipe.warmup_ratio * steps)
    schedule = recipe.schedule
    if isinstance(schedule, Step):

        def factor(step: int) -> float:
            by_epoch = schedule.every == "epoch"
            stairs = epoch(recipe, rows, step) if by_epoch else step // schedule.every
            return (step / warmup if step < warmup else 1.0) * schedule.gamma**stairs

        return LambdaLR(optimizer, factor)
    own = {"num_cycles": schedule.cycles} if schedule.kind == "cosine" else {}
    return get_scheduler(
        _TRANSFORMERS[schedule.kind], optimizer, warmup, steps, scheduler_specific_kwargs=own
    )
