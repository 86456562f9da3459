"""Adversarial robustness: classification of texts with character edits on the words that matter.

The same examples are asked three times: clean, attacked, and with the control's random edits.
"""

from typing import Annotated, ClassVar, Literal, get_args

import pandas as pd
from pydantic import Field, model_validator

from stages.data.spec import Task
from stages.evaluate.base import Metric, Request, Response, mean_of
from stages.evaluate.character_edits import Operation, Surrogate, edited_pair
from stages.evaluate.classification import Classification, check_labels, correct
from stages.evaluate.confusion import macro_f1, of_counts
from stages.evaluate.examples import difference, qualified
from stages.spec import Seed

SUBSETS = ("clean", "adversarial", "random")


class CharacterEdits(Classification):
    """Accuracy under a black-box character attack, beside clean and randomly edited texts."""

    VERSION: ClassVar[int] = Classification.VERSION + 1
    kind: Literal["character_edits"] = "character_edits"
    dataset: str
    split: str = "test"
    surrogate_split: str = "train"
    """Split of the same data set on which the attack's own small model is fitted."""
    edits: Annotated[int, Field(ge=1)] = 4
    """Character edits per text."""
    operations: Annotated[tuple[Operation, ...], Field(min_length=1)] = get_args(Operation)
    seed: Seed = 0

    axis: ClassVar[str] = "adversarial"
    primary: ClassVar[str] = "adversarial_accuracy"

    @model_validator(mode="after")
    def _one_text(self) -> "CharacterEdits":
        if self.task != "classification":
            raise ValueError(
                f"template {self.template} is for task {self.task}, and edits are made to one "
                "text; name a template of task classification"
            )
        return self

    def datasets(self) -> dict[str, str]:
        """The one data set and the split that is attacked."""
        return {self.dataset: self.split}

    def sources(self) -> dict[str, tuple[str, str]]:
        """The attacked split and, under a key of its own, the one the surrogate is fitted on."""
        surrogate = {self._train: (self.dataset, self.surrogate_split)}
        return super().sources() | surrogate | self.shot_source()

    @property
    def _train(self) -> str:
        return f"{self.dataset}#{self.surrogate_split}"

    def tasks(self) -> dict[str, Task]:
        """Data set to the task that it must be of: one text per row, whose words are edited."""
        return dict.fromkeys(super().tasks(), "classification")

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """Three requests per text."""
        check_labels(self.dataset, data[self.dataset]["label"], self.template)
        texts = self._texts(data)
        asked = self.asked(texts["example_id"].tolist(), texts, data)
        return [*asked, *self.calibration(data)]

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """Three rows per text: ``correct``, 0 or 1, and ``edits``, the number of edits made."""
        texts = self._texts(data)
        found = self.answered(texts["example_id"].tolist(), responses)
        return pd.DataFrame(
            {
                "example_id": texts["example_id"],
                "document": texts["document"],
                "subset": texts["subset"],
                "prompt": self.prompts(texts, data),
                "gold": texts["label"],
                **found,
                "edits": texts["edits"],
                "correct": correct(texts["label"], found),
            }
        )

    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy of the three subsets, what the attack takes from it, and macro-F1 of the three
        (classes may be uneven)."""
        clean, adversarial, control = (
            mean_of("correct", name, subset=subset, label=label)
            for name, subset, label in (
                ("clean_accuracy", "clean", "accuracy, clean"),
                ("adversarial_accuracy", "adversarial", "accuracy under attack"),
                ("random_edit_accuracy", "random", "accuracy, random edits"),
            )
        )
        return (
            adversarial,
            clean,
            control,
            difference(
                "adversarial_drop",
                [clean],
                [adversarial],
                higher_is_better=False,
                label="accuracy lost to the attack",
            ),
            difference(
                "adversarial_excess",
                [control],
                [adversarial],
                higher_is_better=False,
                label="of that, beyond random edits",
            ),
            *(
                of_counts(name, macro_f1, self.template, "subset", [subset], label=label)
                for name, subset, label in (
                    ("adversarial_macro_f1", "adversarial", "macro-F1 under attack"),
                    ("clean_macro_f1", "clean", "macro-F1, clean"),
                    ("random_edit_macro_f1", "random", "macro-F1, random edits"),
                )
            ),
            *self.out_of_set_rate(),
        )

    def _texts(self, data: dict[str, pd.DataFrame]) -> pd.DataFrame:
        """Every text three times, with its edits, in the order of the data."""
        surrogate = Surrogate(data[self._train])
        rows = []
        frame = data[self.dataset]
        for id, document, text, label in zip(
            qualified(self.dataset, frame["id"]),
            qualified(self.dataset, frame["document"]),
            frame["text"],
            frame["label"],
            strict=True,
        ):
            attacked, control, edits = edited_pair(
                text, label, surrogate, self.edits, self.operations, f"{self.seed}/{id}"
            )
            versions = ((text, 0), (attacked, edits), (control, edits))
            for subset, (version, count) in zip(SUBSETS, versions, strict=True):
                rows.append((f"{id}/{subset}", document, subset, version, label, count))
        columns = ["example_id", "document", "subset", "text", "label", "edits"]
        return pd.DataFrame(rows, columns=columns)
