"""One stage of a sweep's graph, and what its result is known by."""

import hashlib
import json
from dataclasses import dataclass

from pipeline.sweep import Resources
from stages.spec import Spec


@dataclass(frozen=True)
class Node:
    """One stage of the sweep's graph."""

    stage: str
    name: str
    spec: Spec
    inputs: dict[str, str]
    """Role to the key of the upstream node."""
    resources: Resources
    fingerprint: str
    content: str
    """What stands for it in the fingerprints of what reads it: its own, but for a data set from
    which texts that are trained on are left out. Which rows these are counts there, and not where
    they were looked for, so that one more training set leaves scores as they are."""
    left_out: str = ""
    """Digest of those rows, once the data set is made and there are some."""
    found: str | None = None
    """Folder in which another sweep stored this very result, under a name of its own."""
    part_of: str | None = None
    """Folder of the fine-tune whose first steps these are; it holds the resumable state."""

    @property
    def key(self) -> str:
        """Unique in the plan: ``<stage>/<name>``."""
        return f"{self.stage}/{self.name}"

    @property
    def folder(self) -> str:
        """Where its result lies in the store."""
        return self.found or f"{self.key}@{self.fingerprint}"

    @property
    def work_folder(self) -> str:
        """Where the resumable state of its work lies."""
        return self.part_of or self.folder


def fingerprint(stage: str, spec: Spec, inputs: dict[str, str]) -> str:
    """What a result is known by; ``inputs`` are the fingerprints of its inputs, by role."""
    content = {"stage": stage, "version": spec.VERSION, "spec": spec.identity(), "inputs": inputs}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
