"""The card that lies beside every checkpoint as ``card.json``."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

CARD_FILE = "card.json"


class ModelCard(BaseModel):
    """Size and origin of a checkpoint, counted from its weights."""

    architecture: Literal["moe", "dense"]
    family: str
    """``model_type`` of the Hugging Face configuration."""
    total_parameters: int
    active_parameters: int
    """Parameters that one token uses: all but the experts that its routers did not choose."""
    flops_per_token: int
    """Floating-point operations of one token's forward pass, without the attention scores: twice
    the active parameters of the matrix products (embedding look-up left out, head counted)."""
    experts: int = 0
    top_k: int = 0
    moe_layers: tuple[int, ...] = ()
    layers: int
    origin: str
    """How it came to be, in one line for the report (source, upcycled from …, fine-tuned …)."""
    notes: dict[str, float | int | str] = {}
    """Measured facts, such as the logit difference of function preservation."""

    def write(self, folder: Path) -> None:
        """Write the card into a checkpoint's folder."""
        (folder / CARD_FILE).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "ModelCard":
        """Read the card of a checkpoint's folder."""
        return cls(**json.loads((folder / CARD_FILE).read_text()))
