"""The report as HTML that stands alone and as Markdown with the same tables.

Everything that comes from data or a model passes through Jinja's autoescape; texts of prompts and
answers are not in the report at all. Figures are inlined as data addresses, so that the file needs
no network and runs no script.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd

from stages.compare import checks, table
from stages.compare import robustness as attacked
from stages.compare.figures import COLOURS, IMPROVED, NEUTRAL, WORSENED, inline
from stages.compare.spec import UNTUNED, CompareSpec
from stages.data.card import DataCard
from stages.models.card import ModelCard
from stages.statistics import CONFIDENCE, SWAP

PALETTE = COLOURS | {"neutral": NEUTRAL, "improved": IMPROVED, "worsened": WORSENED}
_FEW_DOCUMENTS = 30
_SIZE_TOLERANCE = 0.05
"""Active parameters of a pair that differ by more than this share are pointed out."""


@dataclass(frozen=True)
class Content:
    """What a report is made of."""

    spec: CompareSpec
    comparison: pd.DataFrame
    effects: pd.DataFrame
    checks: pd.DataFrame
    """What the attacks had to show (``results.compare``)."""
    models: dict[str, ModelCard]
    """The card of each model's first checkpoint that is there."""
    data: dict[str, DataCard]
    figures: dict[str, Path]
    """Axis, or ``curves``, to its SVG file."""
    overlaps: tuple[str, ...] = ()
    """Scored texts that are trained on (``overlap.py``)."""
    robustness: attacked.Robustness | None = None
    """What attacks and probes showed, where the sweep has them."""


def write(content: Content, output: Path) -> None:
    """Write ``report.html`` and ``report.md``."""
    shown = _context(content)
    for name in ("report.html", "report.md"):
        render(name, shown, output)


def render(name: str, context: dict, output: Path) -> None:
    """Write the file that the template ``<name>.jinja`` makes of a context."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _markdown_cell
    text = environment.get_template(f"{name}.jinja").render(context)
    (output / name).write_text(text, encoding="utf-8")


def _context(content: Content) -> dict:
    spec, comparison, effects = content.spec, content.comparison, content.effects
    primary = comparison[comparison["primary"]]
    notes = table.footnotes(pd.concat([comparison, effects]))
    markers = {text: marker for marker, text in notes.items()}
    secondary = comparison[~comparison["primary"]]
    return {
        "title": spec.title,
        "headlines": _headlines(primary, spec),
        "warnings": _warnings(content),
        "pairs": [
            {
                "name": pair.name,
                "moe": pair.moe,
                "dense": pair.dense,
                "sizes": _sizes(pair.moe, pair.dense, content.models),
                "axes": _axes(primary[primary["pair"] == pair.name], markers, "moe", "dense"),
                "secondary": _axes(
                    secondary[secondary["pair"] == pair.name], markers, "moe", "dense"
                ),
            }
            for pair in spec.pairs
        ],
        "effects": {
            name: _axes(effects[effects["primary"] == chosen], markers, "tuned", "untuned")
            for name, chosen in (("axes", True), ("secondary", False))
        }
        if len(effects)
        else None,
        "notes": notes,
        "checks": checks.context(content.checks),
        "models": [_model(name, content) for name in spec.models],
        "data": [_data(name, card) for name, card in content.data.items()],
        "figures": {
            name: {
                "title": table.AXIS_TITLES.get(name, "Training curves"),
                "file": f"figures/{file.name}",
                "inline": inline(file),
            }
            for name, file in content.figures.items()
        },
        "axis_titles": table.AXIS_TITLES,
        "robustness": attacked.context(content.robustness, spec, content.models)
        if content.robustness
        else None,
        "resamples": f"{spec.resamples:,}",
        "tests": len(primary["p_holm"].dropna()),
        "several_seeds": len(spec.seeds) > 1,
        "colours": PALETTE,
    }


def _headlines(primary: pd.DataFrame, spec: CompareSpec) -> list[dict]:
    """How often the MoE was better, the dense model was, or neither was shown to be, by recipe that
    both models of a pair have."""
    found = []
    for recipe in [name for name in spec.recipes if (primary["recipe"] == name).any()]:
        verdicts = primary[primary["recipe"] == recipe].apply(table.verdict, axis=1)
        counts = {
            verdict: int((verdicts == verdict).sum())
            for verdict in ("MoE better", "dense better", "no difference shown", "no result")
        }
        found.append({"recipe": table.recipe_title(recipe), "counts": counts})
    return found


def _warnings(content: Content) -> list[str]:
    """What limits the conclusions, for the whole report."""
    spec, comparison = content.spec, content.comparison
    primary = comparison[comparison["primary"]]
    warnings = [*spec.notes]
    gaps = primary[primary["gap"] != ""]
    if len(gaps):
        warnings.append(
            f"{len(gaps)} of {len(primary)} comparisons lack a result or a seed; the notes under "
            "the tables say why. Nothing was averaged over what is missing."
        )
    warnings += content.overlaps
    if set(spec.recipes) != {UNTUNED}:
        if len(spec.seeds) == 1:
            warnings.append(
                f"Each model was trained once (seed {spec.seeds[0]}). Intervals and p-values cover "
                "the choice of test examples, not what another training run would have given."
            )
        elif len(spec.seeds) < table.FEW_SEEDS:
            warnings.append(
                f"{len(spec.seeds)} training seeds leave much undecided: "
                f"{table.few_seeds(len(spec.seeds))}. What is not shown may be there all the same; "
                "the column Detectable says from what size on it would have been found."
            )
    tests = len(primary["p_holm"].dropna())
    needed = round(tests / (1 - CONFIDENCE))
    if spec.resamples < needed and (primary["test"] == SWAP).any():
        warnings.append(
            f"{spec.resamples} resamples are too few for {tests} comparisons: a p-value that comes "
            "from random draws cannot get below 5 % after the correction. Set "
            f"statistics.resamples to more than {needed}."
        )
    clustered = primary[primary["documents"] < primary["n"]].drop_duplicates("evaluation")
    for _, row in clustered.iterrows():
        warnings.append(
            f"{row['evaluation']}: {row['n']} examples come from {row['documents']} documents; "
            "documents, not examples, are resampled and swapped."
        )
    small = primary[primary["documents"].between(1, _FEW_DOCUMENTS - 1)]
    if len(small):
        names = ", ".join(dict.fromkeys(small["evaluation"]))
        warnings.append(
            f"{names}: fewer than {_FEW_DOCUMENTS} documents, bootstrap intervals are approximate."
        )
    for pair in spec.pairs:
        moe, dense = content.models.get(pair.moe), content.models.get(pair.dense)
        if moe is None or dense is None:
            continue
        ratio = moe.active_parameters / dense.active_parameters
        if abs(ratio - 1) > _SIZE_TOLERANCE:
            warnings.append(
                f"{pair.name}: the MoE uses {ratio:.2f} times the active parameters of its dense "
                "partner, so a difference may come from size rather than from routing."
            )
        warnings += _unlike(pair.name, moe, dense)
    return warnings


def _unlike(name: str, moe: ModelCard, dense: ModelCard) -> Iterator[str]:
    """What a pair's difference may come from besides routing and size."""
    first, second = (card.notes.get("chat_template") for card in (moe, dense))
    if {first, second} == {"yes", "no"}:
        which = "the MoE" if first == "yes" else "the dense partner"
        yield (
            f"{name}: only {which} has a chat template, so probably one of the two is tuned to "
            "follow instructions and the other is a base model."
        )
    roots = {_root(moe.origin), _root(dense.origin)}
    if len(roots) == 2 and all(root.startswith(("hub:", "file:", "pack:")) for root in roots):
        yield (
            f"{name}: neither is made from the other, and what they were first trained on may "
            "differ; a difference may come from data rather than from routing."
        )


def _root(origin: str) -> str:
    """The source of which a model was made, from its card's line."""
    whole = origin.rpartition(" from: ")[2]  # fine-tuned
    _, twin, source = whole.partition(" from ")  # upcycled, widened
    return source.partition(": ")[0] if twin else whole


def _axes(rows: pd.DataFrame, markers: dict[str, str], first: str, second: str) -> list[dict]:
    """Rows for the templates: axes, in them metrics, in them one line per recipe."""
    ends = rows[["ci_low", "ci_high"]].abs().max(axis=1)
    reach = ends.groupby(table.scales(rows)).transform("max")
    axes = []
    for axis, of_axis in rows.groupby("axis", sort=False):
        metrics = []
        keys = ["evaluation", "metric"]
        for (evaluation, _), each in of_axis.groupby(keys, sort=False):
            head = each.iloc[0]
            metrics.append(
                {
                    "evaluation": evaluation,
                    "label": head["label"],
                    "direction": table.direction(head),
                    "lines": [
                        _line(row, markers, first, second, reach[index])
                        for index, row in each.iterrows()
                    ],
                }
            )
        axes.append({"title": table.AXIS_TITLES[axis], "metrics": metrics})
    return axes


def _line(row: pd.Series, markers: dict[str, str], first: str, second: str, reach: float) -> dict:
    words = ("MoE better", "dense better") if first == "moe" else ("improved", "worsened")
    verdict = table.verdict(row, *words) if row["primary"] else ""
    tone = verdict.split()[0] if verdict in words else "neutral"
    levels = {
        name: {
            "value": table.number(row[side]),
            "interval": table.interval(row[f"{side}_ci_low"], row[f"{side}_ci_high"]),
        }
        for name, side in (("first", first), ("second", second))
    }
    return levels | {
        "name": table.recipe_title(row["recipe"])
        if first == "moe"
        else f"{row['model']} · {row['recipe']}",
        "difference": table.number(row["difference"], signed=True),
        "interval": table.interval(row["ci_low"], row["ci_high"], signed=True),
        "p": table.p_value(row["p_holm"] if row["primary"] else row["p_value"]),
        "n": f"{row['n']:,}" if row["n"] else table.GAP,
        "documents": f"{row['documents']:,}" if row["documents"] < row["n"] else "",
        "detectable": table.number(row["minimum_detectable"]),
        "test": row["test"],
        "verdict": verdict,
        "tone": tone,
        "notes": [markers[note] for note in table.row_notes(row)],
        "plot": _plot(row, reach),
    }


def _plot(row: pd.Series, reach: float) -> dict | None:
    """Positions in percent of a small interval plot, turned so that right is better."""
    if pd.isna(row["ci_low"]) or pd.isna(row["difference"]):
        return None
    sign = 1 if row["higher_is_better"] else -1
    low, middle, high = (
        50 + 48 * sign * row[name] / reach for name in ("ci_low", "difference", "ci_high")
    )
    return {"low": min(low, high), "middle": middle, "high": max(low, high)}


def _sizes(moe: str, dense: str, cards: dict[str, ModelCard]) -> str:
    if moe not in cards or dense not in cards:
        return ""
    first, second = cards[moe], cards[dense]
    active, flops = (
        [table.count(getattr(card, field)) for card in (first, second)]
        for field in ("active_parameters", "flops_per_token")
    )
    return (
        f"{active[0]} of {table.count(first.total_parameters)} parameters active per token against "
        f"{active[1]}; {flops[0]} against {flops[1]} FLOPs per token"
    )


def _model(name: str, content: Content) -> dict:
    spec, card = content.spec, content.models.get(name)
    partners = [p.dense for p in spec.pairs if p.moe == name]
    partners += [p.moe for p in spec.pairs if p.dense == name]
    shown = {"name": name, "partners": ", ".join(dict.fromkeys(partners)), "card": card is not None}
    if card is None:
        return shown
    experts = f"{card.experts}, top-{card.top_k}, in {len(card.moe_layers)} of {card.layers} layers"
    return shown | {
        "architecture": {"moe": "MoE", "dense": "dense"}[card.architecture],
        "family": card.family,
        "total": table.count(card.total_parameters),
        "active": table.count(card.active_parameters),
        "flops": table.count(card.flops_per_token),
        "experts": experts if card.experts else table.GAP,
        "origin": card.origin,
        "notes": "; ".join(
            f"{key.replace('_', ' ')} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in card.notes.items()
        ),
    }


def _data(name: str, card: DataCard) -> dict:
    return {
        "name": name,
        "task": card.task.replace("_", " "),
        "source": f"{card.source}; {card.citation}" if card.citation else card.source,
        "licence": f"{card.licence}; {card.note}" if card.note else card.licence,
        "dropped": ", ".join(f"{rows:,} {why}" for why, rows in card.dropped.items() if rows),
        "splits": [
            {
                "name": split,
                "rows": f"{rows:,}",
                "documents": f"{card.documents[split]:,}",
                "digest": card.digest[split][:12],
            }
            for split, rows in card.rows.items()
        ],
    }


def _markdown_cell(text: object) -> str:
    """A text that cannot break out of a Markdown table cell or bring in HTML."""
    flat = " ".join(str(text).split())
    for sign, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("[", "\\["), ("`", "'")):
        flat = flat.replace(sign, safe)
    return flat
