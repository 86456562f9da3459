"""Truthfulness: multiple-choice questions, answered by the most probable choice.

Prompt and normalisation are those of lm-evaluation-harness's SciQ task, so numbers can be compared:
the passage, the question and "Answer:", each choice after one blank; ``accuracy`` takes the choice
with the largest log-probability, ``accuracy_norm`` divides it by the choice's number of characters
(without the blank) first. With ``chat`` the prompt is the user's turn and a choice, without its
blank, the assistant's.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import pandas as pd

from stages.evaluate.base import Evaluation, Metric, Request, Response, mean_of
from stages.evaluate.examples import answers, qualified


class MultipleChoice(Evaluation):
    """Accuracy on questions with given choices, of which one is right."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    dataset: str
    split: str = "test"
    chat: bool = False
    """Put the prompt through the tokenizer's chat template."""

    added: ClassVar[tuple[str, ...]] = ("chat",)
    axis: ClassVar[str] = "truthfulness"
    primary: ClassVar[str] = "accuracy"

    def datasets(self) -> dict[str, str]:
        """The one data set and its split."""
        return {self.dataset: self.split}

    def tasks(self) -> dict[str, str]:
        """Data set to the task that it must be of."""
        return {self.dataset: "multiple_choice"}

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One request per question, with all its choices."""
        frame = data[self.dataset]
        return [
            Request(
                id,
                _prompt(row.context, row.question),
                tuple(f" {choice}" for choice in row.choices),
                chat=self.chat,
            )
            for id, row in zip(
                qualified(self.dataset, frame["id"]), frame.itertuples(), strict=True
            )
        ]

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per question: ``correct`` and ``correct_norm``, each 0 or 1."""
        frame = data[self.dataset]
        ids = qualified(self.dataset, frame["id"])
        best, best_norm = [], []
        for choices, response in zip(frame["choices"], answers(ids, responses), strict=True):
            logprobs = np.array(response.logprobs)
            best.append(int(np.argmax(logprobs)))
            lengths = [len(choice) for choice in choices]
            best_norm.append(int(np.argmax(logprobs / lengths)))
        gold = frame["answer"].to_numpy()

        def named(places: Sequence[int]) -> list[str]:
            return [row[place] for row, place in zip(frame["choices"], places, strict=True)]

        return pd.DataFrame(
            {
                "example_id": ids,
                "document": qualified(self.dataset, frame["document"]),
                "subset": self.dataset,
                "prompt": list(map(_prompt, frame["context"], frame["question"])),
                "gold": named(gold),
                "prediction": named(best),
                "answer": "",
                "correct": (best == gold).astype(float),
                "correct_norm": (best_norm == gold).astype(float),
            }
        )

    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy, and accuracy with length-normalised log-probabilities."""
        return (
            mean_of("correct", "accuracy", label="accuracy"),
            mean_of("correct_norm", "accuracy_norm", label="accuracy, length-normalised"),
        )


def _prompt(context: str, question: str) -> str:
    return f"{context.lstrip()}\nQuestion: {question}\nAnswer:"
