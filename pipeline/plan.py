"""From a sweep to a graph of stage nodes, and what of it is done, stale or to run.

A node's fingerprint covers its spec's identity fields, the stage's version and its inputs'
fingerprints, so an equal fingerprint means an equal result and a finished node is never repeated.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from pipeline.store import Store
from pipeline.sweep import UNTUNED, Resources, Sweep, model_spec
from stages.compare.spec import CompareSpec, Pair
from stages.data.spec import DataSpec
from stages.evaluate.spec import EvaluateSpec
from stages.finetune.spec import FinetuneSpec, Recipe
from stages.spec import Spec

Status = Literal["done", "stale", "to run"]


@dataclass(frozen=True)
class Node:
    """One stage of the sweep's graph."""

    stage: str
    name: str
    spec: Spec
    inputs: dict[str, str]
    """Role to the key of the upstream node."""
    resources: Resources
    fingerprint: str

    @property
    def key(self) -> str:
        """Unique in the plan: ``<stage>/<name>``."""
        return f"{self.stage}/{self.name}"

    @property
    def folder(self) -> str:
        """Where its result lies in the store."""
        return f"{self.key}@{self.fingerprint}"

    @property
    def demand(self) -> dict[str, float]:
        """CPUs and GPUs that its workers take together."""
        r = self.resources
        return {"CPU": r.workers * r.cpus, "GPU": r.workers * r.gpus}


@dataclass(frozen=True)
class State:
    """Whether a node is done, and if it is stale, because of what."""

    status: Status
    because: str = ""


@dataclass
class Plan:
    """The nodes of a sweep, each after its inputs."""

    sweep: Sweep
    nodes: dict[str, Node] = field(default_factory=dict)

    def add(
        self, stage: str, name: str, spec: Spec, inputs: dict[str, str], resources: Resources
    ) -> str:
        """Add a node unless it is there, and return its key."""
        content = {
            "stage": stage,
            "version": spec.VERSION,
            "spec": spec.identity(),
            "inputs": {role: self.nodes[key].fingerprint for role, key in inputs.items()},
        }
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]
        node = Node(stage, name, spec, inputs, resources, fingerprint)
        self.nodes.setdefault(node.key, node)
        return node.key

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


def build(sweep: Sweep, contents: dict[str, str] | None = None) -> Plan:
    """The graph of a checked sweep.

    ``contents`` maps a ``file:`` source to the digest of what lies there (``checks.check``).
    """
    builder = _Builder(sweep, contents or {})
    members = list(dict.fromkeys(m for pair in sweep.pairs for m in (pair.moe, pair.dense)))
    inputs: dict[str, str] = {}
    for model in members:
        for recipe, seeds in sweep_recipes(sweep).items():
            for seed in seeds:
                inputs |= builder.checkpoint_and_scores(model, recipe, seed)
    for name in dict.fromkeys(builder.datasets_used):
        inputs[f"data/{name}"] = builder.dataset(name)
    spec = CompareSpec(
        title=sweep.description or sweep.name,
        pairs=tuple(Pair(name=p.name, moe=p.moe, dense=p.dense) for p in sweep.pairs),
        recipes=tuple(sweep_recipes(sweep)),
        seeds=sweep.seeds,
        evaluations=sweep.evaluations,
        resamples=sweep.statistics.resamples,
        seed=sweep.statistics.seed,
    )
    builder.plan.add("compare", sweep.name, spec, inputs, sweep.resources.compare)
    return builder.plan


def build_evaluations(sweep: Sweep, model: str, contents: dict[str, str]) -> Plan:
    """The graph of the evaluations of one model of a checked sweep, without a comparison."""
    builder = _Builder(sweep, contents)
    builder.checkpoint_and_scores(model, UNTUNED, 0)
    return builder.plan


def sweep_recipes(sweep: Sweep) -> dict[str, tuple[int, ...]]:
    """Recipe names with the seeds that each is run for; an untuned model has one, 0."""
    untuned = {UNTUNED: (0,)} if sweep.untuned else {}
    return untuned | {name: sweep.seeds for name in sweep.recipes}


class _Builder:
    """Adds nodes on demand, so that only what a pair needs enters the plan."""

    def __init__(self, sweep: Sweep, contents: dict[str, str]):
        self.sweep = sweep
        self.contents = contents
        self.plan = Plan(sweep)
        self.datasets_used: list[str] = []

    def dataset(self, name: str) -> str:
        key = f"data/{name}"
        if key in self.plan.nodes:
            return key
        entry = self.sweep.datasets[name]
        inputs = {f"disjoint/{other}": self.dataset(other) for other in entry.disjoint_from}
        spec = DataSpec(**{f: getattr(entry, f) for f in DataSpec.model_fields if f != "content"},
                        content=self.contents.get(entry.source))
        return self.plan.add("data", name, spec, inputs, self.sweep.resources.data)

    def model(self, name: str) -> str:
        key = f"model/{name}"
        if key in self.plan.nodes:
            return key
        spec, dense = model_spec(self.sweep, name)
        if dense is None:
            spec = spec.model_copy(update={"content": self.contents.get(spec.source)})
        inputs = {"dense": self.model(dense)} if dense else {}
        return self.plan.add("model", name, spec, inputs, self.sweep.resources.model)

    def checkpoint_and_scores(self, model: str, recipe: str, seed: int) -> dict[str, str]:
        """Nodes of one model × recipe × seed, by their role in the comparison."""
        checkpoint = self.model(model)
        label = f"{model}-{recipe}"
        if recipe != UNTUNED:
            label = f"{label}-seed{seed}"
            checkpoint = self.finetune(label, model, self.sweep.recipes[recipe], seed)
        roles = {f"checkpoint/{model}/{recipe}/{seed}": checkpoint}
        for name in self.sweep.evaluations:
            roles[f"scores/{model}/{recipe}/{seed}/{name}"] = self.scores(label, checkpoint, name)
        return roles

    def finetune(self, label: str, model: str, recipe: Recipe, seed: int) -> str:
        resources = self.sweep.resources.finetune
        moe = model in {pair.moe for pair in self.sweep.pairs}
        fields = {f: getattr(recipe, f) for f in Recipe.model_fields}
        if not moe:
            fields["auxiliary_loss_weight"] = 0.0
        spec = FinetuneSpec(
            **fields,
            seed=seed,
            workers=resources.workers,
            expert_parallel=resources.expert_parallel if moe else 1,
            micro_batch=resources.micro_batch,
            checkpoint_every=resources.checkpoint_every,
            deepspeed_config=resources.deepspeed_config,
            threads=max(1, int(resources.cpus)) if not resources.gpus else None,
        )
        inputs = {"model": self.model(model)}
        for train in recipe.train:
            inputs[f"data/{train.dataset}"] = self.dataset(train.dataset)
            self.datasets_used.append(train.dataset)
        return self.plan.add("finetune", label, spec, inputs, resources)

    def scores(self, label: str, checkpoint: str, evaluation_name: str) -> str:
        evaluation = self.sweep.evaluations[evaluation_name]
        resources = self.sweep.resources.evaluate
        spec = EvaluateSpec(
            evaluation=evaluation,
            dtype=self.sweep.scoring_dtype,
            workers=resources.workers,
            cpus=resources.cpus,
            gpus=resources.gpus,
            shard_size=resources.shard_size,
        )
        inputs = {"checkpoint": checkpoint}
        for name in evaluation.datasets():
            inputs[f"data/{name}"] = self.dataset(name)
            self.datasets_used.append(name)
        return self.plan.add("evaluate", f"{label}-{evaluation_name}", spec, inputs, resources)


def survey(plan: Plan, store: Store) -> dict[str, State]:
    """What of a plan is done, stale (its name was finished under another fingerprint) or to run."""
    nodes = plan.nodes.values()
    folders = {
        stage: store.folders(stage) for stage in dict.fromkeys(node.stage for node in nodes)
    }
    candidates = [n.folder for n in nodes if n.folder.split("/", 1)[1] in folders[n.stage]]
    done = store.finished(candidates)
    older: dict[str, list[str]] = {}
    for stage, names in folders.items():
        for folder in names:
            older.setdefault(f"{stage}/{folder.rpartition('@')[0]}", []).append(
                f"{stage}/{folder}")
    states = {}
    for node in nodes:
        if node.folder in done:
            states[node.key] = State("done")
            continue
        others = [folder for folder in older.get(node.key, ()) if folder != node.folder]
        manifests = [m for m in map(store.manifest, others) if m is not None]
        if manifests:
            last = max(manifests, key=lambda manifest: manifest["finished"])
            states[node.key] = State("stale", _difference(last, node, plan))
        else:
            states[node.key] = State("to run")
    return states


def _difference(manifest: dict, node: Node, plan: Plan) -> str:
    """What changed between a finished node of the same name and this one."""
    changes = []
    if manifest["version"] != node.spec.VERSION:
        changes.append(f"stage version {manifest['version']} → {node.spec.VERSION}")
    before, after = _flat(manifest["identity"]), _flat(node.spec.identity())
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            changes.append(f"{name} {before.get(name, 'absent')} → {after.get(name, 'absent')}")
    for role in sorted(manifest["inputs"].keys() | node.inputs.keys()):
        key = node.inputs.get(role)
        now = plan.nodes[key].folder if key else "absent"
        if manifest["inputs"].get(role, "absent") != now:
            changes.append(f"input {role} changed")
    return "; ".join(changes)


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict) and value:
        return {k: v for name, child in value.items()
                for k, v in _flat(child, f"{prefix}.{name}" if prefix else name).items()}
    return {prefix: value}
