"""What the report of a search is made from."""

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Goal:
    """An objective of a search."""

    name: str
    label: str
    """The same in short, for figures and headings."""
    maximize: bool

    @property
    def column(self) -> str:
        """Its column in a table of trials; NaN where a trial did not finish."""
        return f"objective:{self.name}"

    @property
    def title(self) -> str:
        """Its label with the direction that is better."""
        return f"{self.label} {'↑' if self.maximize else '↓'}"

    @property
    def definition(self) -> str:
        """Its title and, where the label does not say it, what it is."""
        return self.title if self.label == self.name else f"{self.title} ({self.name})"


@dataclass(frozen=True)
class Knob:
    """A field that is searched."""

    field: str
    log: bool
    """Whether it was drawn on a logarithmic scale."""
    base: object
    """Its value in the recipe that the search started from."""

    @property
    def column(self) -> str:
        """Its column in a table of trials; NaN where a condition switched it off."""
        return f"value:{self.field}"


@dataclass(frozen=True)
class SearchedModel:
    """The search of one model."""

    model: str
    side: str
    """``moe`` or ``dense``"""
    table: pd.DataFrame
    """One row per trial: number, status, reason, steps, tokens, seconds, signal, a column per knob
    and per goal."""
    seeds: int
    """Fine-tunes of each trial."""
    idle: tuple[str, ...]
    """Fields left out because they change nothing in this model."""
    chosen: tuple[int, ...]
    """Numbers of the trials that were trained again with fresh seeds."""

    @property
    def finished(self) -> pd.DataFrame:
        """The trials that were trained and evaluated to the end."""
        return self.table[self.table["status"] == "finished"]


@dataclass(frozen=True)
class SearchContent:
    """A whole search."""

    title: str
    algorithm: str
    base: str
    """Name of the recipe that the knobs change."""
    goals: tuple[Goal, ...]
    knobs: tuple[Knob, ...]
    models: tuple[SearchedModel, ...]
    pairs: tuple[tuple[str, str], ...]
    """Names of MoE and dense model."""
    final_seeds: tuple[int, ...]
    winners_report: str
    """Relative address of the report that compares the winners on the test split."""
