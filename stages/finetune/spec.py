"""What a fine-tune is told: the recipe (identity) and how it is spread out (run time)."""

from typing import Annotated, Literal

from pydantic import Field

from stages.data.templates import TEMPLATES
from stages.spec import RUN_TIME, Spec


class TrainSet(Spec):
    """A data set to train on; its rows are read from the input role ``data/<dataset>``."""

    dataset: str
    split: str = "train"
    template: str | None = None
    """Template of ``stages/data/templates.py`` for classification rows; none for instructions,
    which go through the tokenizer's chat template."""
    repeat: Annotated[int, Field(ge=1)] = 1
    """How often each row stands in one epoch."""


class Recipe(Spec):
    """How a model is fine-tuned: what a sweep sets, and all of it changes results."""

    train: Annotated[tuple[TrainSet, ...], Field(min_length=1)]
    steps: Annotated[int, Field(ge=1)]
    """Optimiser steps."""
    batch_size: Annotated[int, Field(ge=1)]
    """Sequences per optimiser step, over all workers."""
    max_length: Annotated[int, Field(ge=8)] = 128
    """Tokens; longer sequences are cut at the end of the prompt's text, never in the answer."""
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clipping: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global L2 norm of the gradient."""
    auxiliary_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the load-balancing loss; must be 0 for a dense model (the planner sets it so)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights."""


class FinetuneSpec(Recipe):
    """Input roles: ``model`` (a Hugging Face folder) and one ``data/<dataset>`` per train set."""

    seed: int = 0

    workers: Annotated[int, Field(ge=1), RUN_TIME] = 1
    expert_parallel: Annotated[int, Field(ge=1), RUN_TIME] = 1
    micro_batch: Annotated[int, Field(ge=1), RUN_TIME] = 8
    """Sequences per forward pass and worker."""
    checkpoint_every: Annotated[int, Field(ge=1), RUN_TIME] = 20
    """Steps between two resumable checkpoints."""
    deepspeed_config: Annotated[str | None, RUN_TIME] = None
    """File name in ``deepspeed_configs/``; chosen from model and device when absent."""
    threads: Annotated[int | None, RUN_TIME] = None
    """CPU threads per worker; PyTorch's own choice when absent."""

    def identity(self) -> dict:
        """Also covers the wording of the templates and, where it matters, the micro-batch.

        The load-balancing loss of a batch is not the mean of its parts', so with a weight on it the
        size of the parts changes the result.
        """
        parts = {}
        if self.auxiliary_loss_weight:
            parts["micro_batch"] = min(self.micro_batch, self.batch_size // self.workers)
        used = sorted({train.template for train in self.train if train.template is not None})
        templates = {"templates": {name: TEMPLATES[name].hash for name in used}}
        return super().identity() | templates | parts
