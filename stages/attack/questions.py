"""A text with a closed set of answers as an attack sees it: tokens, embeddings, margins.

The log-probability of an answer is the sum over its words (``logsumexp``) of the sums over their
tokens, as in the evaluations of labelled texts.

Shape letters: B inputs, n tokens of the prompt, D hidden size, P different beginnings of the
answers' words, S = n + the longest of them, C answers, E experts, K chosen experts.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import Cache, PreTrainedModel

from stages.models.families import family
from stages.models.routes import Policy, routed
from stages.models.routing import Routing

TOKENS_AT_ONCE = {"cpu": 4096}
"""Tokens of one forward pass without a gradient, where more of them take longer each; other devices
are given as many as their memory holds."""


@dataclass(frozen=True)
class Question:
    """A prompt and the words that can follow it."""

    tokens: torch.Tensor
    """The prompt, (n,)."""
    editable: torch.Tensor
    """Which of its tokens an attack may change, booleans (n,)."""
    words: tuple[tuple[int, ...], ...]
    """Tokens of each word."""
    answers: tuple[int, ...]
    """The answer, 0 to C - 1, that each word stands for."""
    gold: int
    """The right answer."""

    @cached_property
    def beginnings(self) -> list[tuple[int, ...]]:
        """The words without their last tokens, each once; words of one token share the empty."""
        return sorted({word[:-1] for word in self.words})


class Victim:
    """A model that is asked questions; it counts how often."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.moe = family(model).is_moe
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.queries = 0
        """Inputs whose answers were computed."""
        self.gradients = 0
        """Inputs whose gradient was computed."""
        self.most = TOKENS_AT_ONCE.get(model.device.type)
        """Tokens of one forward pass without a gradient; None until it has been too many."""

    @cached_property
    def table(self) -> torch.Tensor:
        """The embedding of every token as the model's layers get it, (V, D)."""
        embedding = self.model.get_input_embeddings()
        with torch.no_grad():
            numbers = torch.arange(embedding.num_embeddings, device=self.model.device)
            return embedding(numbers)

    @torch.no_grad()
    def read(self, embedded: torch.Tensor) -> Cache | None:
        """What the model keeps of a beginning (k, D) that many prompts share, for ``logprobs``.

        None where it is more than keys and values, or where tokens compete for a capacity: prompts
        are read whole then.
        """
        entry = family(self.model)
        if entry.capacity or entry.recurrent or not len(embedded):
            return None
        return self.model(inputs_embeds=embedded[None], use_cache=True).past_key_values

    def logprobs(
        self, embedded: torch.Tensor, question: Question, beginning: Cache | None = None
    ) -> torch.Tensor:
        """Log-probabilities (B, C) of the answers after prompts (B, n, D), or after a ``beginning``
        that was read before and the rest of the prompts."""
        beginnings = question.beginnings
        longest = max(map(len, beginnings))
        padded = [[*tokens, *[0] * (longest - len(tokens))] for tokens in beginnings]
        after = self.table[torch.tensor(padded, device=embedded.device, dtype=torch.long)]
        rows = torch.cat(
            [
                embedded[:, None].expand(-1, len(beginnings), -1, -1),
                after[None].expand(len(embedded), -1, -1, -1),
            ],
            dim=2,
        ).flatten(0, 1)
        extra = {"logits_to_keep": longest + 1} if self.keeps else {}
        if hasattr(self.model.config, "output_router_logits"):
            extra["output_router_logits"] = False
        if beginning is not None:
            extra["past_key_values"] = copy.deepcopy(beginning)  # a pass adds to it
            extra["past_key_values"].batch_repeat_interleave(len(rows))
        cached = beginning is not None
        logits = self.model(inputs_embeds=rows, use_cache=cached, **extra).logits
        self.queries += len(embedded)
        logits = logits[:, -longest - 1 :].unflatten(0, (len(embedded), len(beginnings)))
        found = logits.float().log_softmax(-1)
        sums = []
        for word in question.words:
            row = beginnings.index(word[:-1])
            sums.append(sum(found[:, row, place, token] for place, token in enumerate(word)))
        answers = torch.tensor(question.answers, device=embedded.device)
        stacked = torch.stack(sums, dim=1)
        return torch.stack(
            [stacked[:, answers == answer].logsumexp(1) for answer in range(max(answers) + 1)], 1
        )

    @torch.no_grad()
    def batched(
        self, value: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, width: int
    ) -> torch.Tensor:
        """``value`` (B,) of rows (B, …) that take ``width`` tokens of a pass each, in batches as
        large as memory allows: halved where the device runs out of it, and kept so."""
        while True:
            size = len(rows) if self.most is None else max(1, self.most // width)
            try:
                return torch.cat([value(part) for part in rows.split(size)])
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self.most = min(size, len(rows)) // 2 * width

    @torch.no_grad()
    def margins(self, inputs: Sequence[torch.Tensor], question: Question) -> torch.Tensor:
        """Margins (B,) of prompts given as tokens (n,) of any lengths, alike ones together."""
        found = torch.empty(len(inputs))
        by_length: dict[int, list[int]] = {}
        for index, tokens in enumerate(inputs):
            by_length.setdefault(len(tokens), []).append(index)
        for length, members in by_length.items():
            width = (length + max(map(len, question.beginnings))) * len(question.beginnings)
            batch = torch.stack([inputs[index] for index in members]).to(self.model.device)
            found[members] = self.batched(
                lambda rows: margin(self.logprobs(self.table[rows], question), question),
                batch, width,
            ).cpu()  # fmt: skip
        return found

    def routes(
        self, embedded: torch.Tensor, question: Question, force: Policy | None = None
    ) -> tuple[torch.Tensor, list[Routing]]:
        """Log-probabilities (B, C), and the routes of the B × P × S tokens of the pass."""
        with routed(self.model, force) as found:
            logprobs = self.logprobs(embedded, question)
        return logprobs, found


def margin(logprobs: torch.Tensor, question: Question) -> torch.Tensor:
    """The largest log-probability of a wrong answer minus that of the right one, (B,): the answer
    is wrong where it is above 0."""
    others = logprobs.clone()
    others[:, question.gold] = -torch.inf
    return others.amax(1) - logprobs[:, question.gold]


def cross_entropy(logprobs: torch.Tensor, question: Question) -> torch.Tensor:
    """Minus the log-probability of the right answer within the closed set, (B,)."""
    return -logprobs.log_softmax(1)[:, question.gold]


LOSSES: dict[str, Callable[[torch.Tensor, Question], torch.Tensor]] = {
    "margin": margin,
    "cross_entropy": cross_entropy,
}


def tokens_of(routing: Routing, inputs: int, length: int) -> Routing:
    """A pass's routes without those of the answers' words: the tokens of the B prompts (B × n), of
    the first of the P rows of each."""
    rows = len(routing.logits) // inputs
    place = torch.arange(length, device=routing.logits.device)
    start = torch.arange(inputs, device=routing.logits.device) * rows
    return routing.only((start[:, None] + place).flatten())
