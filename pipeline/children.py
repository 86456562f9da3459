"""What of a sweep is logged: its checkpoints with their scores, and a fingerprint of it all.

Needs no MLflow, so that a command that changed nothing is told so without it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.sweep import UNTUNED
from stages.finetune.spec import CURVE_FILE
from stages.models.card import ModelCard

if TYPE_CHECKING:
    import pandas as pd

TIMES = ("seconds", "tokens_per_second", "model_flops_utilisation", "validation_seconds")
"""Columns of a training curve that depend on the machine."""
DIGEST = 32
"""Characters of a digest; MLflow allows 36."""


@dataclass(frozen=True)
class DataInput:
    """A split that a model was trained or evaluated on."""

    name: str
    """``<dataset>/<split>``"""
    digest: str
    source: str
    rows: int
    use: str = "evaluation"
    """``evaluation`` or ``training``"""


@dataclass(frozen=True)
class Child:
    """One checkpoint, how it came to be and what it scored."""

    model: str
    recipe: str
    """``none`` for an untuned model."""
    seed: int
    pairs: tuple[str, ...]
    """Names of the pairs that the model is in."""
    card: ModelCard
    metrics: dict[str, dict[str, dict[str, float]]]
    """Evaluation to metric to value, ci_low, ci_high and n, as ``summarise`` gives them."""
    scores_digest: str
    """Digest of the score tables, or of the fingerprints that name them."""
    checkpoint_uri: str
    started: float
    """Seconds since 1970, from the manifests, as is ``finished``: they date every point."""
    finished: float
    params: dict[str, object] = dataclasses.field(default_factory=dict)
    """What identifies the child besides its name: the recipe's fields."""
    curve: "pd.DataFrame | None" = None
    """Columns ``step``, ``seconds`` (of each step) and the curves to log; NaN is left out."""
    data: tuple[DataInput, ...] = ()
    artifacts: tuple[Path, ...] = ()
    """Small files to keep with the run."""

    @property
    def name(self) -> str:
        """How the run is called."""
        if self.recipe == UNTUNED:
            return f"{self.model} · untuned"
        return f"{self.model} · {self.recipe} · seed {self.seed}"

    @property
    def fingerprint(self) -> str:
        """Digest of the content; when it was made plays no part."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("started", "finished"):
            del fields[name]
        curve = fields.pop("curve")
        fields |= {
            "card": self.card.model_dump(mode="json"),
            "data": [dataclasses.astuple(each) for each in self.data],
            # The file of the curve has times in it; what counts of it is below.
            "artifacts": digests(file for file in self.artifacts if file.name != CURVE_FILE),
            "curve": None if curve is None else _content(curve),
        }
        return digest(fields)


def content_fingerprint(sweep: str, children: Sequence[Child], report: Path | None) -> str:
    """Digest of everything that ``Tracker.log_sweep`` would log; needs no MLflow."""
    files = [] if report is None else sorted(p for p in report.rglob("*") if p.is_file())
    return digest([sweep, [child.fingerprint for child in children], digests(files)])


def _content(curve: "pd.DataFrame") -> str:
    """A training curve without what depends on the machine."""
    return curve.drop(columns=list(TIMES), errors="ignore").to_csv(index=False)


def digests(files: Iterable[Path]) -> list[list[str]]:
    """Name and sha256 of each file."""
    return [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]


def digest(content: object) -> str:
    """Digest of JSON content, as short as MLflow wants it."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST]
