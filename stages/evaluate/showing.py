"""Labelled images shown to a loaded classifier by procedures."""

import base64
import zlib
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from stages.errors import StageFailed
from stages.evaluate.labelled_images import LabelledImages
from stages.models.families import family
from stages.models.images import Classifier, ImageProcessor
from stages.models.patches import with_patch_products
from stages.models.routes import Policy, routed
from stages.models.routing import Routing


class Shown:
    """The images of some rows, B of them, and a classifier that looks at them.

    Raises StageFailed for a classifier whose answer to one depends on the others.
    """

    def __init__(
        self,
        spec: LabelledImages,
        model: PreTrainedModel,
        processor: ImageProcessor,
        rows: Sequence[dict],
    ):
        config = model.config
        if getattr(config, "eval_capacity_factor", None) and config.group_size != 1:
            raise StageFailed(
                f"{spec.kind}: experts drop tokens beyond a capacity that images share, so that "
                "what is found of one depends on the others; leave eval_capacity_factor out, or "
                "set group_size to 1"
            )
        self.spec, self.model, self.rows = spec, model, rows
        self.classifier = Classifier(with_patch_products(model), processor)
        self.moe = family(model).is_moe
        self.names = processor.labels
        self.ids = [row["id"] for row in rows]
        self.pixels = self.decoded(rows)
        """(B, C, H, W) in [0, 1], on the model's device."""
        labels = torch.tensor([processor.label(row["label"]) for row in rows])
        self.labels = labels.to(model.device)

    def decoded(self, rows: Sequence[dict]) -> torch.Tensor:
        """The images of other rows as well."""
        images = [base64.b64decode(row["image"]) for row in rows]
        return self.classifier.processor.decode(images).to(self.model.device)

    @torch.no_grad()
    def seen(
        self, pixels: torch.Tensor, force: Policy | None = None
    ) -> tuple[torch.Tensor, list[Routing]]:
        """Logits (B, labels) and routes of images, the routes possibly forced."""
        with routed(self.model, force) as routes:
            logits = self.classifier(pixels)
        return logits.float(), routes

    def predictions(self, logits: torch.Tensor) -> list[str]:
        """The labels with the largest logits."""
        return [self.names[output] for output in logits.argmax(1).tolist()]

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats, (B,)."""
        return torch.nn.functional.cross_entropy(logits, self.labels, reduction="none")

    def seeds(self, purpose: str) -> list[tuple[int, int, int]]:
        """Seeds of each image's random numbers, the same in any batch."""
        of = zlib.crc32(purpose.encode())
        return [(self.spec.seed, of, zlib.crc32(id.encode())) for id in self.ids]
