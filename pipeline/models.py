"""What each architecture supports, from the registry alone."""

from stages.models.dense import DENSE
from stages.models.families import FAMILIES
from stages.models.tiny_shapes import TINY
from stages.models.unsupported import NO_FAMILY

_COLUMNS = (
    *("family", "evaluate", "train", "experts spread", "own balancing loss", "upcycled", "tiny:"),
)


def model_lines() -> list[str]:
    """A table of the architectures, Mixture-of-Experts first, and why what is refused is.

    A recipe can train with a balancing loss in every family, also where the model has none.
    """
    twins = {name for d in DENSE.values() for name in (d.sparse, d.mixed) if name}
    rows, reasons = [_COLUMNS], []
    moe = sorted(name for name, entry in FAMILIES.items() if entry.is_moe)
    for entry in map(FAMILIES.get, [*moe, *sorted(FAMILIES.keys() - moe)]):
        name = entry.model_type
        refused = {
            "evaluate": entry.no_evaluation,
            "train": entry.no_training,
            "experts spread": entry.no_expert_parallel,
        }
        for what, why in refused.items():
            if why:
                reasons.append(f"{name}: no {what}: {why}")
        rows.append((
            name,
            _mark(not entry.no_evaluation),
            _mark(not entry.no_training),
            _mark(not entry.no_expert_parallel) if entry.is_moe else "",
            _mark(bool(entry.auxiliary_loss)) if entry.is_moe else "",
            "into one" if name in twins else "from it" if name in DENSE else "",
            _mark(name in TINY),
        ))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    reasons += [f"{name}: refused: {why}" for name, why in sorted(NO_FAMILY.items())]
    return [*lines[: len(moe) + 1], "", *lines[len(moe) + 1 :], "", *reasons]


def _mark(supported: bool) -> str:
    return "✓" if supported else "·"
