"""Data stage: a source becomes Parquet splits that share no document and no text.

In order: rows without text are left out, then all but one of the rows with the same normalised
text, then rows whose text occurs in a ``disjoint/`` or ``trained/`` input; what is left is split
by document and each split is cut to its number of rows. All of it depends on the rows and the
seed, not on the order in which the source lists them.
"""

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from stages.data.card import DataCard
from stages.data.corruptions import corrupted
from stages.data.schema import SCHEMAS, keys, without_text
from stages.data.sources import load
from stages.data.spec import DISJOINT, SHARED, TRAINED, DataSpec
from stages.errors import BadInput, StageFailed


def run(spec: DataSpec, inputs: dict[str, Path], output: Path) -> None:
    """Prepare a data set.

    Each input role ``disjoint/<dataset>`` or ``trained/<dataset>`` is the folder of another
    prepared data set; rows that stand in any of its splits are left out. Writes
    ``<split>.parquet`` (``SCHEMAS``) and ``card.json``.
    """
    try:
        loaded = load(spec)
    except BadInput as error:
        raise StageFailed(str(error)) from error
    lacking = without_text(loaded.table)
    table = _identified(loaded.table.filter(pc.invert(lacking)), spec)
    asked, trained = (
        _texts(folder for role, folder in inputs.items() if role.startswith(kind))
        for kind in (DISJOINT, TRAINED)
    )
    table, duplicates, left_out = _distinct(table, spec, asked, trained)
    if not table.num_rows and left_out.rows:
        others = ", ".join(role.partition("/")[2] for role in inputs)
        raise StageFailed(
            f"{spec.source}: each of the {left_out.rows} distinct rows has a text of {others}; "
            "give the data set `disjoint_from: []` to keep them"
        )
    splits = _split(table, spec)
    for split, part in splits.items():
        if part.num_rows == 0:
            raise StageFailed(
                f"{spec.source}: split {split!r} gets none of the {table.num_rows} distinct rows; "
                "raise its share or give a source with more documents"
            )
        if spec.corruption is not None:
            splits[split] = part = corrupted(part, spec.corruption, spec.seed)
        pa.parquet.write_table(part, output / f"{split}.parquet", compression="zstd")
    dropped = {
        "empty": pc.sum(lacking).as_py(),
        "duplicates": duplicates,
        "overlap": left_out.rows,
    }
    DataCard(
        source=spec.source,
        task=spec.task,
        content=spec.content,
        licence=loaded.licence,
        seed=spec.seed,
        rows={split: part.num_rows for split, part in splits.items()},
        labels={
            split: dict(sorted(Counter(part["label"].to_pylist()).items()))
            for split, part in splits.items()
            if "label" in part.column_names
        },
        documents={
            split: pc.count_distinct(part["document"]).as_py() for split, part in splits.items()
        },
        dropped={**loaded.dropped, **dropped},
        digest={split: _digest(part) for split, part in splits.items()},
        citation=loaded.citation,
        files=loaded.files,
        note=loaded.note,
        left_out=left_out.trained,
    ).write(output)


def _identified(table: pa.Table, spec: DataSpec) -> pa.Table:
    """The table sorted by id; where the source has no ids they are digests of the rows."""
    if "id" not in table.column_names:
        ids = [_hash(_line(row))[:16] for row in table.to_pylist()]
        table = table.append_column("id", pa.array(ids, pa.string()))
    if "document" not in table.column_names:
        table = table.append_column("document", table["id"])
    return table.select(SCHEMAS[spec.task].names).cast(SCHEMAS[spec.task]).sort_by("id")


class LeftOut(NamedTuple):
    """Rows that stand in other data sets."""

    rows: int
    trained: str
    """Digest of the texts of those that are trained on and not asked for; empty without any."""


def _texts(folders: Iterable[Path]) -> set[str]:
    """The normalised texts of all splits of data sets."""
    return {
        text
        for folder in folders
        for path in folder.glob("*.parquet")
        for text in keys(pa.parquet.read_table(path), DataCard.read(folder).task)
    }


def _distinct(
    table: pa.Table, spec: DataSpec, asked: set[str], trained: set[str]
) -> tuple[pa.Table, int, LeftOut]:
    """The first row of each normalised text, less those in other data sets; how many others had
    the same text, and what was left out."""
    first = {key: place for place, key in reversed(list(enumerate(keys(table, spec.task))))}
    left_out = asked.union(trained).intersection(first)
    taught = sorted(left_out - asked)
    kept = sorted(place for key, place in first.items() if key not in left_out)
    digest = _hash("\n".join(taught)) if taught else ""
    return (
        table.take(pa.array(kept, pa.int64())),
        table.num_rows - len(first),
        LeftOut(len(left_out), digest),
    )


def _split(table: pa.Table, spec: DataSpec) -> dict[str, pa.Table]:
    """Cut the seed's permutation of the documents at the shares, then draw rows of each split.

    Documents that other data sets have too are cut by their places in [0, 1), which no other
    document moves, so that a split here has no document of another split there.
    """
    hashes = {name: _hash(f"{spec.seed}/document/{name}") for name in table["document"].to_pylist()}
    documents = sorted(hashes, key=hashes.get)
    places = [int(hashes[name][:13], 16) / 16**13 for name in documents]
    alone = not any(name.startswith(SHARED) for name in documents)
    splits, start, share = {}, 0, 0.0
    # By name: a fingerprint does not see the order in which a sweep lists its splits.
    for split in sorted(spec.splits):
        share += spec.splits[split]
        end = round(share * len(documents)) if alone else bisect.bisect_left(places, share)
        chosen = pa.array(documents[start:end], pa.string())
        splits[split] = _draw(table.filter(pc.is_in(table["document"], chosen)), split, spec)
        start = end
    return splits


def _draw(table: pa.Table, split: str, spec: DataSpec) -> pa.Table:
    limit = spec.rows.get(split, table.num_rows)
    ids = table["id"].to_pylist()
    order = sorted(range(len(ids)), key=lambda place: _hash(f"{spec.seed}/row/{ids[place]}"))
    if split in spec.rows_per_label:
        labels = table["label"].to_pylist()
        by_label: dict[str, list[int]] = {}
        for place in order:
            by_label.setdefault(labels[place], []).append(place)
        kept = {p for places in by_label.values() for p in places[: spec.rows_per_label[split]]}
        order = [place for place in order if place in kept]
    return table.take(pa.array(sorted(order[:limit]), pa.int64()))


def _digest(table: pa.Table) -> str:
    lines = (_line(row, ensure_ascii=False) for row in table.to_pylist())
    return _hash("\n".join(lines))


def _line(row: dict, **options: bool) -> str:
    """A row as one JSON object; an image stands for itself by its digest."""
    return json.dumps(
        row, sort_keys=True, default=lambda image: hashlib.sha256(image).hexdigest(), **options
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
