"""Labelled texts put to a loaded model by procedures: prompts as tokens, and which may change."""

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.attack.questions import Question, Victim
from stages.data.templates import TEMPLATES
from stages.errors import StageFailed
from stages.evaluate.base import Request
from stages.evaluate.labelled_texts import LabelledTexts
from stages.evaluate.scorer import encode, prompt
from stages.models.families import family


class Asker:
    """A model, its tokenizer and the words that it may answer with.

    Raises StageFailed for an encoder-decoder.
    """

    def __init__(self, spec: LabelledTexts, model: PreTrainedModel, tokenizer: Tokenizer):
        if family(model).encoder_decoder:
            raise StageFailed(
                f"{spec.kind}: {model.config.model_type} is an encoder-decoder, and this is for "
                "decoders; leave it out"
            )
        self.spec, self.model, self.tokenizer = spec, model, tokenizer
        self.victim = Victim(model)
        template = TEMPLATES[spec.template]
        self.labels = list(template.labels)
        self.owners = tuple(self.labels.index(label) for label, _ in template.words)
        self.words = tuple(word for _, word in template.words)

    def question(self, row: dict, text: str) -> Question:
        """The row's prompt with another text in its place."""
        context = row["before"] + text + row["after"]
        request = Request(row["id"], context, self.words, chat=self.spec.chat)
        longest = getattr(self.model.config, "max_position_embeddings", 1 << 30)
        choices = encode(self.tokenizer, request, longest)
        start = choices[0].start
        heads = {tuple(choice.tokens[: choice.start]) for choice in choices}
        if len(heads) > 1:
            raise StageFailed(
                f"template {self.spec.template}: its labels change the last tokens of the prompt "
                f"(example {row['id']}); attack with labels that begin with a blank"
            )
        changed = inside(
            self.tokenizer, request, start, len(row["before"]), row["before"] + text
        )
        device = self.model.device
        return Question(
            tokens=torch.tensor(choices[0].tokens[:start], device=device),
            editable=changed.to(device),
            words=tuple(tuple(choice.tokens[start:]) for choice in choices),
            answers=self.owners,
            gold=self.labels.index(row["label"]),
        )


def inside(
    tokenizer: Tokenizer, request: Request, length: int, begin: int, until: str
) -> torch.Tensor:
    """Which of a prompt's last ``length`` tokens stand for a part of the request's context, from
    character ``begin`` to the end of ``until``, with which the context begins; booleans (length,).
    """
    whole, spans = pieces(tokenizer, request, length)
    first = whole.index(request.context)
    return torch.tensor(
        [_within(whole, span, first + begin, first + len(until)) for span in spans]
    )


def pieces(
    tokenizer: Tokenizer, request: Request, length: int
) -> tuple[str, list[tuple[int, int]]]:
    """A prompt as it is tokenised, and the characters that its last ``length`` tokens stand for."""
    whole, special = prompt(tokenizer, request)
    offsets = tokenizer(
        whole.rstrip(), add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    return whole, offsets[-length:]


def allowed_tokens(tokenizer: Tokenizer, size: int) -> torch.Tensor:
    """Tokens that an attack may put into a text, booleans (size,): no special or added ones."""
    found = torch.zeros(size, dtype=torch.bool)
    found[: len(tokenizer)] = True
    found[list({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})] = False
    return found


def are_texts(tokenizer: Tokenizer, rows: torch.Tensor) -> torch.Tensor:
    """Which token sequences (B, n) are what the tokenizer makes of their own text, (B,)."""
    texts = tokenizer.batch_decode(rows, skip_special_tokens=False)
    again = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    same = [a == b for a, b in zip(again, rows.tolist(), strict=True)]
    return torch.tensor(same, dtype=torch.bool, device=rows.device)


def _within(whole: str, span: tuple[int, int], begin: int, end: int) -> bool:
    """Whether a token stands for characters of the text alone, blanks at its start aside."""
    first, last = span
    first += len(whole[first:last]) - len(whole[first:last].lstrip())
    return begin <= first < last <= end
