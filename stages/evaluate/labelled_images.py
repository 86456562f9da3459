"""What evaluations of image classifiers share: which images, and how they travel.

Each image is one row of a procedure, with its encoded bytes. Budgets of attacks and radii of probes
are in units of images in [0, 1] at the model's own size.
"""

import base64

import pandas as pd
from pydantic import model_validator

from stages.data.spec import Task
from stages.evaluate.base import Evaluation, Request
from stages.evaluate.examples import clusters, qualified


class LabelledImages(Evaluation):
    """An evaluation that holds the model while it classifies images."""

    dataset: str
    split: str = "test"

    @model_validator(mode="after")
    def _no_technique(self) -> "LabelledImages":
        if self.technique is not None:
            raise ValueError("technique has no effect on a classifier of images; remove it")
        return self

    @property
    def sets(self) -> tuple[str, ...]:
        """The data sets, the clean one first."""
        return (self.dataset,)

    def datasets(self) -> dict[str, str]:
        """Every set and the split."""
        return dict.fromkeys(self.sets, self.split)

    def tasks(self) -> dict[str, Task]:
        """All hold images."""
        return dict.fromkeys(self.sets, "images")

    def rows(self, frame: pd.DataFrame, dataset: str | None = None) -> list[dict]:
        """JSON-ready rows of a table (of the clean set, if no other is named): ``id``, ``image``
        (base64 of its bytes) and ``label``."""
        columns = qualified(dataset or self.dataset, frame["id"]), frame["image"], frame["label"]
        return [
            {"id": id, "image": base64.b64encode(image).decode(), "label": label}
            for id, image, label in zip(*columns, strict=True)
        ]

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One per image."""
        return [
            self.procedure_request(row["id"], row)
            for name in self.sets
            for row in self.rows(data[name], name)
        ]

    def about(self, data: dict[str, pd.DataFrame]) -> pd.DataFrame:
        """The first columns of the scores: who and what each image is.

        A set that has the clean set's ids with the clean set's labels holds the same images in
        another form, such as corrupted ones; an image and its forms are one document.
        """
        clean = data[self.dataset]
        label_of = dict(zip(clean["id"], clean["label"], strict=True))

        def origin(name: str) -> str:
            pairs = zip(data[name]["id"], data[name]["label"], strict=True)
            same = all(label_of.get(id) == label for id, label in pairs)
            return self.dataset if same else name

        parts = [
            pd.DataFrame(
                {
                    "example_id": qualified(name, data[name]["id"]),
                    "document": clusters(origin(name), data[name]["document"]),
                    "subset": name,
                    "prompt": "",
                    "gold": data[name]["label"].to_numpy(),
                }
            )
            for name in self.sets
        ]
        return pd.concat(parts, ignore_index=True)
