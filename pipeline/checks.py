"""What is refused before any work starts: everything that can be known from the sweep alone.

Imports no torch, Ray or DeepSpeed. All problems of a sweep are told at once, one line each.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.asked import recipe_models
from pipeline.evaluation_checks import EvaluationChecks
from pipeline.plan import Plan
from pipeline.sweep import Dataset, Model, Recipe, Sweep, model_spec
from pipeline.sweep_file import located, nearest
from stages.data import sources as data_sources
from stages.data.spec import TEMPLATED, DataSpec
from stages.data.templates import TEMPLATES
from stages.errors import BadInput
from stages.evaluate.techniques import Contrastive
from stages.finetune.config import FOLDER as DEEPSPEED_CONFIGS
from stages.finetune.config import deepspeed_config
from stages.finetune.dense import for_dense
from stages.finetune.refusals import contradictions, inapplicable, misplaced
from stages.finetune.sets import TrainSet
from stages.models import sources as model_sources
from stages.models.families import FAMILIES
from stages.models.sources import Facts


def check(sweep: Sweep, path: Path) -> dict[str, str]:
    """Refuse a sweep that cannot work; returns the digest of each ``file:`` source and pack.

    Raises ``BadInput`` with one line per problem: file, field, reason, remedy.
    """
    checks = _Checks(sweep, path.resolve().parent)
    problems = list(checks.problems())
    if problems:
        raise BadInput("\n".join(f"{path}: {problem}" for problem in dict.fromkeys(problems)))
    return checks.contents


def unable(sweep: Sweep, path: Path) -> dict[str, str]:
    """The evaluations that the one model of a sweep without pairs cannot do, with the reason.

    What is not known of a model before it is here is no reason; what is wrong with the sweep is
    ``check``'s to tell.
    """
    checks, found = _knowing(sweep, path), {}
    for name, evaluation in sweep.evaluations.items():
        problem = next(checks.unable(name), None)
        if problem is not None:  # its place in the evaluation and its reason, without the remedy
            found[name] = problem.removeprefix(f"evaluations.{name}").lstrip(".: ").rpartition(
                "; ")[0]
        elif isinstance(evaluation.technique, Contrastive):
            reason = checks.other_amateur(evaluation.technique.amateur)
            found |= {name: reason} if reason else {}
    return found


def check_recipes(sweep: Sweep, path: Path) -> Iterator[tuple[str, str]]:
    """Name and first problem, ``field: reason; remedy``, of each recipe that has one, of a sweep
    whose other parts have none."""
    checks = _knowing(sweep, path)
    for name, recipe in sweep.recipes.items():
        for problem in checks.recipe(name, recipe):
            yield name, problem.removeprefix(f"recipes.{name}.")
            break


def _knowing(sweep: Sweep, path: Path) -> "_Checks":
    """The checks of a sweep with the facts of its models, which are noted on the way."""
    checks = _Checks(sweep, path.resolve().parent)
    for name, model in sweep.models.items():
        for _ in checks.model(name, model, f"models.{name}", ()):
            pass
    return checks


def check_plan(plan: Plan, path: Path) -> None:
    """Refuse a DeepSpeed file that contradicts a recipe; raises ``BadInput``."""
    for node in plan.nodes.values():
        if node.stage == "finetune":
            try:
                deepspeed_config(node.spec, accelerator=node.resources.gpus > 0)
            except BadInput as error:
                raise BadInput(f"{path}: resources.finetune.deepspeed_config: {error}") from None


class _Checks(EvaluationChecks):
    def problems(self) -> Iterator[str]:
        for name, dataset in self.sweep.datasets.items():
            yield from self.dataset(name, dataset)
        for name, model in self.sweep.models.items():
            yield from self.model(name, model, f"models.{name}", ())
        yield from self.pairs()
        yield from self.architectures()
        yield from self.recipes()
        for name in self.sweep.trained_on:
            if name not in self.sweep.datasets:
                yield f"trained_on: {self.unknown('data set', name)}"
        yield from self.evaluations()
        yield from self.engine()
        yield from self.hypotheses()
        yield from self.resources()

    def dataset(self, name: str, dataset: Dataset) -> Iterator[str]:
        field = f"datasets.{name}"
        fields = {f: getattr(dataset, f) for f in DataSpec.model_fields}
        fields["source"] = self.located(dataset.source)
        try:
            content = data_sources.check(DataSpec(**fields), field)
        except BadInput as error:
            yield str(error)
            return
        if content is not None:
            self.contents[dataset.source] = content
        for other in dataset.disjoint_from or ():
            if other == name or other not in self.sweep.datasets:
                yield (f"{field}.disjoint_from: {self.unknown('data set', other)}"
                       if other != name else f"{field}.disjoint_from: names itself; remove it")
            elif self.reaches(other, name):
                yield f"{field}.disjoint_from: {other} waits for {name} itself; remove one of them"

    def reaches(self, start: str, goal: str) -> bool:
        """Whether ``goal`` is among the data sets that ``start`` must be disjoint from."""
        seen, stack = set(), [start]
        while stack:
            name = stack.pop()
            if name == goal:
                return True
            if name not in seen and name in self.sweep.datasets:
                seen.add(name)
                stack += self.sweep.datasets[name].disjoint_from or ()
                stack += self.sweep.kept_from(name)
        return False

    def model(self, name: str, model: Model, field: str, parents: tuple[str, ...]) -> Iterator[str]:
        """Problems of a model, after those of the model that it is made of."""
        if name in self.facts:
            return
        if name in parents:
            circle = " from ".join((*parents, name))
            yield f"{field}: is made of itself ({circle}); break the circle"
            return
        origin = model.upcycle or model.widen
        if origin is not None:
            kind, key = ("upcycle", "from") if model.upcycle else ("widen", "like")
            other = model.upcycle.model if model.upcycle else model.widen.like
            if other not in self.sweep.models:
                yield f"{field}.{kind}.{key}: {self.unknown('model', other)}"
                return
            if model.widen and self.sweep.models[other].upcycle is None:
                yield f"{field}.widen.like: {other} is not an upcycled model; name one"
                return
            yield from self.model(other, self.sweep.models[other], f"models.{other}",
                                  (*parents, name))
            if other not in self.facts:
                return
            field = f"{field}.{kind}"
        spec, dense = model_spec(self.sweep, name)
        if model.source is not None:
            spec = spec.model_copy(update={"source": self.located(spec.source)})
        problem = model_sources.check(spec, field, self.facts.get(dense))
        if problem is not None:
            yield problem
            return
        self.facts[name] = model_sources.describe(spec, self.facts.get(dense))
        content = model_sources.content(spec) if dense is None else None
        if content is not None:
            self.contents[model.source] = content

    def located(self, source: str) -> str:
        return located(source, self.folder)

    def other_amateur(self, amateur: str) -> str:
        """Why an amateur may not fit the one model that is evaluated; empty where both come from
        one source. Tokenizers are compared when the models are there."""
        if amateur not in self.facts:
            return ""
        spec, dense = model_spec(self.sweep, amateur)
        if dense is not None:
            return self.other_amateur(dense)
        sources = [located(source, self.folder).partition("@")[0]
                   for source in (spec.source, self.sweep.models[self.sweep.name].source)]
        if sources[0] == sources[1]:
            return ""
        return (f"technique.amateur: comes from {sources[0]}, whose tokenizer may be another than "
                f"that of {sources[1]}")

    def pairs(self) -> Iterator[str]:
        for index, pair in enumerate(self.sweep.pairs):
            for wanted in ("moe", "dense"):
                name, field = getattr(pair, wanted), f"pairs.{index}.{wanted}"
                if name not in self.sweep.models:
                    yield f"{field}: {self.unknown('model', name)}"
                    continue
                facts = self.facts.get(name)
                if facts and facts.architecture not in (None, wanted):
                    kinds = {"moe": "a Mixture-of-Experts", "dense": "a dense"}
                    yield (f"{field}: {name} is {kinds[facts.architecture]} model; "
                           f"name {kinds[wanted]} one")
            if self.sweep.pairs.index(pair) < index:
                yield f"pairs.{index}: stands twice; remove it"

    def architectures(self) -> Iterator[str]:
        """What the registry says that an architecture cannot do."""
        spread = self.sweep.resources.finetune.expert_parallel > 1
        for index, pair in enumerate(self.sweep.pairs):
            for side in ("moe", "dense"):
                name, field = getattr(pair, side), f"pairs.{index}.{side}"
                entry = FAMILIES.get(getattr(self.facts.get(name), "family", None))
                if entry is None:
                    continue
                kind = f"{name} is of the {entry.model_type} architecture"
                if entry.no_evaluation:
                    yield f"{field}: {kind}: {entry.no_evaluation}; choose another model"
                if self.sweep.recipes and entry.no_training:
                    yield f"{field}: {kind}: {entry.no_training}; choose another model"
                elif self.sweep.recipes and spread and entry.no_expert_parallel:
                    yield (f"resources.finetune.expert_parallel: {kind}: "
                           f"{entry.no_expert_parallel}; set it to 1")

    def recipes(self) -> Iterator[str]:
        for name, recipe in self.sweep.recipes.items():
            if name == "none":
                yield "recipes.none: the name means `not fine-tuned`; choose another"
            yield from self.recipe(name, recipe)
        if not self.sweep.recipes and not self.sweep.untuned:
            yield "recipes: is empty while untuned is false; nothing would be evaluated"

    def recipe(self, name: str, recipe: Recipe) -> Iterator[str]:
        """Problems of a recipe of the sweep."""
        for index, train in enumerate(recipe.data):
            yield from self.train_set(name, train, f"recipes.{name}.data.{index}")
        if recipe.validation is not None:
            field = f"recipes.{name}.validation"
            yield from self.train_set(name, recipe.validation.rows, field)
            rows = (recipe.validation.dataset, recipe.validation.split)
            if rows in {(train.dataset, train.split) for train in recipe.data}:
                yield f"{field}.split: the recipe trains on {'/'.join(rows)}; use another split"
        yield from self.knobs(name, recipe)
        workers = self.sweep.resources.finetune.workers
        if recipe.batch_size % workers:
            yield (f"recipes.{name}.batch_size: {recipe.batch_size} cannot be cut into "
                   f"{workers} equal parts, one per worker; use a multiple")

    def train_set(self, recipe: str, train: TrainSet, field: str) -> Iterator[str]:
        """Problems of a data set that a recipe reads."""
        yield from self.uses(train.dataset, train.split, f"{field}.dataset")
        dataset = self.sweep.datasets.get(train.dataset)
        if dataset is None:
            return
        if dataset.task in TEMPLATED:
            fitting = [n for n, t in TEMPLATES.items() if t.task == dataset.task]
            if train.template is None:
                yield (f"{field}.template: is missing for a data set of task {dataset.task}; "
                       f"one of {', '.join(fitting)}")
            elif train.template in TEMPLATES and train.template not in fitting:
                yield (f"{field}.template: {train.template} is not for task {dataset.task}; "
                       f"one of {', '.join(fitting)}")
        elif dataset.task not in ("instructions", "images"):
            yield (f"{field}.dataset: {train.dataset} is of task {dataset.task}; only "
                   f"{', '.join(sorted(TEMPLATED))}, images and instructions can be trained on")
        elif train.template is not None:
            own = ("instructions use the model's chat template"
                   if dataset.task == "instructions" else "images need none")
            yield f"{field}.template: {own}; remove it"
        yield from self.modality(
            recipe_models(self.sweep, recipe), train.dataset, f"{field}.dataset")
        yield from self.template(train.template, f"{field}.template")
        if train.exclude and dataset.task != "instructions":
            yield f"{field}.exclude: {train.dataset} has no responses to look at; remove it"

    def knobs(self, name: str, recipe: Recipe) -> Iterator[str]:
        """Problems of what a recipe sets, by itself and for each model that it fine-tunes."""
        field = f"recipes.{name}"
        headed = recipe.head == "classification"
        for scored in recipe.evaluations or ():
            if scored not in self.sweep.evaluations:
                yield (f"{field}.evaluations: unknown evaluation {scored!r}"
                       f"{nearest(scored, list(self.sweep.evaluations))}")
            elif self.sweep.evaluations[scored].asks_head != headed:
                kind = "a classification head" if headed else "a language model"
                yield (f"{field}.evaluations: {scored} cannot score {kind}; remove it, or set its "
                       f"method to {'head' if headed else 'label_words'}")
        yield from self.after(name, recipe)
        unknown = [m for m in recipe.models or () if m not in self.sweep.models]
        yield from (f"{field}.models: {self.unknown('model', model)}" for model in unknown)
        found = list(contradictions(recipe))
        yield from (f"{field}.{knob}: {reason}" for knob, reason in found)
        if found or unknown:
            return
        moes = {pair.moe for pair in self.sweep.pairs}
        models = recipe_models(self.sweep, name)
        if not models:
            yield f"{field}.models: names no model of a pair; name one"
        for model in models:
            facts = self.facts.get(model, Facts())
            shared = bool(moes & set(models))
            if model in moes:
                found = [*inapplicable(recipe, replace(facts, architecture="moe")),
                         *misplaced(recipe, self.sweep.resources.finetune.expert_parallel)]
            elif not shared:
                found = list(inapplicable(recipe, replace(facts, architecture="dense")))
            else:
                # What only its partner has is dropped for the dense model; something must be left.
                try:
                    for_dense(recipe)
                    found = []
                except BadInput as error:
                    found = [tuple(str(error).split(": ", 1))]
            yield from (f"{field}.{knob}: {model}: {reason}" for knob, reason in found)

    def after(self, name: str, recipe: Recipe) -> Iterator[str]:
        """Problems of the recipe that another one starts from."""
        field, recipes = f"recipes.{name}.after", self.sweep.recipes
        if recipe.after is None:
            return
        if recipe.after not in recipes:
            yield f"{field}: unknown recipe {recipe.after!r}{nearest(recipe.after, list(recipes))}"
            return
        chain = [name]
        while (before := recipes[chain[-1]].after) in recipes:
            if before in chain:
                circle = " after ".join((*chain, before))
                yield f"{field}: comes after itself ({circle}); break the circle"
                return
            chain.append(before)
        missing = set(recipe_models(self.sweep, name)) - {
            *recipe_models(self.sweep, recipe.after)}
        if missing:
            yield f"{field}: {recipe.after} does not fine-tune {min(missing)}; mend its models"
        first = recipes[recipe.after]
        if first.head == "classification" and first.labels != recipe.labels:
            yield (f"{field}: {recipe.after} ends with a head for {', '.join(first.labels)}; train "
                   "this one on the same labels")

    def resources(self) -> Iterator[str]:
        finetune = self.sweep.resources.finetune
        size, field = finetune.expert_parallel, "resources.finetune.expert_parallel"
        if finetune.workers % size:
            yield (f"{field}: {size} does not divide the {finetune.workers} workers; "
                   "use a divisor of workers")
        for stage in ("data", "model", "finetune", "evaluate", "compare"):
            gpus = getattr(self.sweep.resources, stage).gpus
            if gpus > 1 and gpus != int(gpus):
                yield (f"resources.{stage}.gpus: {gpus:g} is more than one GPU and a part of "
                       "another; take whole ones")
        for pair in self.sweep.pairs:
            experts = getattr(self.facts.get(pair.moe), "experts", None)
            if self.sweep.recipes and experts and experts % size:
                yield (f"{field}: {size} does not divide the {experts} experts of {pair.moe}; "
                       "use a divisor")
        config = finetune.deepspeed_config
        if config is not None and not (DEEPSPEED_CONFIGS / config).is_file():
            known = sorted(p.name for p in DEEPSPEED_CONFIGS.glob("*.json"))
            yield f"resources.finetune.deepspeed_config: no file {config}{nearest(config, known)}"
