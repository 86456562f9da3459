"""Evaluations of one model: a sweep file's definitions, without its pairs."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pipeline.checks import unable
from pipeline.sweep import Model, Sweep
from pipeline.sweep_file import load, nearest
from stages.errors import BadInput
from stages.evaluate.techniques import Contrastive


class Single(NamedTuple):
    """What is to be evaluated of one model."""

    sweep: Sweep
    """The sweep file cut down to it, without pairs; it has the model's name."""
    left_out: dict[str, str]
    """Evaluations of the sweep file that the model cannot do, with the reason."""

    def lines(self) -> list[str]:
        """What a person reads of the evaluations that are left out."""
        return [f"left out  {name}: {reason}" for name, reason in self.left_out.items()]


def single_model(options: argparse.Namespace) -> Single:
    """The sweep cut down to the model and evaluations of the command line.

    Of `all` evaluations those are left out that the model cannot do. Raises BadInput for unknown
    names and where nothing is left.
    """
    sweep = load(options.sweep, options.set)
    everything = options.evaluations == "all"
    wanted = list(sweep.evaluations) if everything else options.evaluations.split(",")
    for name in wanted:
        if name not in sweep.evaluations:
            raise BadInput(f"--evaluations {name}: not in {options.sweep}"
                           f"{nearest(name, list(sweep.evaluations))}")
    cut = _cut(sweep, options.model, wanted)
    if not everything:
        return Single(cut, {})
    found = Single(cut, unable(cut, options.sweep))
    left = [name for name in wanted if name not in found.left_out]
    if not left:
        raise BadInput("\n".join([
            f"--evaluations all: {options.model} can do none of those of {options.sweep}; name "
            "another sweep", *found.lines()]))
    return found._replace(sweep=_cut(sweep, options.model, left))


def _cut(sweep: Sweep, source: str, evaluations: Iterable[str]) -> Sweep:
    """The sweep with one model and some of its evaluations."""
    model = source.rstrip("/")
    # A revision may hold slashes, as refs/pr/1 does.
    revised = re.fullmatch(r"(?:hub:)?[\w.-]+/([\w.-]+@[\w./-]+)", model)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", revised[1] if revised else model.split("/")[-1])
    name = name.strip("-.")
    kept = {n: sweep.evaluations[n] for n in evaluations}
    # An amateur or a surrogate, or what it is made of, may be any model of the sweep.
    others = sweep.models if any(
        isinstance(each.technique, Contrastive) or each.surrogates() for each in kept.values()
    ) else {}
    given = Model(source=_source(source))
    while others.get(name, given) != given:  # one that is held beside it keeps its name
        name += "-evaluated"
    return sweep.model_copy(update={
        "name": name,
        "models": others | {name: given},
        "pairs": (),
        "recipes": {},
        "untuned": True,
        # The same rows as in the sweep, though nothing is trained here.
        "trained_on": tuple(sweep.trained),
        "evaluations": kept,
        "hypotheses": None,  # they are about pairs
    })


def _source(model: str) -> str:
    if model.startswith(("pack:", "hub:", "file:", "tiny:")):
        return model
    if Path(model).is_dir():
        return f"file:{Path(model).resolve()}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model):
        return f"hub:{model}" if "@" in model else f"hub:{model}@main"
    raise BadInput(f"MODEL {model}: neither a folder here nor OWNER/NAME of a hub; "
                   "give one of them, or pack:NAME")
