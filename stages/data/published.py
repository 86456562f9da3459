"""What is known about a published data set: where it lies, how it is laid out, what is owed to it.

One declaration a data set, in ``stages/data/catalogue/``. Nothing here reads or downloads, so the
planner may look everything up.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from stages.data.spec import Task


@dataclass(frozen=True)
class Hub:
    """A data set repository of the Hugging Face hub."""

    repository: str
    revision: str
    """A commit; or a branch, where no commit could be confirmed (``pinned`` is false then)."""

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, so that the content cannot change."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None


@dataclass(frozen=True)
class Web:
    """One file at an address."""

    url: str
    sha256: str | None = None
    """Of the file; None where it could not be confirmed."""

    @property
    def pinned(self) -> bool:
        """Whether the content cannot change: a checksum, or a commit in the address."""
        return self.sha256 is not None or re.search(r"/[0-9a-f]{40}/", self.url) is not None


@dataclass(frozen=True)
class Split:
    """One split as it was published."""

    files: tuple[str, ...] = ()
    """Patterns of its files in the hub repository; none where it lies elsewhere."""
    web: Web | None = None
    rows: int | None = None
    """Rows as published, before anything is left out; None where no source could be confirmed."""
    shared_documents: str = ""
    """The group of data sets that hold the same sources in other words, each of them named by
    ``Form.shared`` alike."""


@dataclass(frozen=True)
class Form:
    """One layout in which a data set is found: that of the hub, that of the authors' files …

    A file is read by the first form whose columns it has.
    """

    columns: dict[str, str]
    """Column of the task to column of the file. ``document`` may name a text column (a premise that
    several rows share); rows with the same text are then one document."""
    labels: dict[str, str] = field(default_factory=dict)
    """Label in the file to label of the task."""
    unlabelled: tuple[str, ...] = ()
    """Labels in the file that stand for none of the task's, such as "-" for no agreement; their
    rows are left out and counted."""
    keep: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Column to the values of the rows that belong to this data set."""
    derive: Callable[[pa.Table], pa.Table] | None = None
    """Computes columns that the file does not hold as such."""
    derived: int = 1
    """Version of what it computes, raised with every change, so that stored rows are stale."""
    needs: tuple[str, ...] = ()
    """Columns that ``derive`` reads."""
    makes: tuple[str, ...] = ()
    """Columns that ``derive`` makes."""
    shared: str = ""
    """Column that names the sources which a split has in common with other data sets, that of
    ``document`` or another; a file without it has its rows by themselves."""
    quoted: bool = False
    """A TSV file of this form quotes cells like a CSV file (written by pandas)."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns that a file must have."""
        named = (*self.columns.values(), *self.keep, *self.needs)
        return tuple(dict.fromkeys(name for name in named if name not in self.makes))


@dataclass(frozen=True)
class Published:
    """A data set of the catalogue."""

    task: Task
    title: str
    citation: str
    licence: str
    splits: dict[str, Split]
    """The first one is read where a source names none."""
    forms: tuple[Form, ...]
    hub: Hub | None = None
    gated: str = ""
    """How access is granted, where it is not open."""
    files: str = ""
    """What the authors' own files are called, for those who bring them with ``file:``."""
    pack: str | None = None
    """The source that reads it, or a part of it, from a pinned archive of a package index."""
    original: Callable[[Path], pa.Table] | None = None
    """Reads the authors' file, where it is not a table of a kind that ``files.py`` knows."""
    original_suffix: str = ""
    harmful: bool = False
    """Prompts that ask for harm; those that name minors are left out."""
    labels: tuple[str, ...] = ()
    """The task's labels."""

    def pin(self, split: str) -> str:
        """sha256 of where a split is read from and how, so that a changed declaration is stale."""
        part = self.splits[split]
        hub = (self.hub.repository, self.hub.revision) if self.hub and part.files else None
        web = (part.web.url, part.web.sha256) if part.web else None
        return _digest([hub, part.files, web, *self._reading(part)])

    def pin_of(self, digest: str, split: str) -> str:
        """The same of a user's file, by the sha256 of its content."""
        return _digest([digest, *self._reading(self.splits[split])])

    def _reading(self, part: Split) -> list:
        """All that decides which rows are made of a file."""
        forms = [(f.columns, f.labels, f.unlabelled, f.keep) for f in self.forms]
        derived = [form.derived for form in self.forms if form.derived > 1]
        quoted = [place for place, form in enumerate(self.forms) if form.quoted]
        later = [{"quoted": quoted}] if quoted else []
        if part.shared_documents:
            columns = [form.shared for form in self.forms]
            later.append({"shared": [part.shared_documents, columns]})
        return [forms, self.harmful, *derived, *later]

    def pinned(self, split: str) -> bool | None:
        """Whether what is brought cannot change; None where nothing can be brought."""
        part = self.splits[split]
        if part.web is not None:
            return part.web.pinned
        return self.hub.pinned if self.hub is not None and part.files else None

    def where(self, split: str) -> str:
        """Where a split lies, in words."""
        part = self.splits[split]
        if part.web is not None:
            return part.web.url
        if self.hub is not None and part.files:
            return f"hub:{self.hub.repository}@{self.hub.revision}"
        return "your own files"


def _digest(content: list) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
