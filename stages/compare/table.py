"""How numbers and verdicts are written, and the comparison as plain text for a terminal."""

import textwrap
from collections.abc import Iterator

import pandas as pd
from scipy import stats

from stages.compare.spec import UNTUNED
from stages.statistics import CONFIDENCE

GAP = "—"
VERDICTS_FILE = "hypotheses.parquet"
FEW_SEEDS = 5
"""Below so many training seeds the spread between runs is itself poorly known, and intervals are
the wider for it: Student's t of 95 % is 12.7 with two seeds, 4.3 with three, 2.8 with five."""
AXIS_TITLES = {
    "safety": "Safety",
    "truthfulness": "Truthfulness",
    "adversarial": "Adversarial robustness",
    "out_of_distribution": "Out of distribution",
    "language_modelling": "Language modelling",
    "capability": "Capability",
}
_WIDTHS = (28, 20, 20, 23, 8, 6)
"""Columns of the text table; with their separators 110 characters."""
_WIDTH = sum(_WIDTHS) + len(_WIDTHS) - 1


def number(value: float, signed: bool = False) -> str:
    """Three decimals and a true minus sign; a dash for no number."""
    if pd.isna(value):
        return GAP
    return (f"{value:+.3f}" if signed else f"{value:.3f}").replace("-", "−")


def interval(low: float, high: float, signed: bool = False) -> str:
    """``[low, high]``, or nothing where there is none."""
    return "" if pd.isna(low) else f"[{number(low, signed)}, {number(high, signed)}]"


def p_value(value: float) -> str:
    """Three decimals, and never a zero."""
    if pd.isna(value):
        return GAP
    return "<0.001" if value < 0.0005 else f"{value:.3f}"


def count(of: int) -> str:
    """A number of parameters or operations: 182M, 1.3B, 12,345."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if of >= size:
            return f"{of / size:.{0 if of >= 99.95 * size else 1}f}{unit}"
    return f"{of:,}"


def few_seeds(seeds: int) -> str:
    """What few training seeds do to intervals and tests."""
    known = "one degree" if seeds == 2 else f"{seeds - 1} degrees"
    reach = stats.t(seeds - 1).ppf((1 + CONFIDENCE) / 2)
    return (
        f"what runs differ by is known from {known} of freedom, and intervals and tests allow for "
        f"it (Student's t: {reach:.1f} standard errors of the seeds to either side)"
    )


def direction(row: pd.Series) -> str:
    """The arrow that says which way is better."""
    return "↑" if row["higher_is_better"] else "↓"


def scales(rows: pd.DataFrame) -> pd.Series:
    """Which rows are drawn to one scale: all metrics that are shares, and each other by itself."""
    levels = rows[[c for c in ("moe", "dense", "tuned", "untuned") if c in rows]].abs().max(axis=1)
    names = rows["evaluation"] + "/" + rows["metric"]
    return names.where(levels.groupby(names).transform("max") > 1, "")


def recipe_title(recipe: str) -> str:
    """How a recipe is called in tables."""
    return "untuned" if recipe == UNTUNED else recipe


def verdict(row: pd.Series, better: str = "MoE better", worse: str = "dense better") -> str:
    """What a primary row shows at the 5 % level after Holm's correction."""
    if pd.isna(row["difference"]):
        return "no result"
    if pd.isna(row["p_holm"]) or row["p_holm"] >= 1 - CONFIDENCE:
        return "no difference shown"
    return better if (row["difference"] > 0) == row["higher_is_better"] else worse


def footnotes(table: pd.DataFrame) -> dict[str, str]:
    """Marker to text, for what a row's numbers cannot say themselves; markers are 1, 2, …"""
    texts = dict.fromkeys(note for _, row in table.iterrows() for note in row_notes(row))
    return {str(index): text for index, text in enumerate(texts, 1)}


def row_notes(row: pd.Series) -> list[str]:
    """The notes of one row: gaps, and differences that no example showed."""
    notes = []
    if row["gap"]:
        over = f" Computed over seed(s) {row['seeds']} only." if row["seeds"] else ""
        if row["n"] and row["recipe"] != UNTUNED and "," not in row["seeds"]:
            over += " One seed does not tell what another training would have given."
        notes.append(f"{row['gap']}.{over}")
    if row["caution"]:
        notes.append(f"{row['caution']}.")
    if row["identical"]:
        notes.append(
            "Both score the same on every document. Resampling cannot give an interval then; the "
            "one shown bounds the share of documents on which they may differ (rule of three, "
            "about 3 / documents)."
            if pd.notna(row["ci_low"])
            else "Both score the same on every document; resampling cannot give an interval then."
        )
    return notes


def render_text(comparison: pd.DataFrame) -> str:
    """The primary rows as text of at most 110 columns."""
    primary = comparison[comparison["primary"]]
    notes = {text: marker for marker, text in footnotes(primary).items()}
    lines = []
    for pair, rows in primary.groupby("pair", sort=False):
        lines += _pair_lines(pair, rows, notes)
        lines.append("")
    closing = [f"({marker}) {text}" for text, marker in notes.items()]
    closing.append(
        "Brackets: 95 % intervals. p: paired test, Holm-corrected over all rows. "
        "↑ higher is better, ↓ lower is. ● MoE better, ◆ dense better."
    )
    seeds = {len(s.split(",")) for s in primary.loc[primary["recipe"] != UNTUNED, "seeds"] if s}
    if seeds == {1}:
        closing.append("One training seed: the intervals cover the test examples, not another run.")
    lines += [line for text in closing for line in textwrap.wrap(text, _WIDTH)]
    return "\n".join(lines)


def render_verdicts(verdicts: pd.DataFrame) -> str:
    """The verdicts on hypotheses, a line each, as text of at most 110 columns."""
    lines = ["Verdicts at the scale of this sweep (p: Holm-corrected over the hypotheses tested)"]
    several = verdicts["recipe"].nunique() > 1
    for _, row in verdicts.drop_duplicates(["recipe", "hypothesis"]).iterrows():
        p = "" if pd.isna(row["p_holm"]) else f" (p {p_value(row['p_holm'])})"
        recipe = f"{recipe_title(row['recipe'])} " if several else ""
        mark = "; see its caution in the report" if row["caution"] else ""
        why = f": {row['reason']}" if row["reason"] else ""
        text = f"{recipe}{row['hypothesis']} {row['verdict']}{p}. {row['title']}{why}{mark}"
        lines += textwrap.wrap(text, _WIDTH - 2, initial_indent="  ", subsequent_indent="     ")
    return "\n".join(lines)


def _pair_lines(pair: str, rows: pd.DataFrame, notes: dict[str, str]) -> Iterator[str]:
    rule = "─" * _WIDTH
    yield _cells((pair, "MoE", "dense", "MoE − dense", "p (Holm)", "n"))
    for axis, of_axis in rows.groupby("axis", sort=False):
        yield rule
        yield AXIS_TITLES[axis]
        for (evaluation, label), each in of_axis.groupby(["evaluation", "label"], sort=False):
            yield f"  {evaluation} · {label} {direction(each.iloc[0])}"
            for _, row in each.iterrows():
                marks = "".join(f" ({notes[note]})" for note in row_notes(row))
                better = {"MoE better": " ●", "dense better": " ◆"}.get(verdict(row), "")
                yield _cells(
                    (
                        f"    {recipe_title(row['recipe'])}{marks}{better}",
                        _level(row, "moe"),
                        _level(row, "dense"),
                        f"{number(row['difference'], True)} "
                        f"{interval(row['ci_low'], row['ci_high'], True)}",
                        p_value(row["p_holm"]),
                        str(row["n"]) if row["n"] else GAP,
                    )
                )
    yield rule


def _level(row: pd.Series, name: str) -> str:
    return f"{number(row[name])} {interval(row[f'{name}_ci_low'], row[f'{name}_ci_high'])}"


def _cells(texts: tuple[str, ...]) -> str:
    first, *rest = texts
    width = _WIDTHS[0]
    first = first if len(first) <= width else first[: width - 1] + "…"
    cells = [first.ljust(width)]
    cells += [text.strip().rjust(w) for text, w in zip(rest, _WIDTHS[1:], strict=True)]
    return " ".join(cells).rstrip()
