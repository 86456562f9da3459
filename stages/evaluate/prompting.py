"""Worked examples before a question, and fixed wordings, each known by its hash."""

import hashlib
import json
from typing import Annotated

import pandas as pd
from pydantic import Field

from stages.spec import Spec


class Shots(Spec):
    """Rows of a data set that stand, answered, before every question."""

    dataset: str
    split: str = "train"
    count: Annotated[int, Field(ge=1)]
    seed: int = 0
    """Chooses the rows and their order, the same for every question."""

    @property
    def key(self) -> str:
        """Under which the rows are found in an evaluation's ``data``."""
        return f"{self.dataset}#{self.split}"

    def drawn(self, data: dict[str, pd.DataFrame], balance: str | None = None) -> pd.DataFrame:
        """The rows in their order; with ``balance``, the values of that column take turns."""
        frame = data[self.key].copy()
        frame["_order"] = [_digest(f"{self.seed}/{id}") for id in frame["id"]]
        frame = frame.sort_values("_order", kind="stable")
        if balance is not None:
            frame["_turn"] = frame.groupby(balance).cumcount()
            frame = frame.sort_values("_turn", kind="stable")
        return frame.drop(columns=["_order", "_turn"], errors="ignore").head(self.count)


def wording(*texts: object) -> str:
    """First 12 hexadecimal digits of the sha256 of some texts."""
    return _digest(json.dumps(texts))[:12]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
