"""Log-probabilities of continuations, the context of a question encoded once for all its choices.

The token sequences of a question's choices form a tree: what they have in common, the context and
possibly first tokens of choices, is stored once, and a token sees its ancestors only, at the
position that it has in its own sequence. Trees of several questions lie end to end in one row, so
no token is padding, and only the positions before a choice's tokens go through the language-model
head. The result is that of scoring each choice alone, up to rounding.

Texts are cut into context and choice as lm-evaluation-harness does, so that numbers compare.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jinja2 import TemplateError
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.errors import BadInput, StageFailed
from stages.evaluate.base import Request, Response
from stages.evaluate.decoding import POSITIONS, Plain, Predictor
from stages.models.families import FAMILIES

# Tokens of one forward pass. More of them waste work on attention between questions, fewer on
# small matrix products; 256 to 1024 are within a tenth of each other on a CPU core.
ROW_TOKENS = {"cpu": 512, "cuda": 2048}
# Kinds of rotary position embedding whose angles depend on the longest sequence of the batch.
SCALED_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Encoded:
    """One choice as tokens: ``tokens[start:]`` is scored given ``tokens[:start]``."""

    tokens: list[int]
    start: int


@dataclass
class Scored:
    """What the model says of one choice."""

    value: float = 0.0
    """Sum of the scores of its tokens."""
    greedy: bool = True
    """Each of its tokens has the best score of its position."""
    layers: list[int] = field(default_factory=list)
    """Per token, the layer that DoLa contrasted."""


@dataclass
class Tree:
    """The choices of one question with their common beginnings merged, in depth-first order."""

    question: int
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    """Per token, its position in the sequences that it belongs to."""
    ends: list[int] = field(default_factory=list)
    """Per token, the end of its subtree: token i sees token j when ``j <= i < ends[j]``."""
    targets: list[tuple[int, int, int]] = field(default_factory=list)
    """Per scored token: the token of the tree before it, itself, the index of its choice."""


def score(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    packed: bool = True,
    row_tokens: int | None = None,
    predictor: Predictor | None = None,
) -> list[Response]:
    """A response for each request, in their order: natural-log probabilities of its choices.

    With a ``predictor`` other than ``Plain`` they are sums of its scores of the choices' tokens.

    ``packed=False`` scores one choice at a time under the model's own mask, which is slower and
    right for every causal model; by default whatever the architecture allows is packed, into rows
    of at most ``row_tokens`` tokens (more for a question that has more). A sequence longer than the
    model's context loses tokens from its left. Raises BadInput for a choice that adds no token to
    its context or is longer than the model's context itself.
    """
    predictor = predictor or Plain(model)
    longest = context_length(predictor)
    questions = [encode(tokenizer, request, longest) for request in requests]
    scored = score_encoded(predictor, questions, packed=packed, row_tokens=row_tokens)
    return [
        Response(
            request.id,
            logprobs=tuple(choice.value for choice in choices),
            tokens=tuple(len(choice.tokens) - choice.start for choice in question),
            greedy=tuple(choice.greedy for choice in choices),
            layers=tuple(layer for choice in choices for layer in choice.layers),
        )
        for request, question, choices in zip(requests, questions, scored, strict=True)
    ]


def score_encoded(
    predictor: Predictor,
    questions: Sequence[list[Encoded]],
    *,
    packed: bool = True,
    row_tokens: int | None = None,
) -> list[list[Scored]]:
    """Per question, what the model says of each choice (see ``score``)."""
    found = [[Scored() for _ in question] for question in questions]
    packable = min(map(packable_length, predictor.models)) if packed else 0
    together, alone = [], []
    for index, question in enumerate(questions):
        if max(len(choice.tokens) for choice in question) <= packable:
            together.append(build_tree(index, dict(enumerate(question))))
        else:
            alone += [build_tree(index, {i: choice}) for i, choice in enumerate(question)]
    device = predictor.models[0].device.type
    row_tokens = row_tokens or ROW_TOKENS.get(device, ROW_TOKENS["cuda"])
    for trees, masked in [
        *((row, True) for row in _rows(together, row_tokens)),
        *(([tree], False) for tree in alone),
    ]:
        for question, choice, value, best, layers in _score_row(predictor, trees, masked):
            scored = found[question][choice]
            scored.value += value
            scored.greedy &= best
            scored.layers += layers
    return found


def independent(model: PreTrainedModel) -> bool:
    """Whether a token's output depends on the tokens that its mask shows and on nothing else.

    Not so where experts have a capacity, where layers carry a state along the row, and where
    positions are taken from the place in the row (ALiBi) or scaled by the longest sequence of the
    batch; unknown for a family without an entry.
    """
    entry = FAMILIES.get(model.config.model_type)
    rope = getattr(model.config, "rope_parameters", None) or {}
    return (
        entry is not None
        and not (entry.capacity or entry.recurrent)
        and not getattr(model.config, "alibi", False)
        and rope.get("rope_type") not in SCALED_BY_LENGTH
    )


def packable_length(model: PreTrainedModel) -> int:
    """The longest sequence, in tokens, that may share a row with others; 0 if none may.

    Longer than a sliding window it may not be, because a mask of ours replaces that of the window.
    """
    # The other implementations of attention take no mask of this kind.
    if not independent(model) or model.config._attn_implementation not in ("sdpa", "eager"):
        return 0
    return getattr(model.config, "sliding_window", None) or sys.maxsize


def context_length(predictor: Predictor) -> int:
    """Most tokens that all models of a predictor can read."""
    return min(most_positions(model.config) for model in predictor.models)


def most_positions(config: PretrainedConfig) -> int:
    """Most tokens that a model of this configuration can read."""
    return getattr(config, "max_position_embeddings", sys.maxsize)


def prompt(tokenizer: Tokenizer, request: Request) -> tuple[str, bool]:
    """The text that the model is given, and whether the tokenizer adds its special tokens to it.

    A chat context goes through the tokenizer's chat template, if it has one, as the user's turn,
    followed by the request's reply as the assistant's; the text ends where the assistant goes on,
    for choices where the template puts an answer. Raises StageFailed for a reply or a conversation
    without one.
    """
    if request.messages:
        if not tokenizer.chat_template:
            raise StageFailed(
                f"request {request.id}: the model's tokenizer has no chat template to put a "
                "conversation into; evaluate it with apply_chat_template: false"
            )
        return _special(tokenizer, conversation(tokenizer, json.loads(request.messages)))
    if request.chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": request.context}]
        if begins_answer(tokenizer, request):
            turns.append({"role": "assistant", "content": _ANSWER})
            return conversation(tokenizer, turns).removesuffix(_ANSWER), False
        if request.reply is not None:
            turns.append({"role": "assistant", "content": request.reply})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text, False
    if request.reply is not None:
        raise StageFailed(
            f"judge {request.model!r}: its tokenizer has no chat template to put an answer into; "
            "name a guard model that has one"
        )
    return _special(tokenizer, request.context)


def _special(tokenizer: Tokenizer, text: str) -> tuple[str, bool]:
    """A text, and whether it is still without its beginning."""
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return text, not begun


def begins_answer(tokenizer: Tokenizer, request: Request) -> bool:
    """Whether the choices of a request are beginnings of an assistant's answer (and not what a
    judge says of one): they then stand where the chat template puts an answer, after a thought that
    it opens, or in harmony's final channel."""
    in_turn = request.chat and bool(tokenizer.chat_template)
    return in_turn and bool(request.choices) and request.reply is None


_ANSWER = "ANSWER"
"""Stands for an answer while a chat is laid out."""


def conversation(tokenizer: Tokenizer, turns: list[dict[str, str]]) -> str:
    """Turns through the chat template, as lm-evaluation-harness puts them: without the system's
    where the template takes none, and open at the end where the last is the assistant's."""
    begun = turns[-1]["role"] == "assistant"

    def rendered(turns: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=not begun,
            continue_final_message=begun,
        )

    try:
        return rendered(turns)
    except TemplateError:
        return rendered([turn for turn in turns if turn["role"] != "system"])


def beginning(tokenizer: Tokenizer) -> int:
    """The token that stands for an empty context: beginning of text, or end of text."""
    bos = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


def parted(tokenizer: Tokenizer, request: Request) -> tuple[str, list[str], bool]:
    """The context and the choices of a request as they are tokenised, and whether the tokenizer
    adds its special tokens to the context.

    White space at the end of the context belongs to the choices. The blank that parts a choice from
    a prompt falls away after a chat template, which itself says whether an answer begins with one.
    """
    context, special = prompt(tokenizer, request)
    choices = request.choices
    if begins_answer(tokenizer, request):
        choices = tuple(choice.removeprefix(" ") or choice for choice in choices)
    stripped = context.rstrip()
    blank = context[len(stripped) :]
    return stripped, [blank + choice for choice in choices], special and stripped != ""


def encode(tokenizer: Tokenizer, request: Request, longest: int) -> list[Encoded]:
    """The choices of a request as tokens, at most ``longest`` of them before the last.

    Context and choice are tokenised together and cut where the context's own tokens end.
    """
    context, choices, special = parted(tokenizer, request)
    head, *wholes = tokenizer(
        [context, *(context + choice for choice in choices)],
        add_special_tokens=special,
        verbose=False,
    )["input_ids"]
    if not context:
        head = [beginning(tokenizer)]
        wholes = [tokens if tokens[:1] == head else head + tokens for tokens in wholes]
    encoded = []
    for choice, tokens in zip(choices, wholes, strict=True):
        start = len(head)
        if start >= len(tokens):
            # The choice only changed the context's last tokens, so these are what it adds.
            start = common_prefix(head, tokens)
        scored = len(tokens) - start
        if not 0 < scored <= longest:
            raise BadInput(
                f"request {request.id}: choice {choice!r} has {scored} tokens after its context; "
                f"it must have between 1 and {longest} (the model's context)"
            )
        tokens = tokens[-(longest + 1) :]
        encoded.append(Encoded(tokens, len(tokens) - scored))
    return encoded


def build_tree(question: int, choices: dict[int, Encoded]) -> Tree:
    """Merge the common beginnings of choices; their last tokens are scored but never read."""
    tree = Tree(question)
    path: list[int] = []  # where the tokens of `before` lie in the tree
    before: list[int] = []
    # In lexicographic order a sequence shares most with the one before it.
    for index, choice in sorted(choices.items(), key=lambda item: item[1].tokens[:-1]):
        read = choice.tokens[:-1]
        shared = common_prefix(before, read)
        path = [*path[:shared], *range(len(tree.tokens), len(tree.tokens) + len(read) - shared)]
        tree.tokens += read[shared:]
        tree.depths += range(shared, len(read))
        tree.ends += [0] * (len(read) - shared)
        for node in path:
            tree.ends[node] = len(tree.tokens)
        tree.targets += [
            (path[place - 1], choice.tokens[place], index)
            for place in range(choice.start, len(choice.tokens))
        ]
        before = read
    return tree


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many first tokens two sequences have in common."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _rows(trees: list[Tree], row_tokens: int) -> Iterator[list[Tree]]:
    """Trees that share a forward pass; the longest come first, where memory is needed most."""
    row: list[Tree] = []
    filled = 0
    for tree in sorted(trees, key=lambda tree: -len(tree.tokens)):
        if row and filled + len(tree.tokens) > row_tokens:
            yield row
            row, filled = [], 0
        row.append(tree)
        filled += len(tree.tokens)
    if row:
        yield row


@torch.inference_mode()
def _score_row(
    predictor: Predictor, trees: list[Tree], masked: bool
) -> list[tuple[int, int, float, bool, list[int]]]:
    """(question, choice, log-probability of one of its tokens, whether that is the best token,
    under DoLa the contrasted layer) for each scored token of a row.

    Without ``masked`` the row is a single sequence and the model's own causal mask applies.
    """
    tokens, depths, ends, targets = [], [], [], []
    for tree in trees:
        offset = len(tokens)
        tokens += tree.tokens
        depths += tree.depths
        ends += [offset + end for end in tree.ends]
        targets += [(offset + node, token, tree.question, c) for node, token, c in tree.targets]
    model = predictor.models[0]
    device = model.device
    inputs = {"input_ids": torch.tensor([tokens], device=device)}
    if masked:
        inputs["position_ids"] = torch.tensor([depths], device=device)
        inputs["attention_mask"] = _mask(torch.tensor(ends, device=device), model.dtype)
    nodes, rows = torch.tensor([target[0] for target in targets]).unique(return_inverse=True)
    scores = predictor.scores(inputs, nodes.to(device))[0]
    wanted = torch.tensor([target[1] for target in targets], device=device)
    rows = rows.to(device)
    values = scores[rows, wanted].float()
    if not predictor.normalised:
        # In float32, a few positions at a time: a vocabulary is large.
        total = torch.cat([part.float().logsumexp(-1) for part in scores.split(POSITIONS)])
        values = values - total[rows]
    best = scores.argmax(-1)[rows] == wanted
    layers = [[]] * len(targets)
    if predictor.contrasted is not None:
        layers = predictor.contrasted[0, rows.cpu(), None].tolist()
    return [
        (question, choice, value, greedy, layer)
        for (_, _, question, choice), value, greedy, layer in zip(
            targets, values.tolist(), best.tolist(), layers, strict=True
        )
    ]


def _mask(ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(1, 1, T, T), to be added to attention scores: 0 where token i sees token j, else -inf."""
    place = torch.arange(len(ends), device=ends.device)
    seen = (place[None, :] <= place[:, None]) & (place[:, None] < ends[None, :])
    return torch.zeros(seen.shape, dtype=dtype, device=ends.device).masked_fill_(~seen, -torch.inf)[
        None, None
    ]
