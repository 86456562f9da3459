"""The Arrow schema of each task's Parquet files, and how a source's table is brought into it."""

import difflib
import hashlib
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from stages.data.spec import LABELLED, OPTIONAL_COLUMNS, SHARED, TASK_COLUMNS, DataSpec, Task
from stages.errors import BadInput

_LISTS = ("choices", "answers", "correct_answers", "incorrect_answers")
_TYPES = {
    "answer": pa.int64(),
    "image": pa.binary(),
    **dict.fromkeys(_LISTS, pa.list_(pa.string())),
}

SCHEMAS: dict[Task, pa.Schema] = {
    task: pa.schema([(name, _TYPES.get(name, pa.string())) for name in ("id", "document", *names)])
    for task, names in TASK_COLUMNS.items()
}

# The columns whose text, joined, says whether two rows ask the same. A question without its passage
# may be generic ("What happened next?").
_KEY_COLUMNS: dict[Task, tuple[str, ...]] = {
    "classification": ("text",),
    "nli": ("premise", "hypothesis"),
    "paraphrase": ("sentence1", "sentence2"),
    "prompts": ("prompt",),
    "multiple_choice": ("question", "context"),
    "statements": ("question",),
    "open_question": ("question",),
    "text": ("text",),
    "instructions": ("prompt",),
}
# Rows without content in one of these are of no use and are left out.
_CONTENT_COLUMNS = frozenset(
    {
        *("text", "premise", "hypothesis", "sentence1", "sentence2"),
        *("prompt", "question", "best_answer", "response"),
    }
)

UNLABELLED = frozenset({"", "-", "-1"})
"""What stands in the place of a label that nobody agreed on or that is hidden; null is read as
empty. One that a data set's ``labels`` name is a label."""


class Conformed(NamedTuple):
    """A table in its task's schema, and for which reason how many rows were left out of it."""

    table: pa.Table
    dropped: dict[str, int]


def normalise(text: str) -> str:
    """Unicode NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def keys(table: pa.Table, task: Task) -> list[str]:
    """Per row, the normalised text by which duplicates and overlaps are found; for images the
    digest of their bytes."""
    if task == "images":
        return [hashlib.sha256(image).hexdigest() for image in table["image"].to_pylist()]
    parts: Iterable[list[str]] = [table[name].to_pylist() for name in _KEY_COLUMNS[task]]
    return [normalise("\n".join(row)) for row in zip(*parts, strict=True)]


def source_columns(found: list[str], spec: DataSpec, where: str) -> dict[str, str]:
    """Column of the task's schema to column of the source, for those that the source has.

    Raises BadInput where a required or mapped column is missing.
    """
    chosen = {}
    optional = OPTIONAL_COLUMNS | {"id", "document"}
    if spec.shared_documents is not None:
        optional -= {"document"}
    for name in SCHEMAS[spec.task].names:
        source = spec.columns.get(name, name)
        if source in found:
            chosen[name] = source
        elif name in spec.columns or name not in optional:
            near = difflib.get_close_matches(source, found, n=1) or ["NAME"]
            raise BadInput(
                f"{where}: there is no column {source!r} (there are {', '.join(found)}); "
                f"set columns: {{{name}: {near[0]}}}"
            )
    return chosen


def conform(table: pa.Table, chosen: dict[str, str], spec: DataSpec, where: str) -> Conformed:
    """The table in its task's schema, less ``id`` and ``document`` where the source has none.

    Rows without a label (``UNLABELLED``) are left out and counted, those without text stay, see
    ``without_text``. Checks ids (given once each), labels (among the declared ones) and lists of
    answers; raises BadInput.
    """
    if table.num_rows == 0:
        raise BadInput(f"{where}: holds no rows; give a source with rows")
    dropped = {}
    if spec.task in LABELLED:
        labels = _column(table[chosen["label"]], "label", pa.string(), where)
        labelled = pc.invert(_unlabelled(labels, spec))
        dropped["no label"] = table.num_rows - pc.sum(labelled).as_py()
        if dropped["no label"] == table.num_rows:
            raise BadInput(
                f"{where}: none of its {table.num_rows} rows has a label; "
                "map label to another column or give a source with labels"
            )
        if dropped["no label"]:
            table = table.filter(labelled)
    schema = SCHEMAS[spec.task]
    made = {}
    for name in schema.names:
        if name in chosen:
            made[name] = _column(table[chosen[name]], name, schema.field(name).type, where)
        elif name in OPTIONAL_COLUMNS:
            made[name] = pa.array([""] * table.num_rows)
    if "id" in made:
        _check_given(made["id"], "id", where)
        repeated = [c["values"] for c in pc.value_counts(made["id"]).to_pylist() if c["counts"] > 1]
        if repeated:
            raise BadInput(
                f"{where}: id {repeated[0]!r} stands on several rows ({len(repeated)} such ids); "
                "make ids unique or map id to another column"
            )
    if "document" in made:
        _check_given(made["document"], "document", where)
        if spec.shared_documents is not None:
            made["document"] = shared(made["document"], spec.shared_documents)
    if spec.task in LABELLED:
        made["label"] = _labels(made["label"], spec, where)
    for name in _LISTS:
        if name in made:
            _check_list(made[name], name, where)
    if spec.task == "multiple_choice":
        _check_answers(made["choices"], made["answer"], where)
    return Conformed(pa.table(made), dropped)


def shared(documents: pa.Array, group: str) -> pa.Array:
    """Documents under names that they have in every data set of a group (``SHARED``)."""
    return pc.binary_join_element_wise(SHARED + group, documents, "/")


def without_text(table: pa.Table) -> pa.ChunkedArray:
    """Per row, whether one of its texts (prompt, premise, response …) is missing or blank, or its
    image."""
    if "image" in table.column_names:
        return pc.equal(pc.binary_length(table["image"]), 0)
    lacking = pa.chunked_array([pa.array([False] * table.num_rows)])
    for name in _CONTENT_COLUMNS & set(table.column_names):
        lacking = pc.or_(lacking, pc.equal(pc.utf8_trim_whitespace(table[name]), ""))
    return lacking


def _column(column: pa.ChunkedArray, name: str, wanted: pa.DataType, where: str) -> pa.Array:
    found = column.type
    if pa.types.is_dictionary(found):
        found = found.value_type
    textual = pa.types.is_string(found) or pa.types.is_large_string(found)
    textual = textual or pa.types.is_string_view(found) or pa.types.is_null(found)
    if wanted == pa.string():
        # Names may be numbers; text that is a number means that the wrong column was chosen.
        name_like = pa.types.is_integer(found) or pa.types.is_boolean(found)
        fits = textual or (name in ("id", "document", "label") and name_like)
    elif wanted == pa.int64():
        fits = pa.types.is_integer(found)
    elif wanted == pa.binary():
        if pa.types.is_struct(found) and found.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")  # the hub's type of images
            found = column.type
        fits = pa.types.is_binary(found) or pa.types.is_large_binary(found)
    else:
        fits = pa.types.is_list(found) or pa.types.is_large_list(found)
    if fits:
        try:
            cast = column.cast(wanted).combine_chunks()
        except pa.ArrowException:
            fits = False
    if not fits:
        kinds = {pa.string(): "text", pa.int64(): "whole numbers", pa.binary(): "encoded images"}
        kind = kinds.get(wanted, "lists of texts")
        raise BadInput(
            f"{where}: column {name} holds {found}, not {kind}; map it to another column "
            "(only JSONL, Parquet and Arrow hold lists and numbers)"
        )
    # A missing text or label is an empty one; a missing name is an error of its own.
    empty = {pa.string(): "", pa.binary(): b""}
    return pc.fill_null(cast, empty[wanted]) if wanted in empty else cast


def _check_given(column: pa.Array, name: str, where: str) -> None:
    missing = pc.sum(pc.equal(column, "")).as_py()
    if missing:
        raise BadInput(
            f"{where}: {missing} of {len(column)} rows have no {name}; "
            "fill them in or leave those rows out of the source"
        )


def _unlabelled(labels: pa.Array, spec: DataSpec) -> pa.Array:
    """Per row, whether it has no label."""
    marks = pa.array(sorted(UNLABELLED - set(spec.labels)), pa.string())
    return pc.is_in(pc.utf8_trim_whitespace(labels), marks)


def _labels(column: pa.Array, spec: DataSpec, where: str) -> pa.Array:
    if not spec.labels:
        return column
    encoded = column.dictionary_encode()
    found = encoded.dictionary.to_pylist()
    unknown = sorted(set(found) - set(spec.labels))
    if unknown:
        raise BadInput(
            f"{where}: label {unknown[0]!r} is not among the declared ones "
            f"({', '.join(spec.labels)}); add it to labels or leave its rows out of the source"
        )
    return pa.array([spec.labels[label] for label in found]).take(encoded.indices)


def _check_list(column: pa.Array, name: str, where: str) -> None:
    least, many = (2, "two or more choices") if name == "choices" else (1, f"one or more {name}")
    for number, texts in enumerate(column.to_pylist()):
        if not texts or len(texts) < least or not all(texts):
            raise BadInput(
                f"{where}: row {number} needs {many}, none of them empty; it has "
                f"{texts}; mend or remove it"
            )


def _check_answers(choices: pa.Array, answers: pa.Array, where: str) -> None:
    for number, (options, answer) in enumerate(
        zip(choices.to_pylist(), answers.to_pylist(), strict=True)
    ):
        if answer is None or not 0 <= answer < len(options):
            raise BadInput(
                f"{where}: row {number} has answer {answer}, which must be the index of one of its "
                f"{len(options)} choices (0 to {len(options) - 1}); mend or remove it"
            )
