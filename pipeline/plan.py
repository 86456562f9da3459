"""From a sweep to a graph of stage nodes, and what of it is done, stale or to run.

A node's fingerprint covers its spec's identity fields, the stage's version and its inputs'
fingerprints, so an equal fingerprint means an equal result and a finished node is never repeated.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.asked import (
    drawn,
    recipe_evaluations,
    recipe_models,
    surrogate,
    sweep_recipes,
)
from pipeline.node import Node, fingerprint
from pipeline.sweep import UNTUNED, Resources, Sweep, model_spec
from stages.compare.spec import CompareSpec, Pair
from stages.data.spec import TRAINED, DataSpec
from stages.errors import BadInput
from stages.evaluate.engines import by_vllm
from stages.evaluate.judges import ModelJudge
from stages.evaluate.partial import without
from stages.evaluate.spec import AMATEUR, JUDGE, SURROGATE, EvaluateSpec, JudgeSpec
from stages.evaluate.techniques import Contrastive, ExpertCount
from stages.finetune.dense import for_dense
from stages.finetune.recipe import Recipe
from stages.finetune.spec import FinetuneSpec
from stages.models.spec import SourceSpec
from stages.models.vision_spec import VisionSpec
from stages.spec import Spec

Searched = dict[tuple[str, str], tuple[Recipe, ...]]
"""Model and recipe name to what a search found: one recipe, or a chain that is trained in turn."""


@dataclass
class Plan:
    """The nodes of a sweep, each after its inputs."""

    sweep: Sweep
    nodes: dict[str, Node] = field(default_factory=dict)

    def add(
        self, stage: str, name: str, spec: Spec, inputs: dict[str, str], resources: Resources
    ) -> str:
        """Add a node unless it is there, and return its key."""
        node = self.node(stage, name, spec, inputs, resources)
        self.nodes.setdefault(node.key, node)
        return node.key

    def node(
        self,
        stage: str,
        name: str,
        spec: Spec,
        inputs: dict[str, str],
        resources: Resources,
        left_out: str = "",
    ) -> Node:
        """A node with its fingerprint; its inputs are in the plan."""
        # A report also tells how its data sets were made.
        read = {role: node.fingerprint if stage == "compare" else node.content
                for role, node in ((role, self.nodes[key]) for role, key in inputs.items())}
        found = content = fingerprint(stage, spec, read)
        if any(role.startswith(TRAINED) for role in inputs):
            read = {role: of for role, of in read.items() if not role.startswith(TRAINED)}
            rows = {"left_out": left_out} if left_out else {}
            content = fingerprint(stage, spec, read | rows)
        return Node(stage, name, spec, inputs, resources, found, content, left_out)

    def leave_out(self, key: str, roles: Iterable[str]) -> bool:
        """Put in a node's place the one that does without inputs; False where there is none.

        ``roles`` are those of its inputs that cannot be had. An evaluation is made on its other
        data sets and by its other judges; the comparison knows which metrics it lacks. A data set
        does without those that it is kept from unasked: nothing is trained on what cannot be had.
        The result has a fingerprint and a folder of its own.
        """
        node, missing = self.nodes[key], set(roles)
        inputs = {role: k for role, k in node.inputs.items() if role not in missing}
        if all(role.startswith(TRAINED) for role in missing):
            self._replace(self.node(node.stage, node.name, node.spec, inputs, node.resources))
            return True
        names, judges = (
            {role.removeprefix(kind) for role in missing if role.startswith(kind)}
            for kind in ("data/", JUDGE)
        )
        if node.stage != "evaluate" or len(names) + len(judges) < len(missing):
            return False
        rest = without(node.spec.evaluation, names, judges)
        if rest is None:
            return False
        spec = node.spec.model_copy(update={"evaluation": rest})
        self._replace(self.node(node.stage, node.name, spec, inputs, node.resources))
        return True

    def settle(self, key: str, left_out: str) -> None:
        """Tell which rows a data set was made without, since they are trained on
        (``DataCard.left_out``). Before that the plan takes it that there are none."""
        node = self.nodes[key]
        if node.left_out != left_out:
            found = self.node(
                node.stage, node.name, node.spec, node.inputs, node.resources, left_out)
            self._replace(replace(found, found=node.found))

    def _replace(self, node: Node) -> None:
        """Another node of the same name, and the fingerprints of all that reads it."""
        changed = {node.key} if node.content != self.nodes[node.key].content else set()
        self.nodes[node.key], moved = node, {}
        for later in list(self.nodes.values()):
            if changed.intersection(later.inputs.values()):
                changed.add(later.key)
                again = self.node(
                    later.stage, later.name, later.spec, later.inputs, later.resources)
                moved[later.folder] = again.folder
                part_of = moved.get(later.part_of, later.part_of)
                self.nodes[later.key] = replace(again, part_of=part_of)

    @property
    def compare(self) -> Node:
        """The node that makes tables and report; the last one."""
        return next(reversed(self.nodes.values()))

    def needs(self, keys: Iterable[str]) -> set[str]:
        """The given nodes and everything upstream of them."""
        found: set[str] = set()
        stack = list(keys)
        while stack:
            key = stack.pop()
            if key not in found:
                found.add(key)
                stack.extend(self.nodes[key].inputs.values())
        return found


def build(
    sweep: Sweep,
    contents: dict[str, str] | None = None,
    searched: Searched | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The graph of a checked sweep.

    ``contents`` maps a ``file:`` source to the digest of what lies there (``checks.check``);
    ``searched`` has the recipes that are not the same for all models; ``notes`` are shown first
    among what limits the conclusions.
    """
    builder = Builder(sweep, contents or {}, searched)
    members = list(dict.fromkeys(m for pair in sweep.pairs for m in (pair.moe, pair.dense)))
    inputs: dict[str, str] = {}
    for model in members:
        for recipe, seeds in sweep_recipes(sweep).items():
            for seed in seeds if model in recipe_models(sweep, recipe) else ():
                inputs |= builder.checkpoint_and_scores(model, recipe, seed)
    for name in dict.fromkeys(builder.datasets_used):
        inputs[f"data/{name}"] = builder.dataset(name)
    inputs |= {f"{JUDGE}{node.name}": key
               for key, node in builder.plan.nodes.items() if node.stage == "judge"}
    spec = CompareSpec(
        title=sweep.description or sweep.name,
        pairs=tuple(Pair(name=p.name, moe=p.moe, dense=p.dense) for p in sweep.pairs),
        recipes=tuple(sweep_recipes(sweep)),
        models_of={name: recipe_models(sweep, name)
                   for name, recipe in sweep.recipes.items() if recipe.models},
        evaluations_of={name: scored for name in sweep_recipes(sweep)
                        if (scored := recipe_evaluations(sweep, name)) != (*sweep.evaluations,)},
        seeds=sweep.seeds,
        evaluations=sweep.evaluations,
        resamples=sweep.statistics.resamples,
        seed=sweep.statistics.seed,
        hypotheses=sweep.hypotheses,
        upcycled=tuple(name for name in members if sweep.models[name].upcycle),
        may_share=sweep.may_share,
        notes=tuple(notes),
    )
    builder.plan.add("compare", sweep.name, spec, inputs, sweep.resources.compare)
    return builder.plan


def build_evaluations(sweep: Sweep, contents: dict[str, str]) -> Plan:
    """The graph of the evaluations of one model, whose checked sweep has its name and no pairs."""
    builder = Builder(sweep, contents)
    builder.checkpoint_and_scores(sweep.name, UNTUNED, 0)
    return builder.plan


def segment_seed(seed: int, index: int) -> int:
    """The seed of a segment of a chain of fine-tunes; the first has the chain's own.

    With one seed for all, each segment would see the same first batches.
    """
    if index == 0:
        return seed
    return int(hashlib.sha256(f"{seed}/segment/{index}".encode()).hexdigest()[:8], 16)


class Builder:
    """Adds nodes on demand, so that only what a pair needs enters the plan."""

    def __init__(
        self, sweep: Sweep, contents: dict[str, str], searched: Searched | None = None
    ):
        self.sweep = sweep
        self.contents = contents
        self.searched = searched or {}
        self.plan = Plan(sweep)
        self.datasets_used: list[str] = []

    def dataset(self, name: str) -> str:
        """A data set, after those that it must be disjoint from."""
        key = f"data/{name}"
        if key in self.plan.nodes:
            return key
        entry = self.sweep.datasets[name]
        inputs = {f"disjoint/{other}": self.dataset(other) for other in entry.disjoint_from or ()}
        inputs |= {f"{TRAINED}{other}": self.dataset(other) for other in self.sweep.kept_from(name)}
        spec = DataSpec(**{f: getattr(entry, f) for f in DataSpec.model_fields if f != "content"},
                        content=self.contents.get(entry.source))
        return self.plan.add("data", name, spec, inputs, self.sweep.resources.data)

    def model(self, name: str, seed: int = 0) -> str:
        """A model, after the one that it is made of.

        Weights that are drawn, and no others, are drawn anew for each ``seed`` of a training: what
        seeds are to tell is how another training from scratch would have ended.
        """
        spec, dense = model_spec(self.sweep, name)
        label = f"{name}-seed{seed}" if seed and drawn(self.sweep, name) else name
        key = f"model/{label}"
        if key in self.plan.nodes:
            return key
        if isinstance(spec, SourceSpec):
            spec = spec.model_copy(update={"content": self.contents.get(spec.source)})
        elif isinstance(spec, VisionSpec):
            spec = spec.model_copy(update={"seed": spec.seed + seed})
        inputs = {"dense": self.model(dense, seed)} if dense else {}
        return self.plan.add("model", label, spec, inputs, self.sweep.resources.model)

    def judge(self, judge: ModelJudge) -> str:
        """A judge's model, once for all evaluations."""
        spec = JudgeSpec(
            kind=judge.kind, source=judge.source, content=self.contents.get(judge.source))
        return self.plan.add("judge", judge.name, spec, {}, self.sweep.resources.model)

    def checkpoint_and_scores(self, model: str, recipe: str, seed: int) -> dict[str, str]:
        """Nodes of one model × recipe × seed, by their role in the comparison."""
        label = f"{model}-{recipe}" + (f"-seed{seed}" if recipe != UNTUNED else "")
        checkpoint = self.checkpoint(model, recipe, seed)
        roles = {f"checkpoint/{model}/{recipe}/{seed}": checkpoint}
        for name in recipe_evaluations(self.sweep, recipe):
            of_experts = self.sweep.evaluations[name].of_experts
            if of_experts and model in {pair.dense for pair in self.sweep.pairs}:
                continue
            key = self.scores(label, checkpoint, model, name, recipe, seed)
            roles[f"scores/{model}/{recipe}/{seed}/{name}"] = key
        return roles

    def checkpoint(self, model: str, recipe: str, seed: int) -> str:
        """The model itself, or a fine-tune of it after those that its recipe comes after."""
        if recipe == UNTUNED:
            return self.model(model, seed)
        segments, after = self.searched.get((model, recipe)), None
        if segments is None:
            own = self.sweep.recipes[recipe]
            segments, after = (own,), own.after
        else:
            # What stands in for a member that a front lacks is trained once.
            recipe = next(name for (of, name), found in self.searched.items()
                          if (of, found) == (model, segments))
        label = f"{model}-{recipe}-seed{seed}"
        before = [f"{label}-segment{index}" for index in range(len(segments) - 1)]
        start = self.checkpoint(model, after or UNTUNED, seed)
        return self.chain([*before, label], model, segments, seed, start)

    def chain(
        self,
        labels: Sequence[str],
        model: str,
        segments: Sequence[Recipe],
        seed: int,
        start: str | None = None,
    ) -> str:
        """Fine-tunes that each start from the one before, the first from ``start``; the last.

        Batches are each one's own; the rows that a limit draws, and turns, are those of the whole.
        """
        checkpoint, before = start or self.model(model, seed), 0
        for index, (label, recipe) in enumerate(zip(labels, segments, strict=True)):
            later = {"rows_seed": seed, "steps_before": before} if index else {}
            checkpoint = self.finetune(
                label, model, recipe, segment_seed(seed, index), start=checkpoint, **later)
            if len(segments) > 1:  # whose steps are counted; another training may count epochs
                before += recipe.steps
        return checkpoint

    def finetune(
        self, label: str, model: str, recipe: Recipe, seed: int, start: str | None = None,
        **later: int,
    ) -> str:
        """A fine-tune of a model, or one that goes on from the checkpoint ``start``, where it is a
        ``later`` part of one training with the fields that say so."""
        resources = self.sweep.resources.finetune
        moe = model in {pair.moe for pair in self.sweep.pairs}
        fields, dropped = {f: getattr(recipe, f) for f in Recipe.model_fields}, {}
        if not moe:
            fields, dropped = for_dense(recipe)
        spec = FinetuneSpec(
            **fields,
            dropped=dropped,
            seed=seed,
            **later,
            workers=resources.workers,
            expert_parallel=resources.expert_parallel if moe else 1,
            micro_batch=resources.micro_batch,
            checkpoint_every=resources.checkpoint_every,
            deepspeed_config=resources.deepspeed_config,
            threads=max(1, int(resources.cpus)) if not resources.gpus else None,
        )
        inputs = {"model": start or self.model(model)}
        for train in recipe.reads:
            inputs[f"data/{train.dataset}"] = self.dataset(train.dataset)
            self.datasets_used.append(train.dataset)
        return self.plan.add("finetune", label, spec, inputs, resources)

    def scores(
        self,
        label: str,
        checkpoint: str,
        model: str,
        evaluation_name: str,
        recipe: str | None = None,
        seed: int = 0,
    ) -> str:
        """One evaluation of a checkpoint, of a recipe and seed; a trial of a search has neither.

        Raises BadInput for an evaluation that needs checkpoints that a trial does not have.
        """
        evaluation = self.sweep.evaluations[evaluation_name]
        technique = evaluation.technique
        engine = self.sweep.generation_engine if by_vllm(evaluation) else "transformers"
        if isinstance(technique, ExpertCount) and model in {p.dense for p in self.sweep.pairs}:
            # A dense partner has no experts to count; it is compared as it is.
            evaluation = evaluation.model_copy(update={"technique": None})
        asked = evaluation.surrogates()
        if asked and recipe is None:
            raise BadInput(
                f"search: {evaluation_name} attacks another checkpoint than a trial's own; "
                "name an evaluation without transfer")
        others = {each: surrogate(self.sweep, recipe, model, each) for each in asked}
        if others:
            evaluation = evaluation.with_surrogates(others)
        resources = self.sweep.resources.evaluate
        spec = EvaluateSpec(
            evaluation=evaluation,
            dtype="float32" if evaluation.holds_model else self.sweep.scoring_dtype,
            engine=engine,
            workers=resources.workers,
            cpus=resources.cpus,
            gpus=resources.gpus,
            expert_parallel=resources.expert_parallel,
            shard_size=resources.shard_size,
        )
        inputs = {"checkpoint": checkpoint}
        for name in dict.fromkeys(dataset for dataset, _ in evaluation.sources().values()):
            inputs[f"data/{name}"] = self.dataset(name)
            self.datasets_used.append(name)
        if isinstance(technique, Contrastive):
            inputs[f"{AMATEUR}{technique.amateur}"] = self.model(technique.amateur)
        for each, name in others.items():
            role, of = each._replace(model=name).role, seed
            if each.other_seed and recipe != UNTUNED:
                of = self.other_seed(evaluation_name, seed)
            inputs[f"{SURROGATE}{role}"] = self.checkpoint(name, recipe, of)
        for name, judge in evaluation.judge_models().items():
            inputs[f"{JUDGE}{name}"] = self.judge(judge)
        return self.plan.add("evaluate", f"{label}-{evaluation_name}", spec, inputs, resources)

    def other_seed(self, evaluation: str, seed: int) -> int:
        """The seed after one, the first after the last. Raises BadInput where there is no other."""
        seeds = self.sweep.seeds
        if len(seeds) < 2:
            raise BadInput(
                f"evaluations.{evaluation}: transfer from another seed needs two trainings; give "
                "two seeds, or set seed of the attack to same")
        return seeds[(seeds.index(seed) + 1) % len(seeds)]
