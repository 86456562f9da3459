"""Evaluations of one model: a sweep file's definitions, without its pairs."""

import argparse
import re
from pathlib import Path

from pipeline.sweep import Model, Sweep
from pipeline.sweep_file import load, nearest
from stages.errors import BadInput
from stages.evaluate.techniques import Contrastive


def single_model(options: argparse.Namespace) -> tuple[Sweep, str]:
    """The sweep cut down to the model and evaluations of the command line, and the model's name."""
    sweep = load(options.sweep, options.set)
    wanted = list(sweep.evaluations) if options.evaluations == "all" else (
        options.evaluations.split(","))
    for name in wanted:
        if name not in sweep.evaluations:
            raise BadInput(f"--evaluations {name}: not in {options.sweep}"
                           f"{nearest(name, list(sweep.evaluations))}")
    model = options.model.rstrip("/")
    # A revision may hold slashes, as refs/pr/1 does.
    revised = re.fullmatch(r"(?:hub:)?[\w.-]+/([\w.-]+@[\w./-]+)", model)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", revised[1] if revised else model.split("/")[-1])
    name = name.strip("-.")
    # An amateur or a surrogate, or what it is made of, may be any model of the sweep.
    others = sweep.models if any(
        isinstance(sweep.evaluations[n].technique, Contrastive) or sweep.evaluations[n].surrogates()
        for n in wanted) else {}
    cut = sweep.model_copy(update={
        "name": name,
        "models": others | {name: Model(source=_source(options.model))},
        "pairs": (),
        "recipes": {},
        # The same rows as in the sweep, though nothing is trained here.
        "trained_on": tuple(sweep.trained),
        "evaluations": {n: sweep.evaluations[n] for n in wanted},
    })
    return cut, name


def _source(model: str) -> str:
    if model.startswith(("pack:", "hub:", "file:", "tiny:")):
        return model
    if Path(model).is_dir():
        return f"file:{Path(model).resolve()}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model):
        return f"hub:{model}" if "@" in model else f"hub:{model}@main"
    raise BadInput(f"MODEL {model}: neither a folder here nor OWNER/NAME of a hub; "
                   "give one of them, or pack:NAME")
