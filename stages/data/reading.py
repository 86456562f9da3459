"""Reading files of a published data set into the columns of its task."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from stages.data import files
from stages.data.pack_readers import MINORS
from stages.data.published import Form, Published
from stages.data.schema import shared
from stages.errors import BadInput


class Read(NamedTuple):
    """The rows of a split, what was left out of them, and how many were published."""

    table: pa.Table
    dropped: dict[str, int]
    rows: int
    """Rows before anything was left out."""


def read(published: Published, split: str, paths: list[Path], where: str) -> Read:
    """The rows of a published data set's split, from its files.

    ``where`` begins the messages. Raises BadInput for files that are none of the known forms.
    """
    tables = [_table(published, split, path, where) for path in paths]
    table = pa.concat_tables(tables, promote_options="permissive")
    rows, dropped = table.num_rows, {}
    if published.harmful:
        table, dropped["filtered"] = _without_minors(table)
    return Read(table, dropped, rows)


def _table(published: Published, split: str, path: Path, where: str) -> pa.Table:
    """One file's rows with the task's columns; a label that stands for none is null."""
    if published.original is not None and path.suffix == published.original_suffix:
        with files.readable(path, where):
            whole = published.original(path)
        form = _form(published, whole.column_names, path, where)
    else:
        found = files.columns(path, where)
        form = _form(published, found, path, where)
        wanted = [*form.reads, *({form.shared} & set(found) - set(form.reads))]
        whole = files.read(path, wanted, where, quoted=form.quoted)
    with files.readable(path, where):
        if form.derive is not None:
            whole = form.derive(whole)
        for column, values in form.keep.items():
            kept = pc.is_in(whole[column].cast(pa.string()), pa.array(values))
            whole = whole.filter(kept)
    table = pa.table({name: whole[column] for name, column in form.columns.items()})
    if "document" in form.columns:
        source = form.columns["document"]
        texts = {c for name, c in form.columns.items() if name not in ("id", "document")}
        table = _set(table, "document", _documents(table["document"], whole=source in texts))
    group = published.splits[split].shared_documents
    if group and form.shared in whole.column_names:
        if form.shared == form.columns.get("document"):
            table = _set(table, "document", shared(table["document"], group))
        else:
            sources = whole[form.shared].cast(pa.string()).combine_chunks()
            table = table.append_column("document", shared(sources, group))
    if form.labels:
        table = _set(table, "label", _labels(table["label"], form, f"{where}: {path}"))
    return table


def _form(published: Published, found: list[str], path: Path, where: str) -> Form:
    for form in published.forms:
        if set(form.reads) <= set(found):
            return form
    known = " or ".join(", ".join(form.reads) for form in published.forms)
    raise BadInput(
        f"{where}: {path} has the columns {', '.join(found)}; it needs {known} "
        f"(expected is {published.files})"
    )


def _set(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def _documents(column: pa.ChunkedArray, whole: bool) -> pa.Array:
    """Names of documents; a text that stands for its document is named by its digest.

    ``whole`` says that all are such texts, however short; otherwise only what is no name is one.
    """
    encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    names = [
        text if len(text) <= 64 and not whole else hashlib.sha256(text.encode()).hexdigest()[:16]
        for text in encoded.dictionary.to_pylist()
    ]
    return pa.array(names, pa.string()).take(encoded.indices)


def _labels(column: pa.ChunkedArray, form: Form, where: str) -> pa.Array:
    texts = pc.fill_null(column.cast(pa.string()), "").combine_chunks()
    encoded = texts.dictionary_encode()
    names = []
    for label in encoded.dictionary.to_pylist():
        if label not in form.labels and label not in form.unlabelled:
            raise BadInput(
                f"{where}: label {label!r} is none of {', '.join(form.labels)}; "
                "leave its rows out of the file"
            )
        names.append(form.labels.get(label))
    return pa.array(names, pa.string()).take(encoded.indices)


def _without_minors(table: pa.Table) -> tuple[pa.Table, int]:
    prompts = table["prompt"].to_pylist()
    kept = table.filter(pa.array([not MINORS.search(prompt or "") for prompt in prompts]))
    return kept, table.num_rows - kept.num_rows
