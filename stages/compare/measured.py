"""The score tables of a sweep's attacks and probes, and levels of what they measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from stages.compare.quantities import PARTS
from stages.compare.results import Scores
from stages.compare.spec import UNTUNED, CompareSpec, Hypotheses
from stages.evaluate.base import Evaluation, mean_of
from stages.statistics import estimate, paired

VALUE = mean_of("value")
"""The metric of the tables that ``frame`` makes."""


@dataclass(frozen=True)
class Level:
    """A mean with its 95 % interval over examples and seeds."""

    value: float
    ci_low: float
    ci_high: float
    n: int
    documents: int
    seeds: tuple[int, ...]
    change: bool = False
    """It is tuned minus untuned, of a model whose experts started alike."""


class Measured:
    """What attacks and probes found, by part (``quantities.PARTS``)."""

    def __init__(self, spec: CompareSpec, inputs: dict[str, Path], gaps: dict[str, str]):
        self.spec = spec
        self.scores: dict[str, Scores] = {}
        chosen = spec.hypotheses or Hypotheses()
        for part, kinds in PARTS.items():
            of_kind = [n for n, evaluation in spec.evaluations.items() if evaluation.kind in kinds]
            name = getattr(chosen, part) or next(iter(of_kind), None)
            if name is not None:
                self.scores[part] = Scores(name, spec, inputs, gaps)

    def evaluation(self, part: str) -> Evaluation:
        """The evaluation that plays a part."""
        return self.spec.evaluations[self.scores[part].evaluation]

    def columns(self, part: str) -> list[str]:
        """The score columns of a part that some model has a number in, in their order."""
        found: dict[str, None] = {}
        for table in self.scores[part].tables.values():
            found |= dict.fromkeys(table.columns[table.notna().any()])
        return list(found)

    def seeds(self, part: str, model: str, recipe: str) -> tuple[int, ...]:
        """The seeds whose scores are there."""
        tables = self.scores[part].tables
        return tuple(s for s in self.spec.seeds_of(recipe) if (model, recipe, s) in tables)

    def table(self, part: str, model: str, recipe: str, seed: int) -> pd.DataFrame:
        """The scores of one checkpoint."""
        return self.scores[part].tables[model, recipe, seed]

    def frames(
        self,
        part: str,
        columns: Sequence[str],
        model: str,
        recipe: str,
        seeds: Sequence[int],
        among: str = "",
    ) -> list[pd.DataFrame]:
        """Per seed the mean of some columns, as ``value`` of each example; ``among`` leaves the
        examples out for which that column is not 1 in every model, and seeds without any."""
        found = []
        for seed in seeds:
            table = self.table(part, model, recipe, seed)
            values = row_mean(table, columns)
            if among:
                common = self._common(part, among, recipe, seed)
                values = values.where(table["example_id"].map(common))
                if values.isna().all():
                    continue
            found.append(frame(table, values))
        return found

    def _common(self, part: str, column: str, recipe: str, seed: int) -> pd.Series:
        """By example, whether a column is 1 in all the models that have scores."""
        tables = [
            table.set_index("example_id")[column]
            for (_, of, number), table in self.scores[part].tables.items()
            if (of, number) == (recipe, seed)
        ]
        return pd.concat(tables, axis=1).eq(1).all(axis=1)

    def level(
        self,
        part: str,
        columns: Sequence[str],
        model: str,
        recipe: str,
        *,
        learned: bool = False,
        among: str = "",
    ) -> Level | None:
        """The mean of some columns, or nothing where no example has a number.

        ``learned`` says that it is about experts: of an upcycled model that is in the sweep
        untuned as well it is then the change from that. ``among``: see ``frames``.
        """
        seeds = self.seeds(part, model, recipe)
        if not seeds:
            return None
        frames = self.frames(part, columns, model, recipe, seeds, among)
        if not frames:
            return None
        options = {"resamples": self.spec.resamples, "seed": self.spec.seed}
        metric = replace(VALUE, bounded=self._bounded(part, columns))
        if learned and self.twin(part, model, recipe):
            before = self.frames(part, columns, model, UNTUNED, (0,)) * len(seeds)
            both = paired(frames, before, metric, **options)
            found = Level(
                both.difference, both.ci_low, both.ci_high, both.n, both.documents, seeds, True
            )
        else:
            found = Level(**vars(estimate(frames, metric, **options)), seeds=seeds)
        return found if found.n else None

    def _bounded(self, part: str, columns: Sequence[str]) -> bool:
        """Whether the scores of some columns lie between 0 and 1, and so their mean does: as their
        metrics say, or because all of them are 0 or 1."""
        evaluation, tables = self.evaluation(part), self.scores[part].tables.values()
        metrics = [*evaluation.metrics(), *(m for t in tables for m in evaluation.curves(t))]
        declared = {metric.column for metric in metrics if metric.bounded}
        others = [column for column in columns if column not in declared]
        return all(t[c].dropna().isin((0, 1)).all() for t in tables for c in others if c in t)

    def twin(self, part: str, model: str, recipe: str) -> bool:
        """Whether results on the experts of a tuned model are told as change from the untuned."""
        return self._alike(model, recipe) and bool(self.seeds(part, model, UNTUNED))

    def lacks_twin(self, part: str, model: str, recipe: str) -> bool:
        """Whether they ought to be, and cannot."""
        return self._alike(model, recipe) and not self.seeds(part, model, UNTUNED)

    def _alike(self, model: str, recipe: str) -> bool:
        return recipe != UNTUNED and model in self.spec.upcycled


def row_mean(table: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """Per example the mean over some columns, leaving out those without a number; those that a
    table lacks have none."""
    return table.reindex(columns=columns).astype(float).mean(axis=1)


def frame(table: pd.DataFrame, values: pd.Series) -> pd.DataFrame:
    """A score table with the one column ``value``."""
    return pd.DataFrame(
        {"example_id": table["example_id"], "document": table["document"], "value": values}
    )
