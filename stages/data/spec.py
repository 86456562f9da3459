"""What the data stage is told, and the schema that each task's Parquet files follow."""

from typing import Annotated, Literal

from pydantic import Field

from stages.spec import Seed, Spec

Task = Literal[
    "classification",
    "nli",
    "paraphrase",
    "prompts",
    "multiple_choice",
    "statements",
    "open_question",
    "text",
    "instructions",
    "images",
]

DISJOINT, TRAINED = "disjoint/", "trained/"
"""Input roles: data sets whose texts are left out, as a sweep asks or since models learn them."""

# Columns of a task's Parquet files, besides `id` (unique in the data set) and `document` (rows of
# one document are never told apart by a split and are resampled together by the bootstrap).
TASK_COLUMNS: dict[Task, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "nli": ("premise", "hypothesis", "label"),
    # Do two sentences or questions mean the same?
    "paraphrase": ("sentence1", "sentence2", "label"),
    "prompts": ("prompt", "category"),
    # `answer` is the index of the one right choice.
    "multiple_choice": ("question", "choices", "answer", "context"),
    # True and false statements about one question (TruthfulQA); the best answer is a true one and
    # may or may not be among the correct answers; the best incorrect one came in 2025.
    "statements": (
        *("question", "best_answer", "correct_answers", "incorrect_answers"),
        *("best_incorrect_answer", "category"),
    ),
    # Closed book: any of the answers is right.
    "open_question": ("question", "answers", "category"),
    # Running text, for perplexity.
    "text": ("text",),
    "instructions": ("prompt", "response"),
    # Encoded bytes (PNG, JPEG …).
    "images": ("image", "label"),
}
SHARED = "="
"""Begins the name of a document that is the same source in every data set that has it:
``=GROUP/DOCUMENT``."""
LABELLED: frozenset[Task] = frozenset({"classification", "nli", "paraphrase", "images"})
TEMPLATED: frozenset[Task] = LABELLED - {"images"}
"""Labelled texts, which a template turns into prompts."""
# May be absent from a user's file; filled with an empty string.
OPTIONAL_COLUMNS = frozenset({"best_incorrect_answer", "category", "context"})


class Corruption(Spec):
    """What images are made worse by (``stages/data/corruptions.py``)."""

    kind: Literal["noise", "blur", "contrast"]
    level: Annotated[int, Field(ge=1, le=5)]


class DataSpec(Spec):
    """One data set: where it comes from and how it is cut."""

    task: Task
    source: str
    """``catalogue:NAME[#SPLIT]`` (a published data set, ``stages/data/catalogue/``),
    ``pack:PACK/SET`` or ``builtin:SET`` (``stages/data/sets.py``), ``file:PATH`` (CSV, TSV,
    JSONL, Parquet, Arrow; for images also a folder with one folder per label, or IDX files) or
    ``hub:OWNER/NAME[:CONFIG]@REVISION#SPLIT`` (a label column of the hub's class-label type is read
    as its names)."""
    format: str | None = None
    """``NAME[#SPLIT]`` of the catalogue in whose own format a ``file:`` source is, for a published
    data set that the user brings."""
    content: str | None = None
    """sha256 of the file, pinned archive or catalogue entry, filled in by the planner, so that an
    edited file is stale."""
    columns: dict[str, str] = {}
    """Column of the task's schema to column of the source, where the names differ."""
    labels: dict[str, str] = {}
    """Label of the source to label of the task, where they differ (tasks with labels). Rows whose
    label stands for none (``schema.UNLABELLED``) are left out, unless it is named here."""
    shared_documents: Annotated[str, Field(min_length=1)] | None = None
    """Name of a group of data sets, in which the same ``document`` is the same source: a text here
    and its rewrites there. They are one bootstrap cluster, and at equal seed and shares no split
    tells them apart."""
    splits: dict[str, Annotated[float, Field(gt=0, le=1)]] = {"test": 1.0}
    """Split name to share of the documents; the shares sum to at most 1."""
    rows: dict[str, Annotated[int, Field(gt=0)]] = {}
    """Most rows kept of a split, drawn by the seed (a uniform sample over rows)."""
    rows_per_label: dict[str, Annotated[int, Field(gt=0)]] = {}
    """Most rows kept of each label of a split, drawn likewise, before ``rows`` (tasks with
    labels)."""
    seed: Seed = 0
    corruption: Corruption | None = None
    """Images only: the same rows, corrupted."""

    def identity(self) -> dict:
        """A data set without what was added later is what it was before."""
        identity = super().identity()
        for added in ("corruption", "rows_per_label", "shared_documents"):
            if not getattr(self, added):
                del identity[added]
        return identity
