"""The fine-tune stage as a plain function of files: one process, or as many as torchrun starts."""

import os
from contextlib import nullcontext
from pathlib import Path

from stages.finetune.spec import FinetuneSpec


class NoCallbacks:
    """Starts afresh and tells nobody."""

    def resume_from(self) -> nullcontext[None]:
        """There is no checkpoint."""
        return nullcontext()

    def report(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        """Drop the metrics and the checkpoint."""


def run(spec: FinetuneSpec, inputs: dict[str, Path], output: Path) -> None:
    """Fine-tune without Ray; outside torchrun in one process, whatever the spec's workers."""
    from stages.finetune.loop import end_distributed, train

    alone = "WORLD_SIZE" not in os.environ
    if alone:
        spec = spec.model_copy(update={"workers": 1, "expert_parallel": 1})
    train(spec, inputs, output, NoCallbacks())
    if not alone:
        end_distributed()
