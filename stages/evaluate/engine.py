"""One loaded checkpoint that answers requests of every evaluation."""

from collections.abc import Sequence
from pathlib import Path

import torch

from stages.evaluate.base import Request, Response
from stages.evaluate.generate import generate
from stages.evaluate.scorer import score
from stages.models.load import load, load_tokenizer


class Engine:
    """A model and its tokenizer, read once from a Hugging Face folder.

    ``dtype`` names a torch type, ``device`` a torch device; ``threads`` is the number of CPU
    threads of this process from now on (``None`` leaves it as it is). Raises StageFailed for a
    folder that cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int | None = None,
        trust_remote_code: bool = False,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        self.model = load(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        self.tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """A response for each request, in their order; the same list gives the same responses."""
        choosing = [request for request in requests if request.choices]
        generating = [request for request in requests if not request.choices]
        scored = iter(score(self.model, self.tokenizer, choosing))
        generated = iter(generate(self.model, self.tokenizer, generating))
        return [next(scored if request.choices else generated) for request in requests]
