"""The data sets that a recipe reads: to train on, and to validate on."""

from typing import Annotated

from pydantic import Field

from stages.spec import Spec


class TrainSet(Spec):
    """A data set to train on; its rows are read from the input role ``data/<dataset>``."""

    dataset: str
    split: str = "train"
    template: str | None = None
    """Template of ``stages/data/templates.py`` for classification rows; none for instructions,
    which go through the tokenizer's chat template."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use this many rows, drawn by the seed; a smaller limit draws a part of a larger one's."""
    exclude: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Rows whose response holds one of these phrases as whole words, in any case, are removed;
    each removal is written down with its phrase."""
    repeat: Annotated[int, Field(ge=1)] = 1
    """How often each row stands in one epoch."""


class Validation(Spec):
    """Held-out rows whose loss is followed during training. Nothing is chosen by it."""

    dataset: str
    split: str = "selection"
    template: str | None = None
    """As of a train set."""
    limit: Annotated[int, Field(ge=1)] = 64
    """Use at most this many rows, drawn by the seed."""
    every: Annotated[int, Field(ge=1)] = 50
    """Optimiser steps from one look to the next; the last step is followed by one as well."""

    @property
    def rows(self) -> TrainSet:
        """The rows, as those of a train set are named."""
        fields = {f: getattr(self, f) for f in ("dataset", "split", "template", "limit")}
        return TrainSet(**fields)

    def due(self, done: int, last: int) -> bool:
        """Whether there is a look after so many steps of ``last``."""
        return done % self.every == 0 or done == last
