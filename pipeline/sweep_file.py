"""Reading a sweep file: YAML 1.2, ``--set``, and one line for each thing that is wrong.

Reading imports no torch, Ray or DeepSpeed, so that a wrong file is refused at once. Every problem
becomes one line ``FILE: FIELD: reason; remedy``.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.search.spec import ALGORITHMS
from pipeline.sweep import Sweep
from stages.data.sources import task_of
from stages.errors import BadInput
from stages.evaluate.harness_tasks import PREFIX, describe
from stages.evaluate.registry import KINDS


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


def located(source: str, folder: Path) -> str:
    """A ``file:`` source from the sweep's folder."""
    scheme, _, rest = source.partition(":")
    return f"file:{folder / rest}" if scheme == "file" and rest else source
