"""Accuracy of vision models, also on shifted images."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import pandas as pd
from pydantic import model_validator

from stages.evaluate.base import Metric, Response
from stages.evaluate.examples import difference, mean_where, results
from stages.evaluate.labelled_images import LabelledImages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.models.images import ImageProcessor


class ImageClassification(LabelledImages):
    """Accuracy of an image classifier on clean images and on shifted ones."""

    kind: Literal["image_classification"] = "image_classification"
    shifted: tuple[str, ...] = ()
    """Sets out of distribution, such as corruptions of the clean one."""

    axis: ClassVar[str] = "out_of_distribution"
    VERSION: ClassVar[int] = 2

    @model_validator(mode="after")
    def _sets_differ(self) -> "ImageClassification":
        if len(set(self.sets)) < len(self.sets):
            raise ValueError("names a data set twice; name each set once")
        return self

    @property
    def primary(self) -> str:
        """Accuracy on the shifted sets; on the clean one where there are none."""
        return "shifted_accuracy" if self.shifted else "accuracy"

    @property
    def outside(self) -> tuple[str, ...]:
        """The shifted sets."""
        return self.shifted

    @property
    def sets(self) -> tuple[str, ...]:
        """The clean set and the shifted ones."""
        return (self.dataset, *self.shifted)

    def procedure(
        self, model: "PreTrainedModel", tokenizer: "ImageProcessor", rows: Sequence[dict]
    ) -> Iterable[dict]:
        """The prediction for each image, and its loss in nats."""
        from stages.evaluate.showing import Shown

        shown = Shown(self, model, tokenizer, rows)
        logits, _ = shown.seen(shown.pixels)
        return [
            {"prediction": prediction, "loss": loss}
            for prediction, loss in zip(
                shown.predictions(logits), shown.losses(logits).tolist(), strict=True
            )
        ]

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per image: ``domain``, its set, ``correct``, 0 or 1, and ``loss``."""
        about = self.about(data)
        found = pd.DataFrame(results(about["example_id"], responses))
        return about.assign(
            prediction=found["prediction"],
            answer="",
            domain=about["subset"],
            correct=(found["prediction"] == about["gold"]).astype(float),
            loss=found["loss"],
        )

    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy over shifted sets, on the clean one and on each, and what is lost."""

        def accuracy(name: str, among: Sequence[str], label: str) -> Metric:
            return mean_where(
                "correct", name, "domain", among, label=label, datasets=tuple(among)
            )

        inside = "accuracy on clean images" if self.shifted else "accuracy"
        clean = accuracy("accuracy", [self.dataset], inside)
        loss = mean_where(
            "loss", "loss", "domain", [self.dataset], label="cross-entropy (nats)",
            higher_is_better=False, datasets=(self.dataset,),
        )  # fmt: skip
        if not self.shifted:
            return clean, loss
        each = [accuracy(f"accuracy/{d}", [d], f"accuracy on {d}") for d in self.shifted]
        lost = difference(
            "accuracy_lost", [clean], each, higher_is_better=False,
            label="accuracy lost: clean minus mean shifted",
        )  # fmt: skip
        pooled = accuracy("shifted_accuracy", self.shifted, "accuracy on shifted images, pooled")
        return pooled, clean, lost, loss, *each
