"""Worked examples before a question, and fixed wordings, each known by its hash."""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated

import pandas as pd
from pydantic import Field

from stages.data.schema import normalise
from stages.errors import StageFailed
from stages.spec import Seed, Spec


class Shots(Spec):
    """Rows of a data set that stand, answered, before every question."""

    dataset: str
    split: str = "train"
    count: Annotated[int, Field(ge=1)]
    seed: Seed = 0
    """Chooses the rows and their order, the same for every question."""

    @property
    def key(self) -> str:
        """Under which the rows are found in an evaluation's ``data``."""
        return f"{self.dataset}#{self.split}"

    @property
    def rule(self) -> dict[str, str]:
        """For an evaluation's ``wordings``: how rows are chosen beside what the fields say."""
        return {"shots": "with texts that are not scored"}

    def drawn(
        self, data: dict[str, pd.DataFrame], columns: Sequence[str], balance: str | None = None
    ) -> pd.DataFrame:
        """The rows in their order; with ``balance``, the values of that column take turns.

        A row whose text, which stands in some ``columns``, is also that of a scored row is passed
        over. Raises StageFailed where fewer rows than asked for are left.
        """
        others = [frame for key, frame in data.items() if key != self.key]
        scored = {text for frame in others for text in _texts(frame, columns)}
        own = data[self.key]
        frame = own[[text not in scored for text in _texts(own, columns)]].copy()
        if len(frame) < self.count:
            raise StageFailed(
                f"shots: {self.dataset}/{self.split} has {len(frame)} rows whose texts are not "
                f"scored, and {self.count} are asked for; lower count or take another split"
            )
        frame["_order"] = [_digest(f"{self.seed}/{id}") for id in frame["id"]]
        frame = frame.sort_values("_order", kind="stable")
        if balance is not None:
            frame["_turn"] = frame.groupby(balance).cumcount()
            frame = frame.sort_values("_turn", kind="stable")
        return frame.drop(columns=["_order", "_turn"], errors="ignore").head(self.count)


def _texts(frame: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """The normalised text of each row."""
    rows = frame[list(columns)].itertuples(index=False)
    return [normalise("\n".join(map(str, row))) for row in rows]


CHAT_CHOICES = {"choices": "where the chat template puts an answer, thoughts closed"}
"""For the ``wordings`` of evaluations whose choices are scored in a chat."""


def wording(*texts: object) -> str:
    """First 12 hexadecimal digits of the sha256 of some texts."""
    return _digest(json.dumps(texts))[:12]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
