"""What the data stage is told, and the schema that each task's Parquet files follow."""

from typing import Annotated, Literal

from pydantic import Field

from stages.spec import Spec

Task = Literal["classification", "prompts", "multiple_choice", "instructions"]

# Columns of a task's Parquet files, besides `id` (unique in the data set) and `document` (rows of
# one document are never told apart by a split and are resampled together by the bootstrap).
TASK_COLUMNS: dict[str, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "prompts": ("prompt", "category"),
    "multiple_choice": ("question", "choices", "answer", "context"),
    "instructions": ("prompt", "response"),
}
# May be absent from a user's file; filled with an empty string.
OPTIONAL_COLUMNS = frozenset({"category", "context"})


class DataSpec(Spec):
    """One data set: where it comes from and how it is cut."""

    task: Task
    source: str
    """``pack:PACK/SET`` or ``builtin:SET`` (``stages/data/sets.py``), ``file:PATH`` (CSV, TSV,
    JSONL, Parquet, Arrow) or ``hub:OWNER/NAME[:CONFIG]@REVISION#SPLIT`` (a label column of the
    hub's class-label type is read as its names)."""
    content: str | None = None
    """sha256 of the file or pinned archive, filled in by the planner, so that an edited file is
    stale."""
    columns: dict[str, str] = {}
    """Column of the task's schema to column of the source, where the names differ."""
    labels: dict[str, str] = {}
    """Label of the source to label of the task, where they differ (classification)."""
    splits: dict[str, Annotated[float, Field(gt=0, le=1)]] = {"test": 1.0}
    """Split name to share of the documents; the shares sum to at most 1."""
    rows: dict[str, Annotated[int, Field(gt=0)]] = {}
    """Most rows kept of a split, drawn by the seed (a uniform sample over rows)."""
    seed: int = 0
