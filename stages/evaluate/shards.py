"""Requests and responses on disk, and how an evaluation's requests are cut into shards.

A shard is the unit of work that is written at once: an interrupted evaluation repeats the shards
that have no file yet. Light to import: no torch.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import groupby, islice

import pyarrow as pa

from stages.evaluate.base import Request, Response

REQUEST_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("context", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("max_new_tokens", pa.int32()),
        ("chat", pa.bool_()),
        ("reply", pa.string()),
        ("messages", pa.string()),
        ("stop", pa.list_(pa.string())),
        ("thoughts", pa.bool_()),
        ("window", pa.int32()),
        ("special_tokens", pa.bool_()),
        ("head", pa.bool_()),
        ("harness", pa.bool_()),
        ("technique", pa.string()),
        ("model", pa.string()),
        ("procedure", pa.string()),
        ("row", pa.string()),
    ]
)
RESPONSE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("logprobs", pa.list_(pa.float64())),
        ("tokens", pa.list_(pa.int32())),
        ("greedy", pa.list_(pa.bool_())),
        ("outputs", pa.list_(pa.float64())),
        ("text", pa.string()),
        ("finished", pa.bool_()),
        ("layers", pa.list_(pa.int32())),
        ("result", pa.string()),
    ]
)
PROCEDURE_WORK = 16
"""A row of a procedure counts as so many requests: it is many passes through the model."""
PROCEDURE, GENERATION, OTHER = range(3)
"""The kinds of shards, in their order."""
PART = 4096
"""Rows that are Python objects at once: they take many times the memory of a table's."""


@dataclass(frozen=True)
class Shard:
    """Requests that are answered together, and a name that only they have."""

    id: str
    """``shard_id`` of the requests."""
    table: pa.Table
    """A row for each (``REQUEST_SCHEMA``)."""

    @property
    def requests(self) -> list[Request]:
        """The requests, made anew each time."""
        return requests_from_table(self.table)


def plan_shards(requests: Iterable[Request], size: int) -> list[Shard]:
    """Cut requests into shards of at most ``size``, alike in kind and length.

    Requests that generate share no shard with others, nor do those of procedures, whose shards are
    smaller (``PROCEDURE_WORK``); the longest come first, so that a pool of workers ends with the
    short ones. The same requests in any order give the same shards.
    """
    table = requests_to_table(requests)
    del requests  # a list of them takes many times the memory of the table
    order = sorted(
        (_kind(request), -_length(request), request.id, start + place)
        for start in range(0, len(table), PART)
        for place, request in enumerate(requests_from_table(table.slice(start, PART)))
    )
    table = table.combine_chunks()
    shards = []
    for kind, members in groupby(order, key=lambda entry: entry[0]):
        rows = [row for *_, row in members]
        most = max(1, size // PROCEDURE_WORK) if kind == PROCEDURE else size
        for start in range(0, len(rows), most):
            part = table.take(rows[start : start + most])
            shards.append(Shard(shard_id(requests_from_table(part)), part))
    return shards


def shard_id(requests: Iterable[Request]) -> str:
    """First 16 hexadecimal digits of the sha256 of some requests' content, in order."""
    content = [_content(request) for request in requests]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _kind(request: Request) -> int:
    return PROCEDURE if request.procedure else GENERATION if request.generates else OTHER


def _content(request: Request) -> dict:
    """The fields that are not at their default, so that a new one renames no shard."""
    defaults = {field.name: field.default for field in fields(Request)}
    return {name: v for name, v in _row(request).items() if v != defaults[name]}


def _row(item: Request | Response) -> dict:
    """Its fields; unlike ``asdict`` it copies nothing."""
    return {field.name: getattr(item, field.name) for field in fields(item)}


def _length(request: Request) -> int:
    """About how much work a request is: its characters, and those it may generate."""
    return (
        len(request.context)
        + len(request.reply or "")
        + len(request.messages)
        + len(request.row)
        + sum(map(len, request.choices))
        + 4 * request.max_new_tokens
    )


def _table(items: Iterable[Request] | Iterable[Response], schema: pa.Schema) -> pa.Table:
    rows, batches = iter(items), []
    while part := [_row(item) for item in islice(rows, PART)]:
        batches.append(pa.RecordBatch.from_pylist(part, schema))
    return pa.Table.from_batches(batches, schema)


def requests_to_table(requests: Iterable[Request]) -> pa.Table:
    """One row per request, in order (``REQUEST_SCHEMA``)."""
    return _table(requests, REQUEST_SCHEMA)


def requests_from_table(table: pa.Table) -> list[Request]:
    """The inverse of ``requests_to_table``."""
    return [_read(Request, row) for row in table.to_pylist()]


def responses_to_table(responses: Iterable[Response]) -> pa.Table:
    """One row per response, in order (``RESPONSE_SCHEMA``)."""
    return _table(responses, RESPONSE_SCHEMA)


def responses_from_table(table: pa.Table) -> list[Response]:
    """The inverse of ``responses_to_table``."""
    return [_read(Response, row) for row in table.to_pylist()]


def _read(kind: type, row: dict) -> Request | Response:
    """A frozen dataclass from a row: lists become tuples, columns it does not know are left, and
    those that an older file lacks are at their default."""
    values = {each.name: row[each.name] for each in fields(kind) if each.name in row}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
