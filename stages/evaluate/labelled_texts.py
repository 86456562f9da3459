"""What attacks and probes of labelled texts share: which texts, and how they are put.

Each example is one row of a procedure: the prompt in three parts, of which the middle one may be
changed.
"""

import re

import pandas as pd
from pydantic import model_validator

from stages.data.spec import Task
from stages.data.templates import TEMPLATES
from stages.evaluate.base import Evaluation, Request
from stages.evaluate.classification import check_labels
from stages.evaluate.examples import qualified
from stages.evaluate.prompting import CHAT_CHOICES
from stages.spec import Seed


class LabelledTexts(Evaluation):
    """An evaluation that holds the model while it classifies texts over a closed set of labels."""

    dataset: str
    split: str = "test"
    template: str
    """A name in ``stages/data/templates.py``; its last column is what changes."""
    chat: bool = False
    """Put the prompt through the tokenizer's chat template."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _no_technique(self) -> "LabelledTexts":
        if self.technique is not None:
            raise ValueError(
                "technique has no effect on an evaluation that holds the model; remove it"
            )
        return self

    def datasets(self) -> dict[str, str]:
        """The one data set and its split."""
        return {self.dataset: self.split}

    @property
    def task(self) -> Task:
        """The task of the data set, which is the template's."""
        return TEMPLATES[self.template].task if self.template in TEMPLATES else "classification"

    def tasks(self) -> dict[str, Task]:
        """Data set to the task that it must be of."""
        return {self.dataset: self.task}

    def wordings(self) -> dict[str, str]:
        """The template's hash."""
        return {"template": TEMPLATES[self.template].hash, **(CHAT_CHOICES if self.chat else {})}

    def rows(self, frame: pd.DataFrame) -> list[dict]:
        """JSON-ready rows of a table: ``id``, the prompt ``before``, ``text``, ``after``, and
        ``label``."""
        check_labels(self.dataset, frame["label"], self.template)
        template = TEMPLATES[self.template]
        changed = template.columns[-1]
        before, after = template.prompt.split(f"{{{changed}}}", 1)
        return [
            {
                "id": id,
                "before": _filled(before, row),
                "text": str(row[changed]),
                "after": _filled(after, row),
                "label": row["label"],
            }
            for id, row in zip(
                qualified(self.dataset, frame["id"]), frame.to_dict("records"), strict=True
            )
        ]

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One per example."""
        return [self.procedure_request(row["id"], row) for row in self.rows(data[self.dataset])]

    def about(self, data: dict[str, pd.DataFrame]) -> pd.DataFrame:
        """The first columns of the scores: who and what each example is."""
        frame = data[self.dataset]
        rows = pd.DataFrame(self.rows(frame))
        return pd.DataFrame(
            {
                "example_id": rows["id"],
                "document": qualified(self.dataset, frame["document"]),
                "subset": "",
                "prompt": rows["before"] + rows["text"] + rows["after"],
                "gold": rows["label"],
            }
        )


def _filled(text: str, row: dict) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: str(row[match[1]]), text)
