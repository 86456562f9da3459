"""What lm-evaluation-harness says about a task before any data is there: for the planner.

Only definitions are read. The harness's own index of its 15,000 tasks takes seconds to make, so the
names, kinds and files in it are kept beside the other downloads, once per version.
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
from typing import TYPE_CHECKING

from stages.data.packs import default_cache
from stages.errors import BadInput
from stages.evaluate.harness import AGGREGATIONS, GroupMeasure, Harness, HarnessTask, Measure

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PREFIX = "lm_eval:"
REMEDY = (
    "needs the package lm-eval, which is not installed; `pip install 'moe-reliability[lm-eval]'`"
)


def describe(name: str, include_path: Path | None = None) -> Harness:
    """The leaf tasks of a task or group, and how they are measured.

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
    usable = [m for task in tasks for m in task.measures if m.aggregation in AGGREGATIONS]
    if not usable:
        kinds = sorted({m.aggregation for task in tasks for m in task.measures})
        raise BadInput(
            f"the metrics of {name} are summed up by {', '.join(kinds)}, which is no function of "
            "sums over examples; choose another task"
        )
    return Harness(
        version=importlib.metadata.version("lm_eval"),
        digest=_digest(leaves, include_path),
        tasks=tasks,
        group=group,
    )


def manager(name: str, include_path: Path | None) -> "TaskManager":
    """The harness's manager of tasks, with all that ``name`` may refer to.

    A task of one's own that stands alone is found without the harness's index.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind

    found = TaskManager(
        include_path=None if include_path is None else str(include_path), include_defaults=False
    )
    own = found.task_index.get(name)
    if own is None or own.kind is not Kind.TASK:
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
        raise BadInput(
            f"{name} is a tag: several tasks without a number of their own; name them one by one: "
            f"{', '.join(sorted(entry.tags)[:8])}"
        )
    config = _config(entry)
    if entry.kind is not Kind.GROUP:
        yield name, config | overrides
        return
    structure = set(GroupConfig.__dataclass_fields__)
    inherited = {k: v for k, v in config.items() if k not in structure} | overrides
    yield from _members(name, config["task"], inherited, index)


def _members(group: str, members: list, overrides: dict, index: dict):
    from lm_eval.tasks._index import Kind

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
        elif index[name].kind is Kind.TAG:
            for each in sorted(index[name].tags):
                yield from _leaves(each, overrides | own, index)
        else:
            yield from _leaves(name, overrides | own, index)


def _task(name: str, config: dict) -> HarnessTask:
    """What a definition says about a task's metrics."""
    from lm_eval.api import registry

    reason = None
    if "class" in config:
        reason = "is written as a class, whose metrics are known only with its data"
    elif config.get("unsafe_code"):
        reason = "runs code that the model writes"
    elif config.get("doc_to_image") or config.get("doc_to_audio"):
        reason = "shows images or sounds to the model"
    elif samples(config.get("generation_kwargs") or {}):
        reason = "samples its answers, so that its numbers cannot be reproduced item by item"
    if reason:
        raise BadInput(f"{name} {reason}; choose another task")
    kind = config.get("output_type", "generate_until")
    listed = config.get("metric_list") or [
        {"metric": metric} for metric in registry.DEFAULT_METRIC_REGISTRY[kind]
    ]
    filters = [each["name"] for each in config.get("filter_list") or [{"name": "none"}]]
    names = {
        registry.get_aggregation(known): known
        for known in AGGREGATIONS  # several names may stand for one function; ours is the first
    }
    measures = []
    for entry in listed:
        metric = _called(entry["metric"])
        aggregation = entry.get("aggregation")
        if aggregation is None:
            function = registry.get_metric_aggregation(metric)
            aggregation = names.get(function, getattr(function, "__name__", "nothing"))
        better = entry.get("higher_is_better")
        if better is None:
            better = registry.is_higher_better(metric)
        measures += [
            Measure(
                metric=metric,
                filter=filter,
                aggregation=_called(aggregation),
                higher_is_better=better is not False,
            )
            for filter in filters
            if metric != "bypass"
        ]
    return HarnessTask(name=name, output_type=kind, measures=tuple(measures))


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
                weight_by_size=entry.get("weight_by_size", True),
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
