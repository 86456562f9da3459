"""Decoding of many prompts at once; a prompt that has ended leaves the batch.

``model.generate`` goes on computing ended prompts until the last one of their batch ends; answers
of very different lengths (a refusal, an essay) make that most of the work. What the prompts of a
batch begin with in common (instructions, answered examples) is read once for all of them. Sampling
defaults that a checkpoint carries in its ``generation_config.json`` have no effect here, except its
end tokens.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.evaluate.base import Request, Response
from stages.evaluate.decode_cache import grouped_heads, make_room
from stages.evaluate.decoding import Plain, Predictor, Sampler
from stages.evaluate.scorer import (
    beginning,
    common_prefix,
    context_length,
    independent,
    packable_length,
    prompt,
)
from stages.evaluate.techniques import SelfConsistency
from stages.evaluate.thinking import marks, opened

# Tokens of a batch, padding and those still to come included: bounds the key-value cache.
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
# A beginning that the prompts of a batch have in common is read apart from them if it is so long.
SHARED_TOKENS = 16


@dataclass
class Decoding:
    """One prompt and what the model has said to it so far."""

    request: Request
    prompt: list[int]
    sampler: Sampler | None = None
    tokens: list[int] = field(default_factory=list)
    """Generated, the end token left out."""
    layers: list[int] = field(default_factory=list)
    """Per token, the layer that DoLa contrasted."""
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
    predictor: Predictor | None = None,
    sampling: SelfConsistency | None = None,
) -> list[Response]:
    """A response for each request, in their order: the token with the best score at each step, or
    drawn as ``sampling`` says.

    Decoding ends at an end token of the checkpoint, before a request's stop text, or after
    ``max_new_tokens``. The text is without special tokens, but for those that tell thought from
    answer (``thinking.py``), where the request does not leave them out as well; the number of
    tokens is without the end token. A prompt too long for the model's context loses tokens from its
    left.
    """
    predictor = predictor or Plain(model)
    longest = context_length(predictor)
    decodings = []
    for request in requests:
        sampler = sampling and Sampler(sampling.temperature, sampling.seed, request.id)
        decodings.append(Decoding(request, prompt_tokens(tokenizer, request, longest), sampler))
    if not all(map(independent, predictor.models)):
        batch_tokens = 1
    batch_tokens = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
    stops = end_tokens(model.generation_config, tokenizer)
    with grouped_heads():
        for batch in _batches(decodings, batch_tokens):
            _decode(predictor, tokenizer, batch, stops)
    return [
        replace(
            answer(tokenizer, each.request, each.tokens, each.finished), layers=tuple(each.layers)
        )
        for each in decodings
    ]


def prompt_tokens(tokenizer: Tokenizer, request: Request, longest: int) -> list[int]:
    """The prompt of a generation, at least one token; it loses tokens from its left where it and
    its longest answer are more than ``longest`` together."""
    text, special = prompt(tokenizer, request)
    tokens = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return tokens[-max(1, longest - request.max_new_tokens) :] or [beginning(tokenizer)]


def answer(tokenizer: Tokenizer, request: Request, tokens: list[int], finished: bool) -> Response:
    """The response that generated tokens, the end token left out, make; it begins with the mark of
    a thought that the chat template has opened."""
    mark = opened(prompt(tokenizer, request)[0]) if request.chat else ""
    text = mark + cut(_text(tokenizer, request, tokens), request.stop)
    return Response(request.id, tokens=(len(tokens),), text=text, finished=finished)


def _text(tokenizer: Tokenizer, request: Request, tokens: list[int]) -> str:
    kept = marks(tokenizer.get_added_vocab()) if request.thoughts else set()
    if kept:
        added = tokenizer.added_tokens_decoder.items()
        special = {id for id, token in added if token.special} | set(tokenizer.all_special_ids)
        dropped = special - set(tokenizer.convert_tokens_to_ids(sorted(kept)))
        tokens = [token for token in tokens if token not in dropped]
    return tokenizer.decode(tokens, skip_special_tokens=not kept)


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the stop texts, cut at one after the other as lm-evaluation-harness does."""
    for each in stop:
        text, _, _ = text.partition(each)
    return text


def end_tokens(config: GenerationConfig, tokenizer: Tokenizer) -> set[int]:
    """The tokens at which a generation ends: the checkpoint's and the tokenizer's."""
    stops = config.eos_token_id
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


def _stopped(tokenizer: Tokenizer, decoding: Decoding) -> bool:
    """Whether the answer holds a stop text."""
    stop = decoding.request.stop
    # Most steps look at the last tokens only; a stop text is at most that many characters long.
    tail = decoding.tokens[-max(map(len, stop), default=0) - 1 :]
    return any(text in tokenizer.decode(tail) for text in stop)


def _shared(predictor: Predictor, batch: list[Decoding]) -> int:
    """Tokens of the beginning that a batch reads once: none where the models cannot, or few are
    the same."""
    if len(batch) == 1 or any(packable_length(m) < sys.maxsize for m in predictor.models):
        return 0
    # In lexicographic order, the first and the last have in common what all have.
    ordered = sorted(each.prompt for each in batch)
    shared = min(common_prefix(ordered[0], ordered[-1]), min(map(len, ordered)) - 1)
    return shared if shared >= SHARED_TOKENS else 0


def _read(predictor: Predictor, tokens: list[int], caches: list) -> None:
    """Put one row's first tokens into the caches."""
    device = predictor.models[0].device
    inputs = {
        "input_ids": torch.tensor([tokens], device=device),
        "attention_mask": torch.ones(1, len(tokens), dtype=torch.long, device=device),
        "position_ids": torch.arange(len(tokens), device=device)[None],
    }
    predictor.scores(inputs, torch.tensor([len(tokens) - 1], device=device), caches)


@torch.inference_mode()
def _decode(
    predictor: Predictor, tokenizer: Tokenizer, batch: list[Decoding], stops: set[int]
) -> None:
    """Decode a batch to its end, into its members."""
    device = predictor.models[0].device
    caches = [None] * len(predictor.models)  # of whatever kind each model makes
    shared = _shared(predictor, batch)
    if shared:
        _read(predictor, batch[0].prompt[:shared], caches)
        for cache in caches:
            cache.batch_repeat_interleave(len(batch))
    rests = [each.prompt[shared:] for each in batch]
    width = max(map(len, rests))
    # Padded on the left, so that every row's next token is at the right edge.
    tokens = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=device)
    mask = torch.tensor(
        [[1] * shared + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests],
        device=device,
    )
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, shared:]
    room = max(each.request.max_new_tokens for each in batch)
    while True:
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        last = torch.tensor([tokens.shape[1] - 1], device=device)
        scores = predictor.scores(inputs, last, caches)[:, 0]
        if room:
            for cache in caches:
                make_room(cache, room)
            room = 0
        following = scores.argmax(-1)
        if batch[0].sampler is not None:
            drawn = [each.sampler.draw(row) for each, row in zip(batch, scores, strict=True)]
            following = torch.tensor(drawn, device=device)
        going = []
        for row, (each, token) in enumerate(zip(batch, following.tolist(), strict=True)):
            each.finished = token in stops
            if not each.finished:
                each.tokens.append(token)
                if predictor.contrasted is not None:
                    each.layers.append(int(predictor.contrasted[row, 0]))
                each.finished = _stopped(tokenizer, each)
                if not each.finished and len(each.tokens) < each.request.max_new_tokens:
                    going.append(row)
        if not going:
            return
        if len(going) < len(batch):
            batch = [batch[row] for row in going]
            kept = torch.tensor(going, device=device)
            for cache in caches:
                cache.batch_select_indices(kept)
            following, mask, positions = following[kept], mask[kept], positions[kept]
        tokens = following[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
