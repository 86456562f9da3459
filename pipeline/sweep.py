"""The sweep file: its schema, how it is read, and how ``--set`` overrides a field.

Reading imports no torch, Ray or DeepSpeed, so that a wrong file is refused at once. Every problem
becomes one line ``FILE: FIELD: reason; remedy``.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from pipeline.search.spec import ALGORITHMS, Search
from stages.data.sources import task_of
from stages.data.spec import DataSpec, Task
from stages.errors import BadInput
from stages.evaluate.harness_tasks import PREFIX, describe
from stages.evaluate.registry import KINDS, AnyEvaluation
from stages.finetune.recipe import Recipe as StageRecipe
from stages.models.spec import SourceSpec, UpcycleSpec, WidenSpec
from stages.models.vision_spec import VisionSpec
from stages.spec import Spec

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]
UNTUNED = "none"
"""The recipe name of a model that was not fine-tuned."""


class Dataset(DataSpec):
    """A data set of the sweep."""

    disjoint_from: tuple[Name, ...] | None = None
    """Rows whose normalised text occurs in one of these data sets are dropped and counted. Where it
    is not given, a published data set that no recipe trains on is kept disjoint from all that one
    does; ``[]`` keeps the rows."""


class Upcycle(UpcycleSpec):
    """A Mixture-of-Experts twin of another model of the sweep."""

    model: Annotated[Name, Field(alias="from")]
    """The dense model it is made of."""


class Widen(Spec):
    """A dense twin with the activated FLOPs of an upcycled model of the sweep."""

    like: Name
    """The upcycled model; dense model, layers, activated neurons, noise and seed are its own."""


class Model(SourceSpec):
    """A model of the sweep: exactly one of ``source``, ``upcycle``, ``widen`` and ``vision``."""

    source: str | None = None
    upcycle: Upcycle | None = None
    widen: Widen | None = None
    vision: VisionSpec | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "Model":
        origins = ("source", "upcycle", "widen", "vision")
        given = [name for name in origins if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"needs exactly one of {', '.join(origins)}; has {found}")
        return self


class Pair(Spec):
    """A Mixture-of-Experts model and the dense model it is compared with."""

    moe: Name
    dense: Name

    @property
    def name(self) -> str:
        """How the pair is called in tables."""
        return f"{self.moe} vs {self.dense}"


class Recipe(StageRecipe):
    """A recipe of the sweep."""

    models: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """The models that it fine-tunes; all models of all pairs when absent."""
    after: Name | None = None
    """Start from the checkpoints of this recipe, of the same model and seed, instead of from the
    models as they are (a curriculum)."""
    evaluations: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """The evaluations of what it fine-tunes; when absent, all of the sweep that ask for what it
    has, a classification head (``method: head``) or a language model."""


class Resources(Spec):
    """What one kind of stage asks of the cluster."""

    workers: Annotated[int, Field(ge=1)] = 1
    """Worker processes."""
    cpus: Annotated[float, Field(ge=0)] = 1
    """CPUs of each worker."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of each worker."""


class FinetuneResources(Resources):
    """Workers of one fine-tune."""

    expert_parallel: Annotated[int, Field(ge=1)] = 1
    """Workers that share the experts of a Mixture-of-Experts model; divides experts and workers."""
    micro_batch: Annotated[int, Field(ge=1)] = 8
    """Sequences per forward pass and worker."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 20
    """Optimiser steps between two resumable checkpoints."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """How often a fine-tune restarts from its last checkpoint after a worker died."""
    deepspeed_config: str | None = None
    """A file of ``deepspeed_configs/``; chosen from model and device when absent."""


class EvaluateResources(Resources):
    """Actors of one evaluation pass; each loads the model once, over all GPUs that it has."""

    gpu_memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU, in 10^9 bytes; a plan whose models do not fit is then refused."""

    shard_size: Annotated[int, Field(ge=1)] = 64
    """Requests that are written (and, after a kill, repeated) together."""


class AllResources(Spec):
    """Resources by stage; what is absent runs on one worker with one CPU."""

    data: Resources = Resources()
    model: Resources = Resources()
    finetune: FinetuneResources = FinetuneResources()
    evaluate: EvaluateResources = EvaluateResources()
    compare: Resources = Resources()


class Assumptions(Spec):
    """What ``plan`` assumes for its estimate where nothing is counted; changes no result."""

    characters_per_token: Annotated[float, Field(gt=0)] = 4.0
    """English text under the tokenizers of today's language models has 4 to 5."""
    tokens_per_row: dict[Task, Annotated[float, Field(gt=0)]] = {
        "classification": 25,
        "nli": 75,
        "prompts": 20,
        "multiple_choice": 110,
        "statements": 120,
        "open_question": 20,
        "text": 600,
        "instructions": 100,
        "images": 50,
    }
    """Of a data set's text, by task, where its rows are not at hand (of an image, its patches);
    about those of the pinned archives' sets."""
    training_tflops: Annotated[float, Field(gt=0)] = 100
    """Sustained by one GPU in training, in 10^12 operations per second."""
    scoring_tflops: Annotated[float, Field(gt=0)] = 100
    """The same when prompts are read."""
    decoding_tflops: Annotated[float, Field(gt=0)] = 5
    """The same when answers are written, token by token."""

    @model_validator(mode="after")
    def _every_task(self) -> "Assumptions":
        default = type(self).model_fields["tokens_per_row"].default
        object.__setattr__(self, "tokens_per_row", default | self.tokens_per_row)
        return self


class Statistics(Spec):
    """How intervals are made."""

    resamples: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap resamples."""
    seed: int = 0


class Sweep(Spec):
    """A whole study: pairs of models, recipes, evaluations, seeds."""

    name: Name
    description: str = ""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Each fine-tune is done once per seed."""
    datasets: dict[Name, Dataset]
    models: dict[Name, Model]
    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]
    recipes: dict[Name, Recipe] = {}
    untuned: bool = True
    """Also evaluate the models as they are, before any fine-tuning."""
    evaluations: Annotated[dict[Name, AnyEvaluation], Field(min_length=1)]
    scoring_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights during evaluation."""
    statistics: Statistics = Statistics()
    resources: AllResources = AllResources()
    assumptions: Assumptions = Assumptions()
    search: Search | None = None
    """What ``moe-reliability search`` looks for; ``run`` leaves it alone."""

    def disjoint_from(self, name: str) -> tuple[str, ...]:
        """The data sets whose texts a data set must not hold.

        A training set that the sweep keeps disjoint from evaluation sets is never implied for
        another one: that could close a circle.
        """
        dataset = self.datasets[name]
        if dataset.disjoint_from is not None:
            return dataset.disjoint_from
        trained = {train.dataset: self.datasets[train.dataset]
                   for recipe in self.recipes.values() for train in recipe.data
                   if train.dataset in self.datasets}
        if name in trained or not (dataset.format or dataset.source.startswith("catalogue:")):
            return ()
        return tuple(other for other, entry in trained.items()
                     if set(entry.disjoint_from or ()) <= set(trained))


def model_spec(
    sweep: Sweep, name: str
) -> tuple[SourceSpec | UpcycleSpec | WidenSpec | VisionSpec, str | None]:
    """The stage's spec of a model whose references exist, and the dense model it is made of."""
    model = sweep.models[name]
    if model.source is not None:
        return SourceSpec(**{f: getattr(model, f) for f in SourceSpec.model_fields}), None
    if model.vision is not None:
        return model.vision, None
    if model.upcycle is not None:
        upcycle = model.upcycle
        return UpcycleSpec(**{f: getattr(upcycle, f) for f in UpcycleSpec.model_fields}), (
            upcycle.model
        )
    upcycle = sweep.models[model.widen.like].upcycle
    same = {f: getattr(upcycle, f) for f in ("top_k", "layers", "seed")}
    if upcycle.experts_from == "copies":
        return WidenSpec(**same, drop=upcycle.drop, noise=upcycle.noise), upcycle.model
    return WidenSpec(**same, parts=upcycle.experts, noise=0), upcycle.model


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: ``2e-5`` is a number, ``no`` and ``2024-01-01`` are text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for (key_node, _), key in zip(node.value, keys, strict=True):
        if keys.count(key) > 1:
            line = key_node.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: {key!r} stands twice; keep one")
    return {
        key: loader.construct_object(value, deep=True)
        for key, (_, value) in zip(keys, node.value, strict=True)
    }


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node), 0)
    if node.value.startswith(("0x", "0o")) else int(node.value)
)
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def load(path: Path, overrides: list[str] = ()) -> Sweep:
    """Read and validate a sweep file.

    ``overrides`` are ``KEY=VALUE`` with a dotted key (list items by number) and a YAML value.
    Raises ``BadInput`` with one line per problem.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; sweeps live in sweeps/") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder; name a sweep file in it") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    content = _parse(text, str(path))
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds no fields; a sweep is a mapping that starts with `name:`")
    for override in overrides:
        _override(content, override)
    _name_tasks(content, path)
    _describe_harness(content, path)
    try:
        # JSON, because strict validation there still takes a list for a tuple.
        return Sweep.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        lines = [
            f"{path}: {_explain(problem, content)}"
            for problem in error.errors()
            # A default that follows from fields with problems of their own.
            if problem["type"] != "default_factory_not_called"
        ]
        raise BadInput("\n".join(dict.fromkeys(lines))) from None
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: {error}; write plain text, numbers, lists and mappings") from None


def _name_tasks(content: dict, path: Path) -> None:
    """Add the task of each data set whose source holds a known one."""
    entries = content.get("datasets")
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and "task" not in entry and isinstance(entry.get("source"), str):
            where = f"{path}: datasets.{name}.source"
            task = task_of(entry["source"], entry.get("format"), where)
            if task is not None:
                entry["task"] = task


def _describe_harness(content: dict, path: Path) -> None:
    """Add to each evaluation by lm-evaluation-harness what the harness says about its task.

    ``NAME: lm_eval:TASK`` is short for such an evaluation without further fields.
    """
    entries = content.get("evaluations")
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, str) and entry.startswith(PREFIX):
            entry = entries[name] = {"kind": "lm_eval", "task": entry.removeprefix(PREFIX)}
        if not (isinstance(entry, dict) and entry.get("kind") == "lm_eval"):
            continue
        field = f"{path}: evaluations.{name}"
        if "harness" in entry:
            raise BadInput(f"{field}.harness: is filled in when the sweep is read; remove it")
        if isinstance(entry.get("task"), str):
            folder = entry.get("include_path")
            try:
                found = describe(
                    entry["task"], path.resolve().parent / folder if folder else None)
            except BadInput as error:
                raise BadInput(f"{field}.task: {error}") from None
            entry["harness"] = found.model_dump(mode="json")
        else:
            raise BadInput(f"{field}.task: is missing; name a task of lm-evaluation-harness")


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise BadInput(f"{where}:{place} not YAML: {error.problem}; check the indentation "
                       "and quotes there") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{where}: {str(error).splitlines()[0]}") from None


def _override(content: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise BadInput(f"--set {override}: no value; write --set {key}=VALUE")
    *parents, last = key.split(".")
    place: Any = content
    for part in parents:
        if isinstance(place, dict):
            place = place.setdefault(part, {})
        elif isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        else:
            raise BadInput(f"--set {override}: {part!r} of {key} is not in the sweep; "
                           "name an existing list item by its number")
    parsed = _parse(value, f"--set {override}")
    if isinstance(place, dict):
        place[last] = parsed
    elif isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = parsed
    else:
        raise BadInput(f"--set {override}: {key} is not a field of the sweep")


def _explain(problem: dict, content: dict) -> str:
    """One line of pydantic's finding: field, reason, remedy."""
    field = _path(problem["loc"], content)
    kind, given = problem["type"], problem["input"]
    shown = repr(given) if len(repr(given)) < 60 else repr(given)[:57] + "..."
    if kind == "extra_forbidden":
        name = str(problem["loc"][-1])
        return f"{field}: unknown field{nearest(name, _known_fields(field.split('.')[:-1]))}"
    if kind == "missing":
        return f"{field}: is missing; add it"
    if kind == "union_tag_not_found":
        return f"{field}.kind: is missing; one of {', '.join(_kinds(field.split('.')))}"
    if kind == "union_tag_invalid":
        tag, kinds = problem["ctx"]["tag"], re.findall("'(.+?)'", problem["ctx"]["expected_tags"])
        what = {frozenset(KINDS): "evaluation", frozenset(ALGORITHMS): "algorithm"}.get(
            frozenset(kinds), re.sub(r"[.0-9]+$", "", field).rpartition(".")[2])
        return f"{field}.kind: unknown {what} {tag!r}{nearest(tag, kinds)}"
    if kind in ("float_type", "int_type"):
        remedy = "write it without quotes" if isinstance(given, str) else "write one number"
        return f"{field}: {shown} is not a number; {remedy}"
    if kind == "string_pattern_mismatch":
        return f"{field}: {shown} is no name; use letters, digits, dot, dash and underscore"
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {reason[0].lower()}{reason[1:]}; found {shown}"


def _path(loc: tuple, content: Any) -> str:
    """The dotted field of a pydantic location, without the names of union members in it."""
    parts = []
    for part in loc[:-1]:
        if isinstance(content, list) and isinstance(part, int):
            content = content[part]
        elif isinstance(content, dict) and part in content:
            content = content[part]
        else:
            continue
        parts.append(str(part))
    # The last part may be a missing field; but a member of a union of plain types is no field, nor
    # is the kind of a section that is wrong as a whole.
    whole = loc and isinstance(content, dict) and loc[-1] == content.get("kind")
    if not loc or isinstance(content, dict | list) and loc[-1] != "[key]" and not whole:
        parts += [str(part) for part in loc[-1:]]
    return ".".join(parts) or "sweep"


def _known_fields(path: list[str]) -> list[str]:
    """Names of the fields that may stand under a path."""
    found = (model.model_fields.items() for model in _models_at(path))
    return [field.alias or name for fields in found for name, field in fields]


def _kinds(path: list[str]) -> list[str]:
    """The kinds that a section which is told apart by its ``kind`` may have."""
    fields = [model.model_fields["kind"].annotation for model in _models_at(path)]
    return [kind for field in fields for kind in get_args(field)]


def _models_at(path: list[str]) -> list[type[BaseModel]]:
    """What may stand at a path of the sweep; parts that are no field are dict keys."""
    models = [Sweep]
    for part in path:
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [m for a in annotations for m in _models(a)] or models
    return models


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def nearest(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(set(known)))}" if known else ""
