"""What is refused of a sweep's evaluations, and of the names by which its parts are referred to."""

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.asked import recipe_evaluations, recipe_models, surrogate, sweep_recipes
from pipeline.sweep import UNTUNED, Sweep
from pipeline.sweep_file import located, nearest
from stages.attack.text_spec import GradientAttack
from stages.compare.quantities import PARTS
from stages.data.templates import TEMPLATES
from stages.errors import StageFailed
from stages.evaluate.base import Evaluation
from stages.evaluate.engines import MOST_TEMPERATURE, by_vllm, lacks
from stages.evaluate.harness import LmEval
from stages.evaluate.held_prompts import SafetyExperts
from stages.evaluate.judges import ModelJudge
from stages.evaluate.labelled_images import LabelledImages
from stages.evaluate.probes import Interventions, LocalLipschitz, RouterGeometry
from stages.evaluate.registry import for_decoders
from stages.evaluate.sharpness import Sharpness
from stages.evaluate.techniques import AnyTechnique, Contrastive, DoLa, ExpertCount, candidates
from stages.evaluate.text_attacks import TextAttacks
from stages.finetune.sets import TrainSet
from stages.models import sources as model_sources
from stages.models.families import FAMILIES
from stages.models.sources import Facts, uncounted
from stages.models.spec import SourceSpec


class EvaluationChecks:
    """Problems of a sweep's evaluations; ``facts`` says what is known of each model.

    A sweep without pairs is that of one model (``single.py``), whose name it has.
    """

    def __init__(self, sweep: Sweep, folder: Path):
        self.sweep, self.folder = sweep, folder
        self.contents: dict[str, str] = {}
        self.facts: dict[str, Facts] = {}
        self.judges: dict[str, ModelJudge] = {}

    def evaluations(self) -> Iterator[str]:
        """Problems of each evaluation."""
        recipes = self.sweep.recipes.items()
        seen = {(r.validation.dataset, r.validation.split): f"{name} is validated"
                for name, r in recipes if r.validation}
        seen |= {(t.dataset, t.split): f"{name} trains" for name, r in recipes for t in r.data}
        for name, evaluation in self.sweep.evaluations.items():
            field = f"evaluations.{name}"
            for dataset, split in evaluation.sources().values():
                yield from self.uses(dataset, split, field)
            for dataset, split in evaluation.datasets().items():
                if (dataset, split) in seen and not isinstance(evaluation, Sharpness):
                    yield (f"{field}: scores {dataset}/{split}, on which recipe "
                           f"{seen[dataset, split]}; use another split")
            for key, (dataset, split) in evaluation.sources().items():
                scored = evaluation.datasets()
                if key not in scored and scored.get(dataset) == split:
                    yield (f"{field}: takes examples from {dataset}/{split}, which it scores; "
                           "use another split for them")
            for dataset, task in evaluation.tasks().items():
                entry = self.sweep.datasets.get(dataset)
                if entry is not None and entry.task != task:
                    yield f"{field}: needs task {task}, {dataset} is of task {entry.task}"
            yield from self.template(getattr(evaluation, "template", None), f"{field}.template")
            yield from self.wording(name, field)
            if evaluation.declared:
                yield f"{field}.declared: is filled in by a run; remove it"
            technique = evaluation.technique
            if isinstance(technique, Contrastive) and technique.amateur not in self.sweep.models:
                yield f"{field}.technique.amateur: {self.unknown('model', technique.amateur)}"
            yield from self.unable(name)
            if isinstance(evaluation, LmEval) and evaluation.reads_windows and (
                isinstance(technique, DoLa) or getattr(technique, "alpha", 0)
            ):
                yield (f"{field}.technique: {technique.kind} gives no probability to "
                       "some tokens, and the task asks for that of whole texts; remove it")
            yield from self.before(evaluation, field)
            yield from self.surrogates(name, f"{field}.attacks")
            for judge in evaluation.judge_models().values():
                yield from self.judge(judge, f"{field}.judges.{judge.name}")

        if self.sweep.pairs and all(e.of_experts for e in self.sweep.evaluations.values()):
            yield ("evaluations: all are about experts alone, of which a dense partner has none; "
                   "add one that compares the two, such as text_attacks")

    def unable(self, name: str) -> Iterator[str]:
        """What the models that an evaluation scores cannot do of it, or lack for it."""
        evaluation, field, scored = (
            self.sweep.evaluations[name], f"evaluations.{name}", self.scored(name))
        members = [m for pair in self.sweep.pairs for m in (pair.moe, pair.dense)]
        for dataset in evaluation.tasks():
            yield from self.modality(members or scored, dataset, field)
        if evaluation.asks_head:
            yield from self.heads(name, f"{field}.method")
        yield from self.technique(evaluation.technique, f"{field}.technique", scored)
        yield from self.decoders(evaluation, field, scored)
        if isinstance(evaluation, LabelledImages):
            yield from self.coupled(scored, f"{field}: {evaluation.kind}")
        if evaluation.of_experts:
            yield from self.experts(evaluation, field)
        yield from self.weighed(evaluation, field)
        for asked in () if self.sweep.pairs else evaluation.surrogates():
            if surrogate(self.sweep, UNTUNED, self.sweep.name, asked) is None:
                yield (f"{field}.attacks: transfer to {self.sweep.name} has no other model to "
                       "attack; name one of the sweep with from")

    def scored(self, name: str) -> list[str]:
        """The models that an evaluation scores, under some recipe or untuned."""
        if not self.sweep.pairs:
            return [self.sweep.name]
        found = {
            model for recipe in sweep_recipes(self.sweep)
            if name in recipe_evaluations(self.sweep, recipe)
            for model in recipe_models(self.sweep, recipe) if model in self.sweep.models
        }  # fmt: skip
        return sorted(found)

    def before(self, evaluation: Evaluation, field: str) -> Iterator[str]:
        """Problems of numbers on experts that have nothing to be compared with."""
        moes = [self.sweep.models[pair.moe] for pair in self.sweep.pairs
                if pair.moe in self.sweep.models]
        # Experts trained from scratch start with nothing learned: their numbers stand alone.
        alike = any(moe.upcycle for moe in moes) or (
            evaluation.of_experts and not all(moe.vision for moe in moes))
        if not self.sweep.recipes or self.sweep.untuned or not alike:
            return
        if any(metric.of_experts for metric in evaluation.metrics()):
            yield (f"{field}: what {evaluation.kind} tells of experts is compared with the same "
                   "model before the recipe; set untuned to true")

    def experts(self, evaluation: Evaluation, field: str) -> Iterator[str]:
        """Problems of an evaluation that is about experts alone."""
        moes = {pair.moe for pair in self.sweep.pairs}
        for name in sorted(moes or {self.sweep.name}):
            facts = self.facts.get(name, Facts())
            entry = FAMILIES.get(facts.family)
            if facts.architecture == "dense":
                yield f"{field}: {name} is dense and has no experts; remove {evaluation.kind}"
            elif isinstance(evaluation, RouterGeometry) and entry and entry.index is None:
                yield (f"{field}.kind: {name}: {facts.family} {entry.no_weighing}, so they cannot "
                       "be asked one by one; remove it")
            elif isinstance(evaluation, Interventions) and facts.experts:
                own, of = facts.choice, f"{facts.choice} experts of {name}"
                if facts.members > 1:
                    of = f"{own} experts of a member of {name}"
                for count in evaluation.top_k:
                    if count > own:
                        yield f"{field}.top_k: {count} is more than the {of}; lower it"
                for count in evaluation.prune:
                    if count > own - facts.top_k:
                        yield (f"{field}.prune: {count} of the {of} leave fewer than the "
                               f"{facts.top_k} that a token needs; lower it")
                # Which are masked is drawn, so that all may be of one member.
                if evaluation.random_masks and facts.experts // 2 > own - facts.top_k:
                    yield (f"{field}.random_masks: half of the {facts.experts} experts of {name} "
                           f"may leave fewer than the {facts.top_k} that a token needs; remove it")
                if "next_ranked" in evaluation.substitutions and 2 * facts.top_k > own:
                    yield (f"{field}.substitutions: {name} chooses {facts.top_k} of {own} experts, "
                           "so there are no next_ranked ones for each; name others alone")

    def weighed(self, evaluation: Evaluation, field: str) -> Iterator[str]:
        """Problems of what puts other experts in the place of the chosen ones, with the weights
        that the router would give them."""
        match evaluation:
            case TextAttacks():
                parts = [f"attacks.{number}.routing" for number, attack
                         in enumerate(evaluation.attacks) if isinstance(attack, GradientAttack)
                         and attack.routing in ("soft", "frozen")]
            case Interventions():
                asked = {"top_k": evaluation.top_k, "prune": evaluation.prune,
                         "random_masks": evaluation.random_masks,
                         "weights": evaluation.weights == "by_logits"}
                parts = [part for part, value in asked.items() if value]
            case LocalLipschitz() | SafetyExperts():
                parts = ["kind"]
            case _:
                return
        for name in sorted({pair.moe for pair in self.sweep.pairs} or {self.sweep.name}):
            entry = FAMILIES.get(getattr(self.facts.get(name), "family", None))
            if entry is None or not entry.is_moe or not entry.no_weighing:
                continue
            why = f"{entry.model_type} {entry.no_weighing}"
            yield from (f"{field}.{part}: {name}: {why}, so others cannot be put in their place; "
                        "remove it" for part in parts)

    def surrogates(self, name: str, field: str) -> Iterator[str]:
        """Problems of the other models that an evaluation holds: each needs a checkpoint of every
        recipe that is scored on it."""
        for asked in self.sweep.evaluations[name].surrogates():
            if asked.model is not None and asked.model not in self.sweep.models:
                yield f"{field}: from: {self.unknown('model', asked.model)}"
                continue
            for recipe in sweep_recipes(self.sweep):
                trained = recipe_models(self.sweep, recipe)
                if recipe == UNTUNED or name not in recipe_evaluations(self.sweep, recipe):
                    continue
                for other in sorted({surrogate(self.sweep, recipe, m, asked) for m in trained}):
                    if other not in trained:
                        yield (f"{field}: transfer from {other}, which recipe {recipe} does not "
                               "train; name a model of the pairs that it trains")

    def engine(self) -> Iterator[str]:
        """Problems of vLLM as the writer of answers."""
        resources, spread = self.sweep.resources.evaluate, "resources.evaluate.expert_parallel"
        if self.sweep.generation_engine != "vllm":
            if resources.expert_parallel:
                yield (f"{spread}: acts in vLLM alone; set generation_engine to vllm, or remove it")
            return
        if importlib.util.find_spec("vllm") is None:
            yield ("generation_engine: needs the package vllm, which is not installed; `pip "
                   "install 'moe-reliability[vllm]'`, or use transformers")
        if not any(map(by_vllm, self.sweep.evaluations.values())):
            yield ("generation_engine: vLLM would write nothing, since no evaluation has answers "
                   "that are texts and come without dola, contrastive or expert_count; remove it")
        for kind, amount in (("gpus", resources.gpus), ("cpus", resources.cpus)):
            if amount < 1:
                yield (f"resources.evaluate.{kind}: {amount:g} is less than the whole "
                       f"{kind[:-1].upper()} that vLLM takes; set it to 1 or more, or "
                       "generation_engine to transformers")
        for name, evaluation in self.sweep.evaluations.items():
            heat = getattr(evaluation.technique, "temperature", 0)
            if heat > MOST_TEMPERATURE:
                yield (f"evaluations.{name}.technique.temperature: vLLM takes up to "
                       f"{MOST_TEMPERATURE}, not {heat:g}; lower it")
        if resources.expert_parallel and resources.gpus < 2:
            yield f"{spread}: needs several GPUs of an actor to spread experts over; raise gpus"
        members = {m for pair in self.sweep.pairs for m in (pair.moe, pair.dense)}
        for name in sorted(members or {self.sweep.name}):
            entry = FAMILIES.get(getattr(self.facts.get(name), "family", None))
            if entry is not None and (reason := lacks(entry)):
                yield (f"generation_engine: {name} is of the {entry.model_type} architecture: "
                       f"{reason}; use transformers")

    def hypotheses(self) -> Iterator[str]:
        """Problems of what the verdicts are asked of."""
        asked = self.sweep.hypotheses
        if asked is None:
            return
        for part, kinds in PARTS.items():
            name = getattr(asked, part)
            of_kind = [n for n, each in self.sweep.evaluations.items() if each.kind in kinds]
            if name is not None and name not in of_kind:
                yield (f"hypotheses.{part}: no evaluation {name!r} of kind {' or '.join(kinds)}"
                       f"{nearest(name, of_kind)}")
            if name is None and len(of_kind) > 1:
                yield (f"hypotheses.{part}: {', '.join(of_kind)} are of kind "
                       f"{' or '.join(kinds)}; name the one that the verdicts are from")
            if part == "attacks" and not of_kind:
                yield (f"hypotheses: no evaluation attacks the models; add {' or '.join(kinds)}, "
                       "or remove hypotheses")
        pairs, moes = {pair.name for pair in self.sweep.pairs}, {p.moe for p in self.sweep.pairs}
        for field, known in (("equal_flops", pairs), ("series", moes)):
            for name in getattr(asked, field) or ():
                if name not in known:
                    what = {"equal_flops": "pair", "series": "MoE model of the pairs"}[field]
                    yield f"hypotheses.{field}: unknown {what} {name!r}{nearest(name, list(known))}"

    def heads(self, name: str, field: str) -> Iterator[str]:
        """Problems of an evaluation with the classification heads that recipes train."""
        trained = {r: recipe.labels for r, recipe in self.sweep.recipes.items()
                   if name in recipe_evaluations(self.sweep, r)}
        wanted = TEMPLATES.get(self.sweep.evaluations[name].template)
        if not trained:
            yield (f"{field}: head needs a recipe with `head: classification`, and there is none "
                   "that is scored on it; add one, or use label_words")
        for recipe, labels in trained.items():
            if labels is not None and wanted and labels != tuple(wanted.labels):
                yield (f"{field}: the head of recipe {recipe} is for {', '.join(labels)}; use the "
                       "template that it is trained with")

    def wording(self, name: str, field: str) -> Iterator[str]:
        """Problems of an evaluation that asks in other words than its recipes train: of a data set
        that they train on, or for the very labels that they train."""
        evaluation = self.sweep.evaluations[name]
        asked = TEMPLATES.get(getattr(evaluation, "template", None))
        scored = evaluation.datasets()
        for recipe in self.sweep.recipes if asked is not None else ():
            if name not in recipe_evaluations(self.sweep, recipe):
                continue
            remedy = f"or leave {name} out of the recipe's evaluations"
            for train in self.trained(recipe):
                taught = TEMPLATES.get(train.template)
                if taught is None or taught.task != asked.task:
                    continue
                # A head with other labels has a message of its own.
                same_set = train.dataset in scored and not evaluation.asks_head
                if not same_set and {*taught.labels} != {*asked.labels}:
                    continue
                if taught.hash != asked.hash:
                    yield (f"{field}.template: {evaluation.template} is not what recipe {recipe} "
                           f"trains {train.dataset} with; use {train.template}, {remedy}")
                elif getattr(evaluation, "chat", False):
                    yield (f"{field}.chat: recipe {recipe} trains {train.dataset} with the plain "
                           f"template; remove it, {remedy}")

    def trained(self, recipe: str | None) -> Iterator[TrainSet]:
        """What the checkpoints of a recipe are trained on, by it and those that it comes after."""
        passed: set[str] = set()
        while recipe in self.sweep.recipes and recipe not in passed:
            passed.add(recipe)
            yield from self.sweep.recipes[recipe].data
            recipe = self.sweep.recipes[recipe].after

    def judge(self, judge: ModelJudge, field: str) -> Iterator[str]:
        """Problems of a judge that is a model."""
        if self.judges.setdefault(judge.name, judge).source != judge.source:
            yield (f"{field}.source: another evaluation has a judge of this name from "
                   f"{self.judges[judge.name].source}; give one of them another name")
        spec = SourceSpec(source=located(judge.source, self.folder))
        problem = model_sources.check_files(spec.source)
        if problem is not None:
            yield f"{field}.source: {problem}"
        elif spec.source.startswith("file:"):
            self.contents[judge.source] = model_sources.content(spec)

    def technique(
        self, technique: AnyTechnique | None, field: str, scored: list[str]
    ) -> Iterator[str]:
        """Problems of an inference technique with the models that are evaluated."""
        dense = {pair.dense for pair in self.sweep.pairs}
        if isinstance(technique, ExpertCount):
            # Where some of them can, those that cannot are gaps, which the plan names.
            reasons = {n: uncounted(self.facts.get(n)) for n in scored if n not in dense}
            if all(reasons.values()):
                yield from (f"{field}.kind: {name}: {reason}; remove technique"
                            for name, reason in reasons.items())
        for name in scored:
            facts = self.facts.get(name, Facts())
            if isinstance(technique, ExpertCount) and name not in dense:
                if facts.architecture == "dense":
                    yield f"{field}.top_k: {name} is dense and has no experts; remove technique"
                elif facts.experts and technique.top_k > facts.experts:
                    yield (f"{field}.top_k: {technique.top_k} is more than the {facts.experts} "
                           f"experts of {name}; lower it")
            if isinstance(technique, DoLa) and facts.layers:
                try:
                    candidates(technique, facts.layers, tied=True)
                except StageFailed as error:
                    yield f"{field}.candidate_layers: {name}: {error}"

    def coupled(self, scored: list[str], what: str) -> Iterator[str]:
        """Models whose answer to an image depends on the others of its batch."""
        for name in scored:
            vision = self.sweep.models[name].vision
            if vision and vision.eval_capacity_factor and vision.group_size != 1:
                yield (f"{what}: the images of a batch share the capacity of {name}'s experts; "
                       "leave eval_capacity_factor out, or set group_size to 1")

    def decoders(self, evaluation: Evaluation, field: str, scored: list[str]) -> Iterator[str]:
        """Problems of what only decoders can do, where no scored model is one or an amateur is
        not; those of several that cannot are gaps, which the plan names."""
        what, technique = for_decoders(evaluation), evaluation.technique
        if not what:
            return
        where = f"{field}.technique.kind" if technique is not None else field
        needed = [technique.amateur] if isinstance(technique, Contrastive) else []
        unable = [name for name in (*scored, *needed)
                  if getattr(self.facts.get(name), "reads_first", False)]
        if set(scored) <= set(unable) or set(needed) & set(unable):
            yield from (f"{where}: {what} is for decoders, {name} is an encoder-decoder; remove it"
                        for name in unable)

    def uses(self, dataset: str, split: str, field: str) -> Iterator[str]:
        """Problems of naming a split of a data set."""
        if dataset not in self.sweep.datasets:
            yield f"{field}: {self.unknown('data set', dataset)}"
        elif split not in self.sweep.datasets[dataset].splits:
            splits = ", ".join(self.sweep.datasets[dataset].splits)
            yield f"{field}: {dataset} has no split {split!r}; it has {splits}"

    def template(self, name: str | None, field: str) -> Iterator[str]:
        """Problems of naming a template."""
        if name is not None and name not in TEMPLATES:
            yield f"{field}: unknown template {name!r}{nearest(name, list(TEMPLATES))}"

    def unknown(self, kind: str, name: str) -> str:
        """The end of a message about a name that nothing has."""
        known = self.sweep.datasets if kind == "data set" else self.sweep.models
        return f"unknown {kind} {name!r}{nearest(name, list(known))}"

    def modality(self, models: Iterable[str], dataset: str, field: str) -> Iterator[str]:
        """Models of texts on images, or of images on texts."""
        data = self.sweep.datasets.get(dataset)
        for model in dict.fromkeys(models):
            entry = FAMILIES.get(getattr(self.facts.get(model), "family", None))
            reads = entry and entry.modality
            if data is not None and reads and (reads == "image") != (data.task == "images"):
                yield (f"{field}: {dataset} is of task {data.task}, {model} reads {reads}s; "
                       "name others")
