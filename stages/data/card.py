"""The card that lies beside the splits of a data set as ``card.json``."""

import json
from pathlib import Path

from pydantic import BaseModel

from stages.data.spec import Task

CARD_FILE = "card.json"


class DataCard(BaseModel):
    """Origin and size of a prepared data set."""

    source: str
    task: Task
    content: str | None
    """sha256 of what it was read from."""
    licence: str
    seed: int
    rows: dict[str, int]
    """Split to number of rows."""
    labels: dict[str, dict[str, int]]
    """Split to label to number of rows; empty unless the task has labels."""
    documents: dict[str, int]
    """Split to number of documents."""
    dropped: dict[str, int]
    """Reason (neutral, no label, filtered, empty, duplicates, overlap) to number of rows left out
    of all splits. Rows beyond ``DataSpec.rows`` and beyond the shares are not counted here."""
    digest: dict[str, str]
    """Split to sha256 of its rows, one JSON object a line."""
    citation: str = ""
    """What to cite, for a data set of the catalogue."""
    files: dict[str, str] = {}
    """Name to sha256 of each file that was read, for a data set of the catalogue."""
    note: str = ""
    """Where the number of rows found is not the published one."""
    left_out: str = ""
    """Digest of the texts that are left out since they are trained on; empty without any."""

    def write(self, folder: Path) -> None:
        """Write the card into a data folder."""
        (folder / CARD_FILE).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "DataCard":
        """Read the card of a data folder."""
        return cls(**json.loads((folder / CARD_FILE).read_text()))
