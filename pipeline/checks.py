"""What is refused before any work starts: everything that can be known from the sweep alone.

Imports no torch, Ray or DeepSpeed. All problems of a sweep are told at once, one line each.
"""

from collections.abc import Iterator
from pathlib import Path

from pipeline.plan import Plan
from pipeline.sweep import Dataset, Model, Sweep, model_spec, nearest
from stages.data import sources as data_sources
from stages.data.spec import DataSpec
from stages.data.templates import TEMPLATES
from stages.errors import BadInput
from stages.finetune.config import FOLDER as DEEPSPEED_CONFIGS
from stages.finetune.config import deepspeed_config
from stages.models import sources as model_sources
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


def check_plan(plan: Plan, path: Path) -> None:
    """Refuse a DeepSpeed file that contradicts a recipe; raises ``BadInput``."""
    for node in plan.nodes.values():
        if node.stage == "finetune":
            try:
                deepspeed_config(node.spec, accelerator=node.resources.gpus > 0)
            except BadInput as error:
                raise BadInput(f"{path}: resources.finetune.deepspeed_config: {error}") from None


class _Checks:
    def __init__(self, sweep: Sweep, folder: Path):
        self.sweep, self.folder = sweep, folder
        self.contents: dict[str, str] = {}
        self.facts: dict[str, Facts] = {}

    def problems(self) -> Iterator[str]:
        for name, dataset in self.sweep.datasets.items():
            yield from self.dataset(name, dataset)
        for name, model in self.sweep.models.items():
            yield from self.model(name, model, f"models.{name}", ())
        yield from self.pairs()
        yield from self.recipes()
        yield from self.evaluations()
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
        for other in dataset.disjoint_from:
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
                stack.extend(self.sweep.datasets[name].disjoint_from)
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
        if dense is None:
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
        """A ``file:`` source from the sweep's folder."""
        scheme, _, rest = source.partition(":")
        return f"file:{self.folder / rest}" if scheme == "file" and rest else source

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

    def recipes(self) -> Iterator[str]:
        for name, recipe in self.sweep.recipes.items():
            if name == "none":
                yield "recipes.none: the name means `not fine-tuned`; choose another"
            for index, train in enumerate(recipe.train):
                field = f"recipes.{name}.train.{index}"
                yield from self.uses(train.dataset, train.split, f"{field}.dataset")
                dataset = self.sweep.datasets.get(train.dataset)
                if dataset is None:
                    continue
                if dataset.task == "classification":
                    if train.template is None:
                        yield (f"{field}.template: is missing for a classification data set; "
                               f"one of {', '.join(TEMPLATES)}")
                elif dataset.task != "instructions":
                    yield (f"{field}.dataset: {train.dataset} is of task {dataset.task}; only "
                           "classification and instructions can be trained on")
                elif train.template is not None:
                    yield f"{field}.template: instructions use the model's chat template; remove it"
                yield from self.template(train.template, f"{field}.template")
            if recipe.warmup_steps > recipe.steps:
                yield (f"recipes.{name}.warmup_steps: {recipe.warmup_steps} is more than the "
                       f"{recipe.steps} steps; lower it")
            workers = self.sweep.resources.finetune.workers
            if recipe.batch_size % workers:
                yield (f"recipes.{name}.batch_size: {recipe.batch_size} cannot be cut into "
                       f"{workers} equal parts, one per worker; use a multiple")
        if not self.sweep.recipes and not self.sweep.untuned:
            yield "recipes: is empty while untuned is false; nothing would be evaluated"

    def evaluations(self) -> Iterator[str]:
        trained = {(t.dataset, t.split): name for name, recipe in self.sweep.recipes.items()
                   for t in recipe.train}
        for name, evaluation in self.sweep.evaluations.items():
            field = f"evaluations.{name}"
            for dataset, split in evaluation.sources().values():
                yield from self.uses(dataset, split, field)
            for dataset, split in evaluation.datasets().items():
                if (dataset, split) in trained:
                    yield (f"{field}: scores {dataset}/{split}, on which recipe "
                           f"{trained[dataset, split]} trains; use another split")
            for dataset, task in evaluation.tasks().items():
                entry = self.sweep.datasets.get(dataset)
                if entry is not None and entry.task != task:
                    yield f"{field}: needs task {task}, {dataset} is of task {entry.task}"
            yield from self.template(getattr(evaluation, "template", None), f"{field}.template")

    def uses(self, dataset: str, split: str, field: str) -> Iterator[str]:
        if dataset not in self.sweep.datasets:
            yield f"{field}: {self.unknown('data set', dataset)}"
        elif split not in self.sweep.datasets[dataset].splits:
            splits = ", ".join(self.sweep.datasets[dataset].splits)
            yield f"{field}: {dataset} has no split {split!r}; it has {splits}"

    def template(self, name: str | None, field: str) -> Iterator[str]:
        if name is not None and name not in TEMPLATES:
            yield f"{field}: unknown template {name!r}{nearest(name, list(TEMPLATES))}"

    def resources(self) -> Iterator[str]:
        finetune = self.sweep.resources.finetune
        size, field = finetune.expert_parallel, "resources.finetune.expert_parallel"
        if finetune.workers % size:
            yield (f"{field}: {size} does not divide the {finetune.workers} workers; "
                   "use a divisor of workers")
        for pair in self.sweep.pairs:
            experts = getattr(self.facts.get(pair.moe), "experts", None)
            if self.sweep.recipes and experts and experts % size:
                yield (f"{field}: {size} does not divide the {experts} experts of {pair.moe}; "
                       "use a divisor")
        config = finetune.deepspeed_config
        if config is not None and not (DEEPSPEED_CONFIGS / config).is_file():
            known = sorted(p.name for p in DEEPSPEED_CONFIGS.glob("*.json"))
            yield f"resources.finetune.deepspeed_config: no file {config}{nearest(config, known)}"

    def unknown(self, kind: str, name: str) -> str:
        known = self.sweep.datasets if kind == "data set" else self.sweep.models
        return f"unknown {kind} {name!r}{nearest(name, list(known))}"
