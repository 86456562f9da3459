"""What a fine-tune is told: the recipe (identity) and how it is spread out (run time)."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from stages.data.templates import TEMPLATES
from stages.finetune.recipe import Recipe, TrainSet
from stages.spec import RUN_TIME, Seed

__all__ = ["FinetuneSpec", "Recipe", "TrainSet"]

CURVE_FILE = "training_curve.parquet"
EVIDENCE_FILE = "recipe_evidence.json"
ROUTING_FIGURE = "routing.svg"
"""Of Mixture-of-Experts models only."""
REMOVED_FILE = "removed_rows.parquet"
FILES = (CURVE_FILE, EVIDENCE_FILE, ROUTING_FIGURE, REMOVED_FILE)
"""What a fine-tune writes beside the checkpoint."""


class FinetuneSpec(Recipe):
    """Input roles: ``model`` (a Hugging Face folder) and one ``data/<dataset>`` for each data set
    that is trained or validated on."""

    VERSION: ClassVar[int] = 6

    seed: Seed = 0
    until: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many of the steps, with the schedule of all of them."""
    rows_seed: Seed | None = None
    """Of the rows that a ``limit`` draws, where this is a later part of a training in parts, which
    share them; by default ``seed``."""
    steps_before: Annotated[int, Field(ge=0)] = 0
    """Steps of the earlier parts, after which ``alternate`` goes on taking turns."""

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
    dropped: Annotated[dict[str, Any], RUN_TIME] = {}
    """What the planner left out of the recipe because this model is dense, by field."""
    out_of_memory_at: Annotated[tuple[int, ...], RUN_TIME] = ()
    """Micro-batches that ran out of memory before ``micro_batch`` was taken."""

    def identity(self) -> dict:
        """Also covers the wording of the templates and, where it matters, the micro-batch.

        After running out of memory it stays the one that was asked for: what was used instead is
        in the run's evidence.
        """
        parts = {}
        if self.depends_on_micro_batch:
            parts["micro_batch"] = self.asked_micro_batch().used_micro_batch
        used = sorted({train.template for train in self.reads if train.template is not None})
        templates = {"templates": {name: TEMPLATES[name].hash for name in used}}
        identity = super().identity()
        # What nothing depends on.
        if all(train.limit is None for train in self.reads):
            del identity["rows_seed"]
        if self.alternate is None:
            del identity["steps_before"]
        return identity | templates | parts

    @property
    def seed_of_rows(self) -> int:
        """What draws the rows of a train set with a limit."""
        return self.seed if self.rows_seed is None else self.rows_seed

    @property
    def used_micro_batch(self) -> int:
        """The largest micro-batch that divides a worker's share and is at most ``micro_batch``."""
        share = self.batch_size // self.workers
        fits = range(1, min(share, self.micro_batch) + 1)
        return max((size for size in fits if share % size == 0), default=1)

    def asked_micro_batch(self) -> "FinetuneSpec":
        """The spec before any micro-batch ran out of memory."""
        micro_batch = (*self.out_of_memory_at, self.micro_batch)[0]
        return self.model_copy(update={"micro_batch": micro_batch, "out_of_memory_at": ()})
