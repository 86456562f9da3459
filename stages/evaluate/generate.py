"""Greedy decoding of many prompts at once; a prompt that has ended leaves the batch.

``model.generate`` goes on computing ended prompts until the last one of their batch ends; answers
of very different lengths (a refusal, an essay) make that most of the work. Sampling defaults that a
checkpoint carries in its ``generation_config.json`` have no effect here, except its end tokens.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.evaluate.base import Request, Response
from stages.evaluate.scorer import beginning, independent, prompt

# Tokens of a batch, padding and those still to come included: bounds the key-value cache.
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}


@dataclass
class Decoding:
    """One prompt and what the model has said to it so far."""

    request: Request
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    """Generated, the end token left out."""
    finished: bool = False

    @property
    def length(self) -> int:
        """Tokens that the prompt and its longest answer take."""
        return len(self.prompt) + self.request.max_new_tokens


def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    batch_tokens: int | None = None,
) -> list[Response]:
    """A response for each request, in their order: the most probable next token at each step.

    Decoding ends at an end token of the checkpoint or after ``max_new_tokens``; the text is without
    special tokens, the number of tokens without the end token. A prompt too long for the model's
    context loses tokens from its left.
    """
    longest = getattr(model.config, "max_position_embeddings", sys.maxsize)
    decodings = []
    for request in requests:
        text, special = prompt(tokenizer, request)
        tokens = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        tokens = tokens[-max(1, longest - request.max_new_tokens) :] or [beginning(tokenizer)]
        decodings.append(Decoding(request, tokens))
    if not independent(model):
        batch_tokens = 1
    batch_tokens = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
    stops = _end_tokens(model, tokenizer)
    for batch in _batches(decodings, batch_tokens):
        _decode(model, batch, stops)
    return [
        Response(
            each.request.id,
            tokens=(len(each.tokens),),
            text=tokenizer.decode(each.tokens, skip_special_tokens=True),
            finished=each.finished,
        )
        for each in decodings
    ]


def _end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> set[int]:
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return {*stops, tokenizer.eos_token_id} - {None}


def _batches(decodings: list[Decoding], batch_tokens: int) -> Iterator[list[Decoding]]:
    """Decodings of about equal length, longest first; at least one in each batch."""
    batch: list[Decoding] = []
    for each in sorted(decodings, key=lambda each: -each.length):
        if batch and batch[0].length * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


@torch.inference_mode()
def _decode(model: PreTrainedModel, batch: list[Decoding], stops: set[int]) -> None:
    """Decode a batch to its end, into its members."""
    device = model.device
    width = max(len(each.prompt) for each in batch)
    # Padded on the left, so that every row's next token is at the right edge.
    tokens = torch.tensor([[0] * (width - len(e.prompt)) + e.prompt for e in batch], device=device)
    mask = torch.tensor(
        [[0] * (width - len(e.prompt)) + [1] * len(e.prompt) for e in batch], device=device
    )
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    while True:
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        following = logits.argmax(-1)
        going = []
        for row, (each, token) in enumerate(zip(batch, following.tolist(), strict=True)):
            each.finished = token in stops
            if not each.finished:
                each.tokens.append(token)
                if len(each.tokens) < each.request.max_new_tokens:
                    going.append(row)
        if not going:
            return
        if len(going) < len(batch):
            batch = [batch[row] for row in going]
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            following, mask, positions = following[kept], mask[kept], positions[kept]
        tokens = following[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
