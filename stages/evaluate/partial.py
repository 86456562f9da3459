"""An evaluation some of whose data sets or judges cannot be had.

It is made on the others, and only metrics that read none of the missing ones are numbers: a mean
over fewer data sets than the evaluation names would pass for the mean over all.
"""

from collections.abc import Collection

from stages.evaluate.base import Evaluation, Metric


def without(
    evaluation: Evaluation, missing: Collection[str], judges: Collection[str] = ()
) -> Evaluation | None:
    """The evaluation on its other data sets and by its other ``judges``; None where it cannot be
    made on fewer data sets."""
    declared, kept = {}, {}
    for name in type(evaluation).model_fields:
        value = getattr(evaluation, name)
        if isinstance(value, tuple) and any(item in missing for item in value):
            declared[name] = value
            kept[name] = tuple(item for item in value if item not in missing)
    whole = all(kept.values())
    if judges:
        declared["judges"] = tuple(judge.model_dump(mode="json") for judge in evaluation.judges)
        kept["judges"] = tuple(j for j in evaluation.judges if j.name not in judges)
    # What an earlier run left out stays declared as the sweep has it.
    rest = evaluation.model_copy(update=kept | {"declared": declared | evaluation.declared})
    # A data set that a plain field names, such as the one in distribution or that of the shots, is
    # still among them.
    needed = {dataset for dataset, _ in rest.sources().values()}
    return rest if whole and needed.isdisjoint(missing) else None


def left_out(evaluation: Evaluation) -> tuple[str, ...]:
    """The data sets that an evaluation is made without."""
    there = evaluation.datasets()
    return tuple(name for name in _whole(evaluation).datasets() if name not in there)


def unasked(evaluation: Evaluation) -> tuple[str, ...]:
    """The judges that an evaluation is made without."""
    there = evaluation.judge_models()
    return tuple(name for name in _whole(evaluation).judge_models() if name not in there)


def reads(metric: Metric, evaluation: Evaluation) -> set[str]:
    """The data sets that a metric of a whole evaluation is computed from.

    Those that it declares; else the one that its name has after its only slash ("accuracy/hotels");
    else all of the evaluation.
    """
    if metric.datasets is not None:
        return set(metric.datasets)
    every = set(evaluation.datasets())
    _, *rest = metric.name.split("/")
    return set(rest) if len(rest) == 1 and rest[0] in every else every


def complete(evaluation: Evaluation) -> list[Metric]:
    """The metrics that have a number and read no data set and no judge that was left out."""
    whole, missing, judges = _whole(evaluation), set(left_out(evaluation)), unasked(evaluation)
    return [
        m
        for m in whole.metrics()
        if not m.gap and m.judge not in judges and missing.isdisjoint(reads(m, whole))
    ]


def _whole(evaluation: Evaluation) -> Evaluation:
    """The evaluation as the sweep has it."""
    if not evaluation.declared:
        return evaluation
    fields = evaluation.model_dump() | evaluation.declared | {"declared": {}}
    return type(evaluation).model_validate(fields)
