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
    the active parameters of the matrix products (embedding look-up left out, head counted). Of an
    encoder-decoder, of one token that is read and one that is written."""
    flops_per_read_token: int | None = None
    """The part of them that is a token's that the encoder reads: the encoder's, and the keys and
    values with which the decoder attends to it. None where there is no encoder."""
    flops_per_expert: int = 0
    """The part of them that one routed expert of each sparse layer is."""
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

    def flops(self, read: float, written: float) -> float:
        """Operations of a forward pass over so many tokens of prompts and of answers."""
        return forward_flops(self.flops_per_token, self.flops_per_read_token, read, written)

    @classmethod
    def read(cls, folder: Path) -> "ModelCard":
        """Read the card of a checkpoint's folder."""
        return cls(**json.loads((folder / CARD_FILE).read_text()))


def forward_flops(
    per_token: int, per_read_token: int | None, read: float, written: float
) -> float:
    """Operations of a forward pass, from the fields of a card: tokens of prompts pass an encoder
    and those of answers its decoder, where there is one, and else all pass the whole model."""
    if per_read_token is None:
        return (read + written) * per_token
    return read * per_read_token + written * (per_token - per_read_token)
