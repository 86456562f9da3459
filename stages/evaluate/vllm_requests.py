"""Generations as vLLM is asked for them, and its tokens as responses.

Needs a folder's tokenizer and configuration and none of its weights.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from stages.evaluate.base import Request, Response
from stages.evaluate.generate import answer, end_tokens, prompt_tokens
from stages.evaluate.scorer import most_positions
from stages.evaluate.techniques import SelfConsistency, read, sample_seed
from stages.models.load import load_tokenizer


class Interpreter:
    """Between this project's requests and vLLM, for one checkpoint's folder."""

    def __init__(self, folder: Path):
        self.tokenizer = load_tokenizer(folder)
        self.config = json.loads((folder / "config.json").read_text())
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.longest = most_positions(config)
        try:
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except OSError:  # as a model does that is loaded from a folder without one
            generation = GenerationConfig.from_model_config(config)
        self.ends = end_tokens(generation, self.tokenizer)

    def prompt(self, request: Request) -> list[int]:
        """The prompt's tokens, the same that ``generate`` reads."""
        return prompt_tokens(self.tokenizer, request, self.longest)

    def sampling(self, request: Request) -> dict:
        """Arguments of ``vllm.SamplingParams``: greedy, or drawn as self-consistency says, with a
        seed of the request's own.

        Nothing but the end tokens here and the stop texts ends an answer early, and no setting of
        the checkpoint's acts.
        """
        technique = read(request.technique) if request.technique else None
        drawn = isinstance(technique, SelfConsistency)
        return {
            "temperature": technique.temperature if drawn else 0.0,
            # Of no effect where nothing is drawn: a number, so that all rows have the same types.
            "seed": sample_seed(technique.seed, request.id) if drawn else 0,
            "max_tokens": request.max_new_tokens,
            "ignore_eos": True,
            "stop_token_ids": sorted(self.ends),
            "stop": list(request.stop),
            # Only for the stop texts, which are looked for among special tokens as well.
            "detokenize": bool(request.stop),
            "skip_special_tokens": False,
        }

    def response(self, request: Request, tokens: Sequence[int]) -> Response:
        """The response that vLLM's tokens make, of which the last may be an end token."""
        tokens = [int(token) for token in tokens]
        ended = bool(tokens) and tokens[-1] in self.ends
        if ended:
            tokens.pop()
        text = self.tokenizer.decode(tokens) if request.stop else ""
        stopped = any(stop in text for stop in request.stop)
        return answer(self.tokenizer, request, tokens, ended or stopped)
