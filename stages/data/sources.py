"""Where data comes from: what a source's name means, whether it can work, and its table.

``check`` is for the planner: it imports nothing heavy and reads local files only.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from stages.data import downloads, files, images
from stages.data.catalogue import find
from stages.data.published import Published
from stages.data.reading import read
from stages.data.schema import SCHEMAS, Conformed, conform, source_columns
from stages.data.sets import SETS, KnownSet
from stages.data.spec import LABELLED, DataSpec, Task
from stages.errors import BadInput, StageFailed

_HUB = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[^@#]+))?@(?P<revision>[^@#]+)#(?P<split>[^#]+)"
)
_SCHEMES = ("catalogue", "pack", "builtin", "file", "hub")
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class LocalFile:
    """``file:PATH``."""

    path: Path


@dataclass(frozen=True)
class HubSet:
    """``hub:OWNER/NAME[:CONFIG]@REVISION#SPLIT``."""

    repository: str
    config: str | None
    revision: str
    split: str


@dataclass(frozen=True)
class CatalogueSet:
    """``catalogue:NAME[#SPLIT]``, or a file in that format."""

    name: str
    published: Published
    split: str
    path: Path | None = None


Source = KnownSet | LocalFile | HubSet | CatalogueSet


class Loaded(NamedTuple):
    """A source's rows in the schema of the task, what its reader left out, and its licence."""

    table: pa.Table
    dropped: dict[str, int]
    licence: str
    citation: str = ""
    files: dict[str, str] = {}
    """Name to sha256 of each file read."""
    note: str = ""


def parse(source: str, where: str = "source", format: str | None = None) -> Source:
    """What a source's name stands for; raises BadInput for a name that stands for nothing.

    ``format`` is the data set of the catalogue as which a file is read.
    """
    scheme, _, rest = source.partition(":")
    if format is not None:
        if scheme != "file" or not rest:
            raise BadInput(
                f"{where}: {source!r} is no file, so `format` cannot act; "
                "remove format or give file:PATH"
            )
        published, split = find(format, f"{where.removesuffix('source')}format")
        return CatalogueSet(format, published, split, Path(rest).expanduser())
    if scheme == "catalogue":
        published, split = find(rest, where)
        return CatalogueSet(rest, published, split)
    if scheme == "file" and rest:
        return LocalFile(Path(rest).expanduser())
    if scheme == "hub":
        match = _HUB.fullmatch(rest)
        if match is None:
            raise BadInput(
                f"{where}: {source!r} is not of the form hub:OWNER/NAME[:CONFIG]@REVISION#SPLIT; "
                "give the revision and the split"
            )
        return HubSet(**match.groupdict())
    if source in SETS:
        return SETS[source]
    if scheme in ("pack", "builtin"):
        near = difflib.get_close_matches(source, SETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BadInput(
            f"{where}: there is no data set {source!r}; {hint}known are {', '.join(SETS)}"
        )
    near = difflib.get_close_matches(scheme, _SCHEMES, n=1)
    hint = f"did you mean {near[0]}:? " if near else ""
    raise BadInput(
        f"{where}: {source!r} must begin with one of "
        f"{', '.join(f'{name}:' for name in _SCHEMES)}; {hint}a local file is file:PATH"
    )


def group_of(spec: DataSpec) -> str | None:
    """The group of data sets that hold the same documents, as the sweep or the catalogue says it;
    raises BadInput for a source that stands for nothing."""
    source = parse(spec.source, format=spec.format)
    if isinstance(source, CatalogueSet):
        return source.published.splits[source.split].shared_documents or None
    return spec.shared_documents


def origin(spec: DataSpec) -> str:
    """The source, of the catalogue with the split that is read where none is named; raises
    BadInput for a source that stands for nothing."""
    source = parse(spec.source, format=spec.format)
    if isinstance(source, CatalogueSet) and source.path is None:
        return f"{spec.source.partition('#')[0]}#{source.split}"
    return spec.source


def task_of(source: str, format: str | None, where: str) -> Task | None:
    """The task of a source that determines it; raises BadInput for a name of nothing."""
    match parse(source, where, format):
        case KnownSet(task=task):
            return task
        case CatalogueSet(published=published):
            return published.task
    return None


def check(spec: DataSpec, field: str) -> str | None:
    """Refuse a data set that cannot work, before any work starts; raises BadInput.

    ``field`` is its place in the sweep, for the messages. Returns the sha256 of what the data is
    read from (file, or pinned archive), to be stored in ``DataSpec.content``; None for a hub source
    which its revision pins.
    """
    _check_cut(spec, field)
    where = f"{field}.source"
    source = parse(spec.source, where, spec.format)
    if isinstance(source, KnownSet):
        _check_known(spec, field, source.task, source.labels)
        return source.content
    if isinstance(source, CatalogueSet):
        if spec.shared_documents is not None:
            raise BadInput(
                f"{field}.shared_documents: the catalogue says itself which documents "
                f"{spec.format or spec.source} shares with others; remove this field"
            )
        _check_known(spec, field, source.published.task, source.published.labels)
        if source.path is None:
            return source.published.pin(source.split)
        # A published data set that is not there yet is a gap in the table, no mistake.
        if not source.path.exists():
            return None
        read(source.published, source.split, [source.path], where)
        return _content(source)
    if isinstance(source, LocalFile):
        _read_file(source.path, spec, where)
        return _content(source)
    return None


def _content(source: CatalogueSet | LocalFile) -> str:
    """sha256 of a user's file or folder, and of how it is read where a declaration says that."""
    if isinstance(source, CatalogueSet):
        return source.published.pin_of(files.digest(source.path), source.split)
    path = source.path
    return images.digest(path) if images.holds_images(path) else files.digest(path)


def _check_known(spec: DataSpec, field: str, task: Task, labels: tuple[str, ...]) -> None:
    """Refuse fields that contradict what a source is known to hold."""
    name = spec.format or spec.source
    if spec.task != task:
        raise BadInput(
            f"{field}.task: {name} is of task {task}, not {spec.task}; set task: {task}"
        )
    if spec.columns:
        raise BadInput(f"{field}.columns: {name} has the columns of its task; remove this field")
    undeclared = sorted(set(labels) - set(spec.labels)) if spec.labels else []
    if undeclared:
        raise BadInput(
            f"{field}.labels: {name} has the labels {', '.join(labels)}; "
            f"add {undeclared[0]} or remove this field"
        )


def _check_cut(spec: DataSpec, field: str) -> None:
    if not spec.splits:
        raise BadInput(f"{field}.splits: names no split; set splits: {{test: 1.0}}")
    for name in spec.splits:
        if not _SPLIT_NAME.fullmatch(name):
            raise BadInput(f"{field}.splits: {name!r} names a file; use letters, digits, _ and -")
    total = sum(spec.splits.values())
    if total > 1 + 1e-9:
        raise BadInput(f"{field}.splits: the shares sum to {total:g}; lower them to 1 or less")
    for limit in ("rows", "rows_per_label"):
        for name in sorted(set(getattr(spec, limit)) - set(spec.splits)):
            raise BadInput(
                f"{field}.{limit}: there is no split {name!r}; name one of {', '.join(spec.splits)}"
            )
    known = SCHEMAS[spec.task].names
    for name in sorted(set(spec.columns) - set(known)):
        raise BadInput(
            f"{field}.columns: task {spec.task} has no column {name!r}; "
            f"name one of {', '.join(known)}"
        )
    for given in ("labels", "rows_per_label"):
        if getattr(spec, given) and spec.task not in LABELLED:
            raise BadInput(f"{field}.{given}: task {spec.task} has no labels; remove this field")
    if spec.corruption is not None and spec.task != "images":
        raise BadInput(f"{field}.corruption: task {spec.task} has no images; remove this field")


def load(spec: DataSpec) -> Loaded:
    """Read a source into its task's schema; raises BadInput or StageFailed."""
    source, where = parse(spec.source, format=spec.format), spec.source
    if isinstance(source, CatalogueSet):
        return _load_published(source, spec, where)
    if isinstance(source, KnownSet):
        rows = source.read()
        table = pa.Table.from_pylist(rows.rows, schema=SCHEMAS[source.task])
        chosen = source_columns(table.column_names, spec, where)
        table, dropped = conform(table, chosen, spec, where)
        return Loaded(table, rows.dropped | dropped, source.licence)
    if isinstance(source, LocalFile):
        found = _read_file(source.path, spec, where)
        _check_unchanged(source, spec, where)
        note = _stray([source.path]) if spec.task != "images" else ""
        return Loaded(*found, "that of the user's file", note=note)
    return Loaded(*_read_hub(source, spec, where), f"see the data set's page, {source.repository}")


def _check_unchanged(source: CatalogueSet | LocalFile, spec: DataSpec, where: str) -> None:
    if spec.content is not None and _content(source) != spec.content:
        raise StageFailed(f"{where}: the file was edited after the plan was made; run it again")


def _load_published(source: CatalogueSet, spec: DataSpec, where: str) -> Loaded:
    published, split = source.published, source.split
    if source.path is None:
        paths = downloads.bring(source.name, published, split)
    else:
        paths = [source.path]
        if not source.path.exists():
            ask = f"; access: {published.gated}" if published.gated else ""
            raise StageFailed(
                f"{where}: there is no such file; put {published.files} there{ask}"
            )
        _check_unchanged(source, spec, where)
    found = read(published, split, paths, where)
    expected = published.splits[split].rows
    notes = [_stray(paths) if published.task != "images" else ""]
    if expected is not None and found.rows != expected:
        notes.append(f"{found.rows:,} rows, published are {expected:,}")
    chosen = source_columns(found.table.column_names, spec, where)
    table, dropped = conform(found.table, chosen, spec, where)
    return Loaded(
        table,
        dropped | found.dropped,
        published.licence,
        published.citation,
        {path.name: files.digest(path) for path in paths},
        "; ".join(filter(None, notes)),
    )


def _stray(paths: list[Path]) -> str:
    """What is to be said of lines that are not UTF-8."""
    texts = [path for path in paths if path.suffix not in (".parquet", ".arrow")]
    lines = sum(map(files.stray_lines, texts))
    return f"lines that are not UTF-8, read as Windows-1252: {lines:,}" if lines else ""


def _read_file(path: Path, spec: DataSpec, where: str) -> Conformed:
    if spec.task == "images" and images.holds_images(path):
        table = images.read(path, where)
        return conform(table, source_columns(table.column_names, spec, where), spec, where)
    found = files.columns(path, where)
    where = f"{where}: {path}"
    chosen = source_columns(found, spec, where)
    table = files.read(path, sorted(set(chosen.values())), where)
    return conform(table, chosen, spec, where)


def _read_hub(source: HubSet, spec: DataSpec, where: str) -> Conformed:
    import datasets

    try:
        dataset = datasets.load_dataset(
            source.repository, source.config, split=source.split, revision=source.revision
        )
    except Exception as error:  # of many libraries: network, authentication, formats
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StageFailed(
            f"{where}: could not be loaded: {reason}; check the name, the network and HF_TOKEN"
        ) from error
    chosen = source_columns(dataset.column_names, spec, where)
    table = dataset.with_format("arrow")[:].select(sorted(set(chosen.values())))
    feature = dataset.features[chosen["label"]] if "label" in chosen else None
    if isinstance(feature, datasets.ClassLabel):
        place = table.column_names.index(chosen["label"])
        numbers = table[chosen["label"]].to_pylist()
        # -1 stands for a hidden label and has no name.
        names = [feature.names[n] if n is not None and n >= 0 else n and str(n) for n in numbers]
        table = table.set_column(place, chosen["label"], pa.array(names, pa.string()))
    return conform(table, chosen, spec, where)
