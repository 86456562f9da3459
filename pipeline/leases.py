"""Leases: commands that share a store take turns at a node.

Resumable work, shards of responses and training checkpoints, has one place in the store, and two
commands that wrote there at once would spoil each other's. A command that is about to work at a
place writes a file there, looks for files of others, and withdraws its own if there is one: of two
that come at once at least one sees the other. As long as it works it renews the file. A file that
was not renewed, or whose process is gone from this machine, belongs to a command that was killed.

Ages are differences of modification times that the store itself gave, so machines' clocks need not
agree.
"""

import os
import random
import socket
import time
import uuid

from pyarrow import fs

from pipeline.store import Store

PREFIX = "working-"
STALE = 60.0
"""Seconds without renewal after which the command that held a lease is taken to be dead."""
_RENEWED = 15.0
"""Seconds between two renewals."""


class Leases:
    """The places of a store that one command works at."""

    def __init__(self, store: Store):
        self.store = store
        self._file = f"{PREFIX}{uuid.uuid4().hex[:8]}.json"
        self._holder = {"host": socket.gethostname(), "process": os.getpid()}
        self._held: set[str] = set()
        self._renewed = time.monotonic()
        self._busy: dict[str, tuple[float, str]] = {}
        """Place to when to look again, and who was there."""

    def take(self, place: str) -> str | None:
        """Who else works at a folder of the store; None if from now on this command does."""
        again, who = self._busy.get(place, (0.0, ""))
        if time.monotonic() < again:
            return who
        self.store.write_json(f"{place}/{self._file}", self._holder)
        other = self._other(place)
        if other is None:
            self._held.add(place)
            return None
        self._delete(place, self._file)
        # Two that withdrew because of each other must not meet again and again.
        self._busy[place] = time.monotonic() + random.uniform(1.0, 4.0), other
        return other

    def renew(self) -> None:
        """Show that the command is alive; to be called every second or so."""
        if time.monotonic() - self._renewed > _RENEWED:
            self._renewed = time.monotonic()
            for place in self._held:
                self.store.write_json(f"{place}/{self._file}", self._holder)

    def release(self, place: str) -> None:
        """Let others work at a folder."""
        self._held.discard(place)
        self._delete(place, self._file)

    def close(self) -> None:
        """Let others work at all folders."""
        for place in list(self._held):
            self.release(place)

    def _other(self, place: str) -> str | None:
        selector = fs.FileSelector(f"{self.store.root}/{place}")
        found = {info.base_name: info.mtime_ns for info in self.store.fs.get_file_info(selector)
                 if info.base_name.startswith(PREFIX) and info.base_name.endswith(".json")}
        now = found.pop(self._file)
        for name, renewed in sorted(found.items()):
            holder = self.store.read_json(f"{place}/{name}")
            if holder is None:  # it is finished
                continue
            if now - renewed > STALE * 1e9 or self._gone(holder):
                self._delete(place, name)
                continue
            return f"process {holder['process']} of {holder['host']}"
        return None

    def _gone(self, holder: dict) -> bool:
        if holder["host"] != self._holder["host"]:
            return False
        try:
            os.kill(holder["process"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's
            return False
        return False

    def _delete(self, place: str, name: str) -> None:
        try:
            self.store.fs.delete_file(f"{self.store.root}/{place}/{name}")
        except FileNotFoundError:  # somebody else found it stale, or the folder was deleted
            pass
