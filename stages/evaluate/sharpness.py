"""Sharpness of an image classifier's minimum: how curved the loss is around its weights."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from stages.evaluate.base import Metric, Request, Response, mean_of
from stages.evaluate.examples import results
from stages.evaluate.labelled_images import LabelledImages
from stages.spec import Seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.models.images import ImageProcessor

Part = Literal["router", "expert", "backbone", "head", "embedding"]
EXPERTS = ("router", "expert")
AT_ONCE = 50
"""Images in memory at once."""


class Sharpness(LabelledImages):
    """Largest eigenvalue and trace of the Hessian of the mean cross-entropy of some images, with
    respect to the model's weights (``stages/probe/sharpness.py``), without auxiliary losses.

    They are numbers of a model and a batch. What stands in the scores is each image's part of them:
    v'H_i v of the batch's top eigenvector v, and the mean of z'H_i z over the random vectors, whose
    means over the images are the eigenvalue and the trace. So intervals and paired tests say what
    other images would change with v and the z held; what other random vectors would change says
    ``trace_error``. All images travel in one request, since v hangs on all of them: the evaluation
    is one shard, whatever the shards' size.
    """

    kind: Literal["sharpness"] = "sharpness"
    split: str = "test"
    """May be one that recipes train on."""
    limit: Annotated[int, Field(ge=1)] = 100
    """The first images of the split, so many."""
    parts: tuple[Part, ...] = ()
    """Roles of which the Hessian is taken as well, each by itself; ``head`` holds its own router
    and experts."""
    vectors: Annotated[int, Field(ge=2)] = 16
    """Random vectors of the trace."""
    tolerance: Annotated[float, Field(gt=0)] = 1e-3
    """Relative, of the eigenvalue."""
    seed: Seed = 0

    axis: ClassVar[str] = "adversarial"
    primary: ClassVar[str] = "eigenvalue"

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One, with all images."""
        images = self.rows(self._first(data)[self.dataset])
        return [self.procedure_request(self._id, {"images": images})]

    @property
    def _id(self) -> str:
        return f"{self.dataset}/{self.split}"

    def _first(self, data: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
        return {self.dataset: data[self.dataset].head(self.limit)}

    def procedure(
        self, model: "PreTrainedModel", tokenizer: "ImageProcessor", rows: Sequence[dict]
    ) -> Iterable[dict]:
        """For the row with all images: their predictions, losses and parts of the sharpness."""
        from torch.nn.functional import cross_entropy

        from stages.evaluate.showing import Shown
        from stages.probe.sharpness import (
            ALL,
            Hessian,
            parameters_of,
            sharpness,
            twice_differentiable,
        )

        for row in rows:
            shown = Shown(self, model, tokenizer, row["images"])
            logits, _ = shown.seen(shown.pixels)
            found = {
                "predictions": shown.predictions(logits),
                "losses": shown.losses(logits).tolist(),
                "sharpness": {},
            }
            batches = zip(shown.pixels.split(AT_ONCE), shown.labels.split(AT_ONCE), strict=True)
            losses = [
                lambda x=x, y=y, of=shown.classifier: cross_entropy(
                    of(x).float(), y, reduction="none"
                )
                for x, y in batches
            ]
            with twice_differentiable(model):
                for part in (ALL, *self.parts):
                    parameters = parameters_of(model, part)
                    if not parameters:
                        continue
                    measured = sharpness(
                        Hessian(losses, parameters),
                        vectors=self.vectors, tolerance=self.tolerance, seed=self.seed,
                    )  # fmt: skip
                    found["sharpness"][part] = {
                        "parameters": measured.parameters,
                        "eigenvalue": measured.eigenvalue_parts.tolist(),
                        "trace": measured.trace_parts.tolist(),
                    }
            yield found

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per image: ``correct``, ``loss``, and its parts of ``eigenvalue``, of ``trace``,
        by random vector ``trace/0`` and so on, and of ``trace_per_parameter``; of a role R
        ``eigenvalue/R`` and so on, NaN where the model has no such part."""
        about, (found,) = self.about(self._first(data)), results([self._id], responses)
        scores = {
            "prediction": found["predictions"],
            "answer": "",
            "correct": (about["gold"] == found["predictions"]).astype(float),
            "loss": found["losses"],
        }
        missing = {
            "parameters": 1,
            "eigenvalue": [np.nan] * len(about),
            "trace": [[np.nan] * len(about)] * self.vectors,
        }
        for part in ("all", *self.parts):
            there, of = found["sharpness"].get(part, missing), _suffix(part)
            trace = np.mean(there["trace"], axis=0)
            scores[f"eigenvalue{of}"] = there["eigenvalue"]
            scores[f"trace{of}"] = trace
            scores[f"trace_per_parameter{of}"] = trace / there["parameters"]
            for vector, values in enumerate(there["trace"]):
                scores[f"trace{of}/{vector}"] = values
        return about.assign(**scores)

    def metrics(self) -> tuple[Metric, ...]:
        """Eigenvalue and trace, first those of all weights, with the trace's error; the loss."""
        found = []
        for part in ("all", *self.parts):
            of, where = _suffix(part), "" if part == "all" else f", {part}"
            fields = {"higher_is_better": False, "of_experts": part in EXPERTS}
            found += [
                mean_of(f"eigenvalue{of}", label=f"largest Hessian eigenvalue{where}", **fields),
                mean_of(f"trace{of}", label=f"Hessian trace{where}", **fields),
                mean_of(
                    f"trace_per_parameter{of}", label=f"trace per parameter{where}", **fields
                ),
                self._trace_error(of, label=f"standard error of the trace{where}", **fields),
            ]
        loss = mean_of("loss", label="cross-entropy (nats)", higher_is_better=False)
        return (*found, loss, mean_of("correct", "accuracy"))

    def _trace_error(self, of: str, **fields: object) -> Metric:
        """Standard deviation of the traces of the random vectors over the root of their number."""
        columns = [f"trace{of}/{vector}" for vector in range(self.vectors)]

        def statistics(scores: pd.DataFrame) -> np.ndarray:
            values = scores[columns].to_numpy(dtype=float)
            there = ~np.isnan(values[:, :1])
            return np.hstack([np.where(there, values, 0.0), there.astype(float)])

        def value(sums: np.ndarray) -> np.ndarray:
            with np.errstate(invalid="ignore", divide="ignore"):
                traces = sums[..., :-1] / sums[..., -1:]
            return traces.std(axis=-1, ddof=1) / self.vectors**0.5

        return Metric(f"trace_error{of}", statistics, value, **fields)


def _suffix(part: str) -> str:
    return "" if part == "all" else f"/{part}"
