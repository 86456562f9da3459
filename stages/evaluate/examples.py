"""What the kinds of evaluation share: ids, checked look-up of responses, closed-set labels.

An example's id is its data set's name and its row's id, so that examples of several data sets never
meet; a bootstrap cluster is named the same way.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from stages.data.templates import TEMPLATES, Template
from stages.errors import StageFailed
from stages.evaluate.base import Metric, Request, Response


def qualified(dataset: str, values: pd.Series) -> list[str]:
    """Ids or documents of one data set, made unique over all data sets."""
    return [f"{dataset}/{value}" for value in values]


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
    broken = [r.id for r in found if np.isnan(r.logprobs).any()]
    if broken:
        raise StageFailed(
            f"the model gave no number as log-probability in {len(broken)} of {len(ids)} "
            f"responses, the first {broken[0]!r}: its weights have diverged, lower the recipe's "
            "learning_rate"
        )
    return found


def label_requests(template: Template, ids: list[str], texts: Iterable[str]) -> list[Request]:
    """One request per text: which of the template's label words follows the prompt."""
    choices = tuple(template.labels.values())
    return [
        Request(id, template.render(text), choices) for id, text in zip(ids, texts, strict=True)
    ]


def predicted_labels(template: Template, responses: list[Response]) -> list[str]:
    """The label whose word is the most probable of the closed set; the first one wins a tie."""
    labels = list(template.labels)
    return [labels[int(np.argmax(r.logprobs))] for r in responses]


def check_labels(dataset: str, labels: pd.Series, name: str) -> None:
    """Raise StageFailed if a data set has a label for which the template has no word."""
    unknown = sorted(set(labels) - set(TEMPLATES[name].labels))
    if unknown:
        raise StageFailed(
            f"data set {dataset!r} has the label {unknown[0]!r}, which template {name!r} lacks "
            f"({', '.join(TEMPLATES[name].labels)}): map it with the data set's `labels`"
        )


def mean_where(
    column: str, name: str, where: str, among: Sequence[str], **fields: object
) -> Metric:
    """The mean of a score column over the rows whose column ``where`` holds one of ``among``."""

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        counted = scores[where].isin(among).to_numpy()
        values = np.where(counted, scores[column].to_numpy(dtype=float), 0.0)
        return np.stack([values, counted.astype(float)], axis=1)

    return Metric(name, statistics, _ratio, column=column, **fields)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def difference(
    name: str,
    minuend: list[Metric],
    subtrahend: list[Metric],
    **fields: object,
) -> Metric:
    """Unweighted mean of some means minus that of others, each an ``(x, 1)`` metric."""
    parts = [*minuend, *subtrahend]

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        return np.concatenate([part.statistics(scores) for part in parts], axis=1)

    def value(sums: np.ndarray) -> np.ndarray:
        means = _ratio(sums.reshape(*sums.shape[:-1], len(parts), 2))
        first, second = means[..., : len(minuend)], means[..., len(minuend) :]
        return first.mean(axis=-1) - second.mean(axis=-1)

    return Metric(name, statistics, value, **fields)
