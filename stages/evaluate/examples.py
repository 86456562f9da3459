"""What the kinds of evaluation share: ids, checked look-up of responses, means over subsets.

An example's id is its data set's name and its row's id, so that examples of several data sets never
meet. A bootstrap cluster is named the same way, unless its name tells that it is the same source in
another set.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from stages.data.spec import SHARED
from stages.errors import StageFailed
from stages.evaluate.base import Metric, Response

_DIGEST = re.compile("[0-9a-f]{16}")


def qualified(dataset: str, values: pd.Series) -> list[str]:
    """Ids of one data set (or documents of the only one), made unique over all data sets."""
    return [f"{dataset}/{value}" for value in values]


def clusters(dataset: str, documents: pd.Series, digests: bool = False) -> list[str]:
    """Documents of one data set as bootstrap clusters over all data sets of an evaluation.

    A document that is declared to be shared (``SHARED``) is the same in every set that has it; with
    ``digests`` also one that is named by the digest of its text (a premise, ``data/reading.py``),
    such as in SNLI and SNLI-hard.
    """
    return [
        value
        if value.startswith(SHARED) or (digests and _DIGEST.fullmatch(value))
        else f"{dataset}/{value}"
        for value in map(str, documents)
    ]


def answers(ids: Iterable[str], responses: dict[str, Response]) -> list[Response]:
    """The responses of the given requests, in their order.

    Raises StageFailed when some are missing or a log-probability is not a number.
    """
    ids = list(ids)
    missing = [id for id in ids if id not in responses]
    if missing:
        raise StageFailed(
            f"{len(missing)} of {len(ids)} responses are missing, the first {missing[0]!r}: "
            "run the evaluation again, finished shards are kept"
        )
    found = [responses[id] for id in ids]
    broken = [r.id for r in found if np.isnan((*r.logprobs, *r.outputs)).any()]
    if broken:
        raise StageFailed(
            f"the model gave no number as log-probability or output in {len(broken)} of {len(ids)} "
            f"responses, the first {broken[0]!r}: its weights have diverged, lower the recipe's "
            "learning_rate"
        )
    return found


def results(ids: Iterable[str], responses: dict[str, Response]) -> list[dict]:
    """What a procedure found, in the order of the ids (see ``answers``)."""
    return [json.loads(response.result) for response in answers(ids, responses)]


def mean_where(
    column: str,
    name: str,
    where: str,
    among: Sequence[str],
    subset: str | None = None,
    **fields: object,
) -> Metric:
    """The mean of a score column over the rows (of one subset, where given) whose column ``where``
    holds one of ``among``, leaving out rows without a score."""

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        counted = (scores[where].isin(among) & scores[column].notna()).to_numpy()
        if subset is not None:
            counted = counted & (scores["subset"] == subset).to_numpy()
        values = np.where(counted, scores[column].to_numpy(dtype=float), 0.0)
        return np.stack([values, counted.astype(float)], axis=1)

    return Metric(name, statistics, _ratio, column=column, **fields)


def mean_of_sets(name: str, parts: list[Metric], column: str, **fields: object) -> Metric:
    """The unweighted mean over data sets of the means of a score column, each an ``(x, 1)`` metric
    of rows that no other one has."""
    return replace(difference(name, parts, [], **fields), column=column)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def worst(name: str, parts: list[Metric], **fields: object) -> Metric:
    """The worst of some means, each an ``(x, 1)`` metric: the smallest, or the largest where lower
    is better."""
    higher_is_better = parts[0].higher_is_better
    over = np.min if higher_is_better else np.max

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        return np.concatenate([part.statistics(scores) for part in parts], axis=1)

    def value(sums: np.ndarray) -> np.ndarray:
        return over(_ratio(sums.reshape(*sums.shape[:-1], len(parts), 2)), axis=-1)

    return Metric(
        name,
        statistics,
        value,
        higher_is_better=higher_is_better,
        datasets=_read_by(parts),
        judge=parts[0].judge,
        **fields,
    )


def by_set(
    column: str,
    name: str,
    where: str,
    sets: Sequence[str],
    label: str,
    asked: Sequence[str] = (),
    **fields: object,
) -> list[Metric]:
    """Of a score column's mean over several data sets, the worst of their own means and each of
    these; nothing where there are not several. ``asked``: other sets that each is computed from."""
    if len(sets) < 2:
        return []
    each = [
        mean_where(
            column,
            f"{name}/{dataset}",
            where,
            (dataset,),
            label=f"{label}: {dataset}",
            datasets=(dataset, *asked),
            **fields,
        )
        for dataset in sets
    ]
    return [worst(f"worst_{name}", each, label=f"{label}: worst data set"), *each]


def _read_by(parts: list[Metric]) -> tuple[str, ...] | None:
    """The data sets that some metrics are computed from, where all of them say so."""
    if any(part.datasets is None for part in parts):
        return None
    return tuple(dict.fromkeys(name for part in parts for name in part.datasets))


def difference(
    name: str,
    minuend: list[Metric],
    subtrahend: list[Metric],
    **fields: object,
) -> Metric:
    """Unweighted mean of some means minus that of others (if any), each an ``(x, 1)`` metric."""
    parts = [*minuend, *subtrahend]

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        return np.concatenate([part.statistics(scores) for part in parts], axis=1)

    def value(sums: np.ndarray) -> np.ndarray:
        means = _ratio(sums.reshape(*sums.shape[:-1], len(parts), 2))
        first, second = means[..., : len(minuend)], means[..., len(minuend) :]
        return first.mean(axis=-1) - (second.mean(axis=-1) if subtrahend else 0.0)

    return Metric(name, statistics, value, datasets=_read_by(parts), **fields)


def correlation(one: str, other: str, label: str) -> Metric:
    """Pearson's correlation of two score columns, of experts."""

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        there = (scores[one].notna() & scores[other].notna()).to_numpy()
        x, y = (np.where(there, scores[c].to_numpy(dtype=float), 0.0) for c in (one, other))
        return np.stack([there.astype(float), x, y, x * x, y * y, x * y], axis=1)

    def value(sums: np.ndarray) -> np.ndarray:
        n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))

    return Metric(f"correlation_{one}_{other}", statistics, value, label=label, of_experts=True)
