"""What lm-evaluation-harness says about a task before any data is there: for the planner.

Only definitions are read; of a task that is written as a class, the module that defines it. The
harness's own index of its 15,000 tasks takes seconds to make, so the names, kinds and files in it
are kept beside the other downloads, once per version.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import uuid
from collections.abc import Iterator
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING

import numpy as np

from stages.data.packs import default_cache
from stages.errors import BadInput
from stages.evaluate.harness import GroupMeasure, Harness, HarnessTask, Measure
from stages.evaluate.harness_sums import AGGREGATIONS, aggregation

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

PREFIX = "lm_eval:"
OUTPUT_TYPES = ("loglikelihood", "loglikelihood_rolling", "generate_until")
"""What the harness asks a model for; a multiple choice is several of the first."""
REMEDY = (
    "needs the package lm-eval, which is not installed; `pip install 'moe-reliability[lm-eval]'`"
)


def describe(name: str, include_path: Path | None = None) -> Harness:
    """The leaf tasks of a task, group or tag, and how they are measured.

    ``include_path`` is a folder with task files of one's own, which go before the harness's. Raises
    BadInput, reason and remedy, for what cannot be evaluated here.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInput(REMEDY)
    if include_path is not None and not include_path.is_dir():
        raise BadInput(f"include_path {include_path} is no folder; name the one with your tasks")
    index = manager(name, include_path).task_index
    if name not in index:
        raise BadInput(f"lm-evaluation-harness has no task {name!r}{_nearest(name, index)}")
    leaves = list(_leaves(name, {}, index))
    tasks = tuple(_task(leaf, config) for leaf, config in leaves)
    group = tuple(_group_measures(_config(index[name]), tasks))
    kinds = {measure.aggregation for task in tasks for measure in task.measures}
    if not any(map(aggregation, kinds)):
        how = f"are summed up by {', '.join(sorted(kinds))}" if kinds else "are none"
        raise BadInput(
            f"the metrics of {name} {how}, which is no function of sums over examples; choose "
            "another task"
        )
    return Harness(
        version=importlib.metadata.version("lm_eval"),
        digest=_digest(leaves, include_path),
        tasks=tasks,
        group=group,
    )


def manager(name: str, include_path: Path | None) -> "TaskManager":
    """The harness's manager of tasks, with all that ``name`` may refer to.

    A task or tag of one's own is found without the harness's index.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind

    found = TaskManager(
        include_path=None if include_path is None else str(include_path), include_defaults=False
    )
    own = found.task_index.get(name)
    if own is None or own.kind is Kind.GROUP:
        for other, entry in _known().items():
            found.task_index.setdefault(other, entry)
    return found


@lru_cache(maxsize=1)
def _known() -> dict:
    """The harness's index, without the content of the definitions."""
    import lm_eval.tasks
    from lm_eval.tasks._index import Entry, Kind

    root = Path(lm_eval.tasks.__file__).parent
    version = importlib.metadata.version("lm_eval")
    file = default_cache().parent / f"lm_eval-{version}.json"
    if not file.exists():
        listed = {
            name: [
                entry.kind.name,
                str(entry.yaml_path.relative_to(root)) if entry.yaml_path else None,
                sorted(entry.tags),
            ]
            for name, entry in lm_eval.tasks.TaskManager().task_index.items()
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{uuid.uuid4().hex[:8]}")
        partial.write_text(json.dumps(listed))
        os.replace(partial, file)
    return {
        name: Entry(name, Kind[kind], root / place if place else None, tags=set(tags))
        for name, (kind, place, tags) in json.loads(file.read_text()).items()
    }


def _nearest(name: str, index: dict) -> str:
    close = get_close_matches(name, list(index), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "; `lm-eval ls tasks` lists them"


def _config(entry) -> dict:
    """A definition with what it includes; functions are named and not imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {}


def _leaves(name: str, overrides: dict, index: dict) -> Iterator[tuple[str, dict]]:
    """The tasks that a name stands for, each with its definition."""
    from lm_eval.config.group import GroupConfig
    from lm_eval.tasks._index import Kind

    entry = index[name]
    if entry.kind is Kind.TAG:
        for each in sorted(entry.tags):
            yield from _leaves(each, overrides, index)
        return
    config = _config(entry)
    if entry.kind is not Kind.GROUP:
        yield name, config | overrides
        return
    structure = set(GroupConfig.__dataclass_fields__)
    inherited = {k: v for k, v in config.items() if k not in structure} | overrides
    yield from _members(name, config["task"], inherited, index)


def _members(group: str, members: list, overrides: dict, index: dict):
    for member in members:
        entry = {"task": member} if isinstance(member, str) else member
        if "group" in entry and entry["group"] not in index:
            yield from _members(group, entry["task"], overrides, index)
            continue
        name = entry.get("group") or entry.get("task")
        if name is None:
            raise BadInput(f"the harness's definition of {group} holds a task without a name; "
                           "choose another task")
        own = {k: v for k, v in entry.items() if k not in ("group", "task")}
        if name not in index:  # defined on the spot
            yield f"{group}::{name}", overrides | own
        else:
            yield from _leaves(name, overrides | own, index)


def _task(name: str, config: dict) -> HarnessTask:
    """What a definition says about a task's metrics."""
    from lm_eval.api import registry

    written = _class(name, config) if "class" in config else None
    reason = None
    if config.get("unsafe_code") or getattr(written, "UNSAFE_CODE", False):
        reason = "runs code that the model writes"
    elif (
        config.get("doc_to_image") or config.get("doc_to_audio")
        or getattr(written, "MULTIMODAL", False)
    ):  # fmt: skip
        reason = "shows images or sounds to the model"
    elif samples(config.get("generation_kwargs") or {}):
        reason = "samples its answers, so that its numbers cannot be reproduced item by item"
    if reason:
        raise BadInput(f"{name} {reason}; choose another task")
    kind = config.get("output_type", "generate_until")
    found = _of_class(name, written) if written else None
    if found is None:
        listed = config.get("metric_list") or [
            {"metric": metric} for metric in registry.DEFAULT_METRIC_REGISTRY[kind]
        ]
        found = {_called(entry["metric"]): _summed(entry) for entry in listed}
    filters = [each["name"] for each in config.get("filter_list") or [{"name": "none"}]]
    measures = [
        Measure(metric=metric, filter=filter, aggregation=summed, higher_is_better=better)
        for metric, (summed, better) in found.items()
        for filter in filters
        if metric != "bypass"
    ]
    output_types = _asked_by(written, kind) if written else (kind,)
    return HarnessTask(name=name, output_types=output_types, measures=tuple(measures))


def _summed(entry: dict) -> tuple[str, bool]:
    """How an entry of a definition's metrics is summed up, and whether higher is better."""
    from lm_eval.api import registry

    metric, summed = _called(entry["metric"]), entry.get("aggregation")
    if summed is None:
        summed = _name_of(registry.get_metric_aggregation(metric))
    better = entry.get("higher_is_better")
    if better is None:
        better = registry.is_higher_better(metric)
    # One of the task's own may have the name of a registered one.
    return summed.rpartition(os.sep)[2], better is not False


def _name_of(function: object) -> str:
    """The registered name of a function that sums up, else its module and name."""
    from lm_eval.api import registry

    # Several names may stand for one function; ours is the first.
    names = {registry.get_aggregation(known): known for known in reversed(AGGREGATIONS)}
    names |= {np.mean: "mean", np.nanmean: "nanmean"}
    if function in names:
        return names[function]
    named = getattr(function, "func", function)  # of a partial
    # A module of a folder of one's own is named by its path.
    module = getattr(named, "__module__", "").rpartition(os.sep)[2].rpartition(".")[2]
    return f"{module}.{getattr(named, '__name__', type(named).__name__)}"


def _class(name: str, config: dict) -> "type[Task]":
    """The class that a task is written as."""
    from lm_eval.tasks._yaml_loader import _import_func_in_yml

    named = Path(config["class"])
    try:
        return _import_func_in_yml(named.name, named.parent)
    except Exception as error:  # of the task's own code
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise BadInput(
            f"{name} is written as a class, whose module fails with {type(error).__name__}: "
            f"{reason}; choose another task"
        ) from error


def _of_class(name: str, written: "type[Task]") -> dict[str, tuple[str, bool]] | None:
    """How each metric of a class is summed up, and whether higher is better; None where that
    stands in its definition, as of tasks without a class."""
    from lm_eval.api.task import ConfigurableTask

    if written.aggregation is ConfigurableTask.aggregation:
        return None
    try:
        bare = object.__new__(written)  # to make it properly needs its data
        better = bare.higher_is_better()
        return {
            metric: (_name_of(function), better.get(metric) is not False)
            for metric, function in bare.aggregation().items()
        }
    except Exception as error:  # of the task's own code
        raise BadInput(
            f"{name} is written as a class that knows its metrics only with its data; choose "
            "another task"
        ) from error


def _asked_by(written: "type[Task]", kind: str) -> tuple[str, ...]:
    """What a class asks the model for: the harness's names in the code that makes its requests."""
    from lm_eval.api.task import ConfigurableTask

    named: set[str] = set()
    if written.construct_requests is not ConfigurableTask.construct_requests:
        codes = [written.construct_requests.__code__]
        while codes:
            constants = codes.pop().co_consts
            codes += [each for each in constants if isinstance(each, CodeType)]
            named |= {each for each in constants if isinstance(each, str)}
    return tuple(each for each in OUTPUT_TYPES if each in named) or (written.OUTPUT_TYPE or kind,)


def samples(generation: dict) -> bool:
    """Whether generation settings draw tokens at random, as the ``hf`` backend understands them."""
    return generation.get("do_sample", float(generation.get("temperature") or 0) > 0)


def _called(named: str) -> str:
    """The name of a function that a definition refers to by file, or of a registered one."""
    return named.rpartition(".")[2] if os.sep in named else named


def _group_measures(config: dict, tasks: tuple[HarnessTask, ...]) -> Iterator[GroupMeasure]:
    """What a group's definition says about its own numbers."""
    listed = config.get("aggregate_metric_list") if "group" in config else None
    for entry in [listed] if isinstance(listed, dict) else listed or []:
        measures = (m for task in tasks for m in task.measures)
        there = {m.filter for m in measures if m.metric == entry["metric"]}
        filters = entry.get("filter_list")
        filters = [filters] if isinstance(filters, str) else filters or sorted(there)
        measured = [filter for filter in filters if filter in there]
        if measured and isinstance(entry.get("aggregation", "mean"), str):
            yield GroupMeasure(
                metric=entry["metric"],
                filters=tuple(measured),
                weight_by_size=bool(entry.get("weight_by_size", True)),
            )


def _digest(leaves: list[tuple[str, dict]], include_path: Path | None) -> str:
    """Of the definitions; of a folder of one's own, of all files in it."""
    text = json.dumps(leaves, sort_keys=True, default=str)
    # Where a function lies on this machine does not matter.
    found = hashlib.sha256(re.sub(r"\"/[^\"]*/", '"', text).encode())
    for file in sorted(include_path.rglob("*")) if include_path is not None else ():
        if file.is_file() and "__pycache__" not in file.parts:
            found.update(str(file.relative_to(include_path)).encode() + b"\0")
            found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:16]
