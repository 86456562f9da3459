"""What of a search is refused before Ray starts; imports no torch, Ray or Optuna."""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.asked import facts_of
from pipeline.checks import check, check_plan, check_recipes
from pipeline.plan import build
from pipeline.search.plan import SELECTION, cut_unlike, selecting
from pipeline.search.space import Space
from pipeline.search.spec import (
    OPTUNA,
    STOPPING,
    Asha,
    Grid,
    Hyperband,
    Nsga2,
    Objective,
    Pbt,
    Random,
    Search,
)
from pipeline.sweep import Sweep
from pipeline.sweep_file import nearest
from stages.errors import BadInput
from stages.evaluate.base import Metric
from stages.finetune.spec import Recipe

_NARROW = "narrow the space, or set the fields that go together in one choice"


def check_search(sweep: Sweep, path: Path) -> dict[str, str]:
    """Refuse a search that cannot work; returns the digests that ``checks.check`` returns.

    Raises BadInput with one line per problem.
    """
    if sweep.search is None:
        raise BadInput(f"{path}: search: is missing; say what is searched, as sweeps/search.yaml "
                       "does, or use `moe-reliability run`")
    problems = [f"{path}: {problem}" for problem in dict.fromkeys(_problems(sweep))]
    if problems:
        raise BadInput("\n".join(problems))
    contents = check(sweep, path)
    problems = [f"{path}: {problem}" for problem in _apart(sweep)]
    if problems:
        raise BadInput("\n".join(problems))
    # What is drawn has to pass what every recipe of a sweep passes; plans and data sets are tried
    # with the ends of the space alone.
    base = sweep.search.base
    ends: dict[str, Recipe] = {}
    for models, space in _spaces(sweep, path.resolve().parent):
        known = {f"search.space{label}": (recipe.model_copy(update={"models": models}), remedy)
                 for label, recipe, remedy in _known(sweep.search, space)}
        recipes = {label: recipe for label, (recipe, _) in known.items()}
        tried = sweep.model_copy(update={"recipes": sweep.recipes | recipes})
        for label, problem in check_recipes(tried, path):
            if label in known:
                raise BadInput(f"{path}: {label} is refused: {problem}{known[label][1]}")
        for field, values in space.probes():
            recipe = space.recipe(values).model_copy(update={"models": models})
            ends[f"{base}({field}={values[field]!r}, {', '.join(models)})"] = recipe
    trials = selecting(sweep).model_copy(update={"recipes": {base: sweep.recipes[base]} | ends})
    contents |= check(trials, path)
    check_plan(build(trials, contents), path)
    return contents


def _spaces(sweep: Sweep, folder: Path) -> Iterator[tuple[tuple[str, ...], Space]]:
    """The space as it is for the models of pairs whose Mixture-of-Experts models have the same
    number of experts per token: the number itself means there that none is set."""
    alike: dict[int | None, dict[str, None]] = {}
    for pair in sweep.pairs:
        own = facts_of(sweep, pair.moe, folder).top_k
        alike.setdefault(own, {}).update(dict.fromkeys((pair.moe, pair.dense)))
    for own, models in alike.items():
        yield tuple(models), Space(sweep.recipes[sweep.search.base], sweep.search.space, own)


def _known(search: Search, space: Space) -> Iterator[tuple[str, Recipe, str]]:
    """Recipes that are known to be drawn, or may be: label, recipe and remedy."""
    for field, values in space.drawable():
        bounds = space.dimensions[field].bounds
        remedy = "; or list the values that work as a choice" if bounds else ""
        yield f".{field}: {values[field]!r}", space.recipe(values), remedy
    for number, values in enumerate(_draws(search, space)):
        shown = ", ".join(f"{path}={value!r}" for path, value in values.items())
        yield f": trial {number} ({shown})", space.recipe(values), f"; {_NARROW}"


def maximized(sweep: Sweep, objective: Objective) -> bool:
    """Whether more of an objective is better."""
    if objective.direction is not None:
        return objective.direction == "maximize"
    if isinstance(objective.score, str):
        return _metric(sweep, objective.score).higher_is_better
    return True


def _metric(sweep: Sweep, score: str) -> Metric:
    evaluation, _, name = score.partition("/")
    return next(m for m in sweep.evaluations[evaluation].metrics() if m.name == name)


def _probes(sweep: Sweep) -> Iterator[tuple[tuple[str, dict], Recipe | str]]:
    """Each end of the space, with its recipe or the reason why there is none."""
    space = Space(sweep.recipes[sweep.search.base], sweep.search.space)
    for field, values in space.probes():
        try:
            yield (field, values), space.recipe(values)
        except BadInput as error:
            yield (field, values), str(error)


def _problems(sweep: Sweep) -> Iterator[str]:
    search = sweep.search
    if search.base not in sweep.recipes:
        yield f"search.base: unknown recipe {search.base!r}{nearest(search.base, [*sweep.recipes])}"
        return
    if sweep.recipes[search.base].after:
        yield (f"search.base: {search.base} comes after another recipe, and a search starts from "
               "the models as they are; choose another base")
    if sweep.recipes[search.base].models or "models" in search.space:
        yield (f"search.base: a search is for both models of each pair; remove models from "
               f"recipes.{search.base} and from the space")
        return
    try:
        space = Space(sweep.recipes[search.base], search.space)
    except BadInput as error:
        yield from (f"search.space.{line}" for line in str(error).splitlines())
        return
    refused = False
    for (field, values), recipe in _probes(sweep):
        if isinstance(recipe, str):
            refused = True
            yield f"search.space.{field}: {values[field]!r} is refused: {recipe}"
    if refused:
        return
    yield from _reported(sweep)
    yield from _objectives(sweep)
    yield from _algorithm(search, space)
    yield from _steps(search, space)
    yield from _contradictory(search, space)


def _reported(sweep: Sweep) -> Iterator[str]:
    """Evaluations that would report the winners on the rows that chose them."""
    for name, evaluation in sweep.evaluations.items():
        if SELECTION in evaluation.datasets().values():
            yield (f"evaluations.{name}.split: {SELECTION} chooses the recipes, and a score on it "
                   "flatters the winners; name the split that is reported (test)")


def _apart(sweep: Sweep) -> Iterator[str]:
    """Data sets that would report documents which another one's ``selection`` has."""
    for name, other, unequal in cut_unlike(sweep):
        yield (f"datasets.{other}: has documents of {name}, some of which choose the recipes, and "
               f"is cut in another way; give both the same {' and '.join(unequal)}, or evaluate "
               "one data set under one name")


def _objectives(sweep: Sweep) -> Iterator[str]:
    search = sweep.search
    trained = {train.dataset for _, recipe in _probes(sweep) for train in recipe.data}
    trained |= {train.dataset for recipe in sweep.recipes.values() for train in recipe.data}
    named = [(f"search.objectives.{i}.score", o) for i, o in enumerate(search.objectives)]
    if getattr(search.algorithm, "intermediate", None) is not None:
        named.append(("search.algorithm.intermediate.score", search.algorithm.intermediate))
    for field, objective in named:
        for score in objective.weights:
            name, slash, metric = score.partition("/")
            if name not in sweep.evaluations or not slash:
                yield (f"{field}: {score!r} names no evaluation of the sweep; write "
                       f"evaluation/metric{nearest(name, list(sweep.evaluations))}")
                continue
            evaluation = sweep.evaluations[name]
            if evaluation.asks_head != (sweep.recipes[search.base].head == "classification"):
                yield (f"{field}: {name} cannot score what {search.base} trains, one asks for a "
                       "classification head and the other has none; choose another")
            known = [m.name for m in evaluation.metrics() if not m.gap]
            if metric not in known:
                yield f"{field}: {name} has no metric {metric!r}{nearest(metric, known)}"
            yield from (f"{field}: {reason}" for reason in _selects(sweep, name, trained))
    names = [objective.name for objective in search.objectives]
    if len(set(names)) < len(names):
        yield "search.objectives: names an objective twice; keep one"


def _selects(sweep: Sweep, name: str, trained: set[str]) -> Iterator[str]:
    """Why an evaluation cannot select."""
    evaluation = sweep.evaluations[name]
    if not evaluation.datasets():
        yield (f"{name} is scored on data of lm-evaluation-harness, of which nothing can be put "
               "aside for the choice; choose an evaluation of the sweep's own data sets")
    outside = {dataset for e in sweep.evaluations.values() for dataset in e.outside}
    for dataset, split in evaluation.datasets().items():
        if dataset in outside:
            yield (f"{dataset} is out of distribution and never selects; choose an evaluation on "
                   "data like that of the training")
        elif SELECTION in sweep.datasets[dataset].splits:
            continue
        elif dataset in trained:
            yield (f"{dataset} is trained on and has no split {SELECTION!r}, only its test "
                   f"examples could select; give datasets.{dataset}.splits a {SELECTION!r}")
        elif split not in sweep.datasets[dataset].splits:
            yield f"{dataset} has no split {split!r} from which to put a fifth aside; mend {name}"


def _algorithm(search: Search, space: Space) -> Iterator[str]:
    algorithm, field = search.algorithm, "search.algorithm"
    several = len(search.objectives) > 1
    if isinstance(algorithm, OPTUNA) and importlib.util.find_spec("optuna") is None:
        yield (f"{field}: {algorithm.kind} needs the package optuna, which is not installed; "
               "`pip install 'moe-reliability[search]'`, or use random")
    if several and isinstance(algorithm, Pbt):
        yield f"{field}: pbt compares trials by one objective; use nsga2, tpe or random for several"
    if several and isinstance(algorithm, STOPPING) and algorithm.intermediate is None:
        yield (f"{field}: {algorithm.kind} stops trials by one objective; name it as "
               "intermediate, or use nsga2, tpe or random")
    if not several and isinstance(algorithm, Nsga2):
        yield f"{field}: nsga2 is for several objectives; use tpe for one"
    grids = [path for path, d in space.dimensions.items() if d.grid is not None]
    others = [path for path, d in space.dimensions.items() if d.grid is None]
    combinations = len(space.combinations())
    if isinstance(algorithm, Grid) and others:
        yield (f"search.space.{others[0]}: algorithm grid takes grids alone; write its values as "
               "grid, or use random")
    elif isinstance(algorithm, Grid) and search.trials != combinations:
        yield f"search.trials: the grid has {combinations} combinations; write {combinations}"
    elif isinstance(algorithm, (*OPTUNA, Pbt)) and grids:
        yield f"search.space.{grids[0]}: {algorithm.kind} chooses by itself; write choice for grid"
    elif isinstance(algorithm, Random | Asha | Hyperband) and search.trials % combinations:
        yield (f"search.trials: {search.trials} trials cannot go through {combinations} "
               f"combinations of grids equally often; use a multiple of {combinations}")
    if isinstance(algorithm, Pbt):
        yield from _population(search, space)


def _population(search: Search, space: Space) -> Iterator[str]:
    for path, dimension in space.dimensions.items():
        if dimension.when:
            yield (f"search.space.{path}.when: pbt changes every field on its own; search it "
                   "without a condition, or use random")
        if path in ("steps", "schedule"):
            yield f"search.space.{path}: is the same for a whole population; remove it"
    if space.base.schedule.kind != "constant":
        yield (f"search.algorithm: pbt changes the learning rate as it goes and would run the "
               f"{space.base.schedule.kind} schedule of {search.base} anew in each segment; set "
               f"recipes.{search.base}.schedule to constant")
    base = space.base
    if base.steps is not None:
        first = search.steps_at(search.resources()[0], base.steps)
        warmup = base.warmup_steps or math.ceil(base.warmup_ratio * base.steps)
        if warmup > first:
            yield (f"search.algorithm: the warm-up of {warmup} steps is longer than the first "
                   f"segment of {first}; shorten it, or use fewer segments")
    for path in ("warmup_steps", "warmup_ratio"):
        if path in space.dimensions:
            yield f"search.space.{path}: is over before a population changes; remove it"
    for side in ("moe", "dense"):
        if search.trials_of(side) < 2:
            yield "search.trials: pbt needs a population of at least 2; raise it"


def _steps(search: Search, space: Space) -> Iterator[str]:
    units = search.resources()
    if space.base.steps is None:
        yield f"search.base: {search.base} counts epochs; give it steps instead"
        return
    if units == [1]:
        return
    ends = space.dimensions.get("steps")
    fewest = min(ends.values or ends.bounds) if ends else space.base.steps
    if fewest < units[-1]:
        yield (f"search.algorithm: {search.algorithm.kind} cuts the training into {units[-1]} "
               f"parts, a recipe has {fewest:g} steps; give it more steps or fewer "
               f"{'segments' if isinstance(search.algorithm, Pbt) else 'rungs'}")


def _draws(search: Search, space: Space) -> Sequence[dict]:
    """The values of the trials that are known in advance."""
    if isinstance(search.algorithm, OPTUNA):
        return ()
    if isinstance(search.algorithm, Grid):
        return space.combinations()
    trials = max(search.trials_of(side) for side in ("moe", "dense"))
    return [space.draw(search.seed, number) for number in range(trials)]


def _contradictory(search: Search, space: Space) -> Iterator[str]:
    """Trials whose values exclude each other, whatever the model."""
    for number, values in enumerate(_draws(search, space)):
        try:
            space.recipe(values)
        except BadInput as error:
            shown = ", ".join(f"{path}={value!r}" for path, value in values.items())
            yield f"search.space: trial {number} ({shown}) is refused: {error}; {_NARROW}"
            return
