"""Texts that are scored and trained on, in data sets that nothing keeps disjoint."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq

from stages.compare.spec import CompareSpec
from stages.data.card import DataCard
from stages.data.schema import keys


def cautions(spec: CompareSpec, inputs: dict[str, Path]) -> Iterator[str]:
    """How many rows of each scored split have a text that is trained on, where some have.

    Texts are compared as the data stage does, which drops such rows where it is told to
    (``disjoint_from``). A data set that is not among the inputs is a gap of the report already.
    """

    @cache
    def texts(split: str) -> list[str]:
        name, _, part = split.partition("/")
        folder = inputs.get(f"data/{name}")
        if folder is None:
            return []
        return keys(pq.read_table(folder / f"{part}.parquet"), DataCard.read(folder).task)

    for scored, trained in spec.may_share.items():
        rows = texts(scored)
        taught = {split: shared for split in trained
                  if (shared := set(texts(split)).intersection(rows))}  # fmt: skip
        if taught:
            every = set().union(*taught.values())
            yield (
                f"{scored}: {sum(text in every for text in rows)} of {len(rows)} rows have a text "
                f"that is trained on ({', '.join(taught)}). Name it in the data set's "
                "disjoint_from to leave them out."
            )
