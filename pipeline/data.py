"""``data list`` and ``data fetch``: which data sets there are, what a sweep needs, and getting it.

Imports no torch, Ray or DeepSpeed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.sweep import Sweep
from pipeline.sweep_file import located
from stages.data import downloads, packs
from stages.data.catalogue import CATALOGUE
from stages.data.sets import SETS, SIZES
from stages.data.sources import CatalogueSet, HubSet, KnownSet, LocalFile, check, load, parse
from stages.data.spec import DataSpec
from stages.errors import BadInput, StageFailed

_LEGEND = ("✓ on this machine, · to be downloaded, – a file that you bring "
           "(source: file:PATH, format: NAME) or a hub: source")


class Listed(NamedTuple):
    """One line of the list."""

    here: bool | None | str
    """Whether it is on this machine; None where it is not and this command cannot bring it, or
    where only the hub library's cache knows."""
    name: str
    task: str
    rows: str
    licence: str
    place: str


def catalogue_lines() -> list[str]:
    """Every data set that a sweep can name, with what of it is on this machine."""
    listed = [_source(f"catalogue:{name}", f"catalogue:{name}", None) for name in CATALOGUE]
    listed += [_source(source, source, None) for source in SETS]
    splits = ", ".join(f"#{split}" for split in CATALOGUE["snli"].splits)
    return [
        *_table(listed),
        "",
        _LEGEND,
        f"Further splits are named after the data set: catalogue:snli has {splits}.",
    ]


def sweep_lines(sweep: Sweep, folder: Path) -> list[str]:
    """The data sets of a sweep; ``folder`` is where its ``file:`` sources start."""
    return [
        *_table([
            _source(name, located(dataset.source, folder), dataset.format)
            for name, dataset in sweep.datasets.items()
        ]),
        "",
        _LEGEND,
    ]


def fetch_lines(sweep: Sweep, folder: Path) -> Iterator[tuple[bool, str]]:
    """Bring each data set of a sweep and read it: whether it is there, and a line about it."""
    width = max(map(len, sweep.datasets))
    for name, dataset in sweep.datasets.items():
        fields = {f: getattr(dataset, f) for f in DataSpec.model_fields}
        spec = DataSpec(**fields | {"source": located(dataset.source, folder)})
        try:
            content = check(spec, f"datasets.{name}")
            loaded = load(spec)
        except (BadInput, StageFailed) as error:
            yield False, f"✗ {name:<{width}}  {error}"
            continue
        sums = loaded.files or ({"sha256": content} if content else {})
        parts = [f"{loaded.table.num_rows:,} rows"]
        parts += [f"{rows:,} left out ({why})" for why, rows in loaded.dropped.items() if rows]
        parts += [loaded.note] if loaded.note else []
        parts += [f"{file} {digest[:12]}" for file, digest in sums.items()]
        yield True, f"✓ {name:<{width}}  {' · '.join(parts)}"


def _source(name: str, source: str, format: str | None) -> Listed:
    match parse(source, format=format):
        case KnownSet() as known:
            pack = source.partition(":")[2].partition("/")[0]
            pinned = packs.PACKS.get(pack)
            here = pinned is None or (packs.default_cache() / pinned.archive).exists()
            place = "part of this project"
            if pinned:
                place = f"{pinned.project} {pinned.version}, sha256 {pinned.sha256[:12]}"
            rows = f"{SIZES[source][0]:,}"
            return Listed(here, name, known.task, rows, known.licence, place)
        case CatalogueSet(published=published, split=split, path=path):
            rows = published.splits[split].rows
            pinned = published.pinned(split)
            own = path is not None or pinned is None
            found = path.exists() if path else bool(downloads.present(published, split))
            here = found or (None if own else False)
            place = str(path) if path else published.where(split)
            loose = " (not pinned)" if pinned is False and not path else ""
            gated = f"; access: {published.gated}" if published.gated and not here else ""
            return Listed(here, name, published.task, f"{rows:,}" if rows else "?",
                          published.licence, f"{place}{loose}{gated}")
        case LocalFile(path=path):
            return Listed(path.is_file() or None, name, "", "", "yours", str(path))
        case HubSet(repository=repository, revision=revision):
            return Listed(None, name, "", "", "see its page", f"hub:{repository}@{revision}")


def _table(listed: list[Listed]) -> list[str]:
    marks = {True: "✓", False: "·", None: "–", "": " "}
    listed = [Listed("", "name", "task", "rows", "licence", "where from"), *listed]
    widths = [max(len(row[column]) for row in listed) for column in range(1, 5)]
    return [
        f"{marks[row.here]} {row.name:<{widths[0]}}  {row.task:<{widths[1]}}  "
        f"{row.rows:>{widths[2]}}  {row.licence:<{min(widths[3], 40)}}  {row.place}"
        for row in listed
    ]
