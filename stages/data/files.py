"""Local files as Arrow tables, their text taken literally.

No cell is interpreted: "NA", "null", "1e5" and "2020-01-01" stay text. CSV quotes as RFC 4180 does;
TSV has no quoting at all (a quotation mark is a character), as its media type says. Every text file
is UTF-8 with a header line (CSV, TSV) or one object a line (JSONL). Bytes that are not are read as
Windows-1252, in which the dashes, quotation marks and accents of older files are written; lines
that have some are counted.
"""

import codecs
import csv
import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from stages.errors import BadInput

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".arrow")
_BLOCK = 16 * 2**20  # bytes; a row of a CSV file may not be longer
MIXED = "utf-8-or-windows-1252"
"""``errors`` of whatever opens a text file."""


def _windows_1252(error: UnicodeError) -> tuple[str, int]:
    stray = error.object[error.start : error.end]
    # Five bytes stand for nothing there.
    nothing = not set(stray).isdisjoint(b"\x81\x8d\x8f\x90\x9d")
    return stray.decode("latin-1" if nothing else "cp1252"), error.end


codecs.register_error(MIXED, _windows_1252)


def digest(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stray_lines(path: Path) -> int:
    """How many lines of a text file are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while block := file.read(_BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            file.seek(0)
            return sum(not _is_utf8(line) for line in file)
    return 0


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def readable(path: Path, where: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into BadInput."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, csv.Error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(
            f"{where}: {path} cannot be read as {path.suffix[1:]}: {reason}; "
            "mend the file or write it anew"
        ) from error


def columns(path: Path, where: str) -> list[str]:
    """The file's column names; raises BadInput where there is no such file, or none readable."""
    if not path.is_file():
        raise BadInput(f"{where}: {path} is not a file; check the path")
    if path.suffix not in SUFFIXES:
        raise BadInput(
            f"{where}: {path} is of no known kind; its name must end in {', '.join(SUFFIXES)}"
        )
    if path.stat().st_size == 0:
        raise BadInput(f"{where}: {path} is empty; give a file with rows")
    with readable(path, where):
        match path.suffix:
            case ".csv" | ".tsv":
                names = _csv_header(path)
            case ".jsonl":
                names = list(dict.fromkeys(name for row in _objects(path) for name in row))
            case ".parquet":
                names = pa.parquet.read_schema(path).names
            case ".arrow":
                names = _arrow(path).column_names
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise BadInput(f"{where}: {path} has two columns {repeated[0]!r}; rename one")
    return names


def read(path: Path, wanted: list[str], where: str, quoted: bool = False) -> pa.Table:
    """The wanted columns of a file, which must be among ``columns(path)``.

    ``quoted`` is for TSV files whose writer quotes cells like those of a CSV file.
    """
    with readable(path, where):
        match path.suffix:
            case ".csv" | ".tsv":
                return _csv(path, wanted, quoted or path.suffix == ".csv")
            case ".jsonl":
                rows = list(_objects(path))
                # Lists are made here: Arrow's own JSON reader turns dates in text into timestamps.
                return pa.table({name: [row.get(name) for row in rows] for name in wanted})
            case ".parquet":
                return pa.parquet.read_table(path, columns=wanted)
            case _:
                return _arrow(path).select(wanted)


def _csv_header(path: Path) -> list[str]:
    tsv = path.suffix == ".tsv"
    with path.open(encoding="utf-8-sig", newline="", errors=MIXED) as file:
        quoting = csv.QUOTE_NONE if tsv else csv.QUOTE_MINIMAL
        return next(csv.reader(file, delimiter="\t" if tsv else ",", quoting=quoting))


def _csv(path: Path, wanted: list[str], quoted: bool) -> pa.Table:
    source = path
    if stray_lines(path):
        source = io.BytesIO(path.read_bytes().decode("utf-8-sig", errors=MIXED).encode())
    return pa.csv.read_csv(
        source,
        read_options=pa.csv.ReadOptions(block_size=_BLOCK),
        parse_options=pa.csv.ParseOptions(
            delimiter="\t" if path.suffix == ".tsv" else ",",
            quote_char='"' if quoted else False,
            newlines_in_values=quoted,
        ),
        convert_options=pa.csv.ConvertOptions(
            include_columns=wanted,
            column_types={name: pa.string() for name in wanted},
            strings_can_be_null=False,
        ),
    )


def _objects(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig", errors=MIXED) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not an object")
                yield row


def _arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        try:
            return pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:  # `datasets` writes streams
            source.seek(0)
            return pa.ipc.open_stream(source).read_all()
