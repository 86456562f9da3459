"""From a sweep with a ``search`` section to its parts: trials, winners, and the final comparison.

A trial is an ordinary part of the graph: a fine-tune for each seed and the evaluations of the
objectives, on the split ``selection``. The winners are a sweep of their own, with fresh seeds, on
the split that the sweep's evaluations name.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.asked import facts_of
from pipeline.plan import Builder, Plan, Searched
from pipeline.search.space import Space
from pipeline.search.spec import Dimension, Objective, Pbt, Search, Side
from pipeline.sweep import Dataset, Sweep
from stages.data.sources import group_of, origin
from stages.errors import BadInput
from stages.finetune.spec import Recipe

SELECTION = "selection"
SHARE = 5
"""One document in so many of an evaluation-only data set is put aside for selection."""
WINNER = "searched"
"""The recipe name of a winner; the members of a front are ``searched-1``, ``searched-2``…"""


@dataclass(frozen=True)
class Member:
    """A model of the pairs and what is searched for it."""

    model: str
    side: Side
    space: Space
    idle: tuple[str, ...]
    """Fields of the sweep's space that change nothing in this model and are left out."""


@dataclass(frozen=True)
class Measured:
    """The nodes that a trial comes down to at one point of its training, for one seed."""

    finetune: str
    evaluations: dict[str, str]
    """Evaluation name to the key of its node."""


def objective_evaluations(objectives: Sequence[Objective]) -> list[str]:
    """Names of the evaluations that the objectives read, each once."""
    return list(dict.fromkeys(
        score.partition("/")[0] for objective in objectives for score in objective.weights))


def reserve(sweep: Sweep) -> Sweep:
    """The sweep with a split ``selection`` in every data set that selects.

    Where a data set has none, a fifth of the documents of the split that is evaluated is put
    aside by the hash that makes splits; what the evaluation reports is the other four fifths. Other
    data sets with the same documents, which are cut alike (``cut_unlike`` has those that are not),
    are reported on the same four fifths.
    """
    datasets = dict(sweep.datasets)
    for dataset, split in selecting_sets(sweep).items():
        for name in (dataset, *sharing(sweep, dataset)):
            entry = datasets[name]
            if SELECTION not in entry.splits and split in entry.splits:
                datasets[name] = _put_aside(entry, split)
    return sweep.model_copy(update={"datasets": datasets, "trained_on": _trained_on(sweep)})


def _put_aside(entry: Dataset, split: str) -> Dataset:
    share, splits = entry.splits[split], dict(entry.splits)
    limits = {"rows": dict(entry.rows), "rows_per_label": dict(entry.rows_per_label)}
    splits |= {SELECTION: share / SHARE, split: share * (SHARE - 1) / SHARE}
    for limit in limits.values():
        if split in limit:
            limit[SELECTION] = -(-limit[split] // (SHARE - 1))
    return entry.model_copy(update={"splits": splits, **limits})


def selecting_sets(sweep: Sweep) -> dict[str, str]:
    """The data sets that the objectives are measured on, and the split that is evaluated."""
    search = sweep.search
    return {
        dataset: split
        for name in objective_evaluations([*search.objectives, search.intermediate])
        for dataset, split in sweep.evaluations[name].datasets().items()
    }


def sharing(sweep: Sweep, name: str) -> list[str]:
    """The other evaluated data sets that have documents of one: through a group that is declared,
    or the same source, or those of a third."""
    evaluated = dict.fromkeys(
        dataset for e in sweep.evaluations.values() for dataset, _ in e.sources().values())
    marks = {other: {origin(entry), *filter(None, [group_of(entry)])}
             for other, entry in sweep.datasets.items()}
    found, reached = [name], set(marks[name])
    while new := [n for n in sweep.datasets if n not in found and marks[n] & reached]:
        found += new
        reached.update(*(marks[n] for n in new))
    return [other for other in found[1:] if other in evaluated]


def cut_unlike(sweep: Sweep) -> Iterator[tuple[str, str, list[str]]]:
    """A data set that selects, another one with its documents, and what has to be equal in both
    for no split to tell these apart, and is not."""
    for name in selecting_sets(sweep):
        for other in sharing(sweep, name):
            one, two = sweep.datasets[name], sweep.datasets[other]
            fields = ["seed", "splits"]
            if group_of(one) is None or group_of(one) != group_of(two):
                # Documents of a group have places of their own; others have ranks, which are the
                # same among the same rows.
                fields += ["task", "format", "columns", "labels", "shared_documents",
                           "disjoint_from"]
            unequal = [f for f in fields if getattr(one, f) != getattr(two, f)]
            if "task" in fields and (name in sweep.trained) != (other in sweep.trained):
                unequal.append("use in training")  # what is trained on leaves no rows out
            if unequal:
                yield name, other, unequal


def _trained_on(sweep: Sweep) -> tuple[str, ...]:
    """Whatever any trial may train on, and not only the base recipe.

    Said once and for all, so that trials and winners see the same rows.
    """
    space = Space(sweep.recipes[sweep.search.base], sweep.search.space)
    tried = {f"probe {i}": space.recipe(values) for i, (_, values) in enumerate(space.probes())}
    every = sweep.model_copy(update={"recipes": {**sweep.recipes, **tried}})
    return tuple(every.trained)


def selecting(sweep: Sweep) -> Sweep:
    """The sweep that trials are parts of: the objectives' evaluations, on selection splits only."""
    search = sweep.search
    evaluations = {
        name: sweep.evaluations[name].model_copy(update={"split": SELECTION})
        for name in objective_evaluations([*search.objectives, search.intermediate])
    }
    recipes = {search.base: sweep.recipes[search.base]}
    return reserve(sweep).model_copy(
        update={"evaluations": evaluations, "recipes": recipes, "untuned": False})


def members(sweep: Sweep, contents: dict[str, str], folder: Path) -> list[Member]:
    """The models of the pairs, each once, with the fields of the space that act in it.

    ``folder`` is the sweep file's.
    """
    found = []
    for side in ("moe", "dense"):
        for model in dict.fromkeys(getattr(pair, side) for pair in sweep.pairs):
            own = facts_of(sweep, model, folder).top_k if side == "moe" else None
            found.append(_member(sweep, contents, model, side, own))
    return found


def _member(
    sweep: Sweep, contents: dict[str, str], model: str, side: Side, own_top_k: int | None
) -> Member:
    whole = Space(sweep.recipes[sweep.search.base], sweep.search.space, own_top_k)
    builder = Builder(sweep, contents)
    changes: dict[str, set[str]] = {}
    for index, (path, values) in enumerate(whole.probes()):
        try:
            key = builder.finetune(f"probe-{index}", model, whole.recipe(values), 0)
        except BadInput as error:
            raise BadInput(
                f"search.space.{path}: {values[path]!r} is refused for {model}: {error}") from None
        changes.setdefault(path, set()).add(builder.plan.nodes[key].fingerprint)
    idle = {path for path, fingerprints in changes.items()
            if len(fingerprints) == 1 and not _single(whole.dimensions[path])}
    acting: dict[str, Dimension] = {}
    for path, dimension in whole.dimensions.items():
        unmet = [other for other, allowed in dimension.when.items()
                 if other in idle and whole.base_value(other) not in allowed]
        if path in idle or unmet:
            idle.add(path)
            continue
        when = {other: allowed for other, allowed in dimension.when.items() if other not in idle}
        acting[path] = dimension.model_copy(update={"when": when})
    if not acting:
        raise BadInput(f"search.space: none of its fields changes anything in {model}; "
                       "search a field that acts in it, or leave the pair out")
    space = Space(sweep.recipes[sweep.search.base], acting, own_top_k)
    return Member(model, side, space, tuple(path for path in whole.dimensions if path in idle))


def _single(dimension: Dimension) -> bool:
    return dimension.values is not None and len(dimension.values) == 1


def trial_plan(
    sweep: Sweep,
    contents: dict[str, str],
    model: str,
    segments: Sequence[Recipe],
    seeds: Sequence[int],
    evaluations: Sequence[str],
    until: int | None = None,
) -> tuple[Plan, list[Measured]]:
    """The graph of one trial of a ``selecting`` sweep, and what is measured for each seed.

    Without ``until``, the chain of ``segments`` (one for a plain recipe); with it, the first
    ``until`` steps of the one recipe.
    """
    builder = Builder(sweep, contents)
    measured = []
    for seed in seeds:
        # By content, so that equal recipes meet in one folder, whichever trial asks for them, and
        # a longer chain finds its beginning.
        labels = [f"{model}-{digest(segments[:end])}-seed{seed}"
                  for end in range(1, len(segments) + 1)]
        key, label = builder.chain(labels, model, segments, seed), labels[-1]
        if until is not None:
            whole = builder.plan.nodes[key]
            label = f"{label}-step{until}"
            spec = whole.spec.model_copy(update={"until": until})
            key = builder.plan.add("finetune", label, spec, whole.inputs, whole.resources)
            builder.plan.nodes[key] = replace(builder.plan.nodes[key], part_of=whole.folder)
        scores = {name: builder.scores(label, key, model, name) for name in evaluations}
        measured.append(Measured(key, scores))
    return builder.plan, measured


def digest(segments: Sequence[Recipe]) -> str:
    """Names recipes that are trained in turn by their content."""
    text = "\n".join(segment.model_dump_json(by_alias=True) for segment in segments)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def segments_of(search: Search, recipes: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """What is trained in turn for the recipes of a trial: all of one, or population-based
    training's segments, each with its part of the steps."""
    if not isinstance(search.algorithm, Pbt):
        return tuple(recipes)
    steps = recipes[0].steps
    ends = [0, *(search.steps_at(r, steps) for r in search.resources())]

    def segment(recipe: Recipe, start: int, end: int) -> Recipe:
        """A part of the steps; what is done at the beginning of a training is done in the first."""
        warmup = recipe.warmup_steps or math.ceil(recipe.warmup_ratio * steps)
        changes = {"steps": end - start, "warmup_ratio": 0.0, "warmup_steps": warmup}
        if start:
            router = recipe.router.model_copy(update={"initial": "pretrained"})
            changes |= {"warmup_steps": 0, "router": router}
        return recipe.model_copy(update=changes)

    return tuple(segment(*part) for part in zip(recipes, ends, ends[1:], strict=False))


def final_sweep(
    sweep: Sweep, winners: dict[str, list[tuple[Recipe, ...]]]
) -> tuple[Sweep, Searched]:
    """The sweep that trains the winners of each model again, with fresh seeds, and compares them.

    Fronts are paired in the order of the first objective, as far as both models have members; what
    a longer front has besides is trained for its model alone. Where an attack on that is made on
    another model, the last member of that one's front stands in.
    """
    count = max(map(len, winners.values()))
    names = [WINNER] if count == 1 else [f"{WINNER}-{i + 1}" for i in range(count)]
    searched, recipes = {}, {}
    for index, name in enumerate(names):
        searched |= {(model, name): front[min(index, len(front) - 1)]
                     for model, front in winners.items()}
        reaching = tuple(model for model, front in winners.items() if index < len(front))
        # The plan takes a model's own; the entry here stands for the name.
        alone = {"models": reaching} if len(reaching) < len(winners) else {}
        recipes[name] = searched[reaching[0], name][-1].model_copy(update=alone)
    final = reserve(sweep).model_copy(update={
        "name": f"{sweep.name}-search", "recipes": recipes, "seeds": sweep.search.final_seeds})
    return final, searched
