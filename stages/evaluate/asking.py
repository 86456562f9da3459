"""Labelled texts put to a loaded model by procedures: prompts as tokens, and which may change."""

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.attack.questions import Question, Victim
from stages.data.templates import TEMPLATES
from stages.errors import StageFailed
from stages.evaluate.base import Request
from stages.evaluate.labelled_texts import LabelledTexts
from stages.evaluate.scorer import Encoded, encode, prompt
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
        request, choices = self._encoded(row, text)
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

    def texts(self, row: dict, clean: Question, rows: torch.Tensor) -> list[str]:
        """What stands in the text's place in prompts (B, n) that differ from the row's own in its
        editable tokens alone."""
        places = clean.editable.nonzero()[:, 0].tolist()
        if not places:
            return [row["text"]] * len(rows)
        request, _ = self._encoded(row, row["text"])
        whole, spans = pieces(self.tokenizer, request, len(clean.tokens))
        start = whole.index(request.context) + len(row["before"])
        begin = _written(whole, spans[places[0]])[0] - start
        end = spans[places[-1]][1] - start
        decoded = self.tokenizer.batch_decode(rows[:, places[0] : places[-1] + 1])
        # The first token may hold the blank before the text, which not every tokenizer decodes.
        return [row["text"][:begin] + part.lstrip() + row["text"][end:] for part in decoded]

    def are_prompts(self, row: dict, clean: Question, rows: torch.Tensor) -> torch.Tensor:
        """Which tokens (B, n) are those of the row's prompt with their own text in it, (B,)."""
        found = []
        for text, tokens in zip(self.texts(row, clean, rows), rows.tolist(), strict=True):
            _, choices = self._encoded(row, text)
            found.append(all(choice.tokens[: choice.start] == tokens for choice in choices))
        return torch.tensor(found, dtype=torch.bool, device=rows.device)

    def _encoded(self, row: dict, text: str) -> tuple[Request, list[Encoded]]:
        context = row["before"] + text + row["after"]
        request = Request(row["id"], context, self.words, chat=self.spec.chat)
        longest = getattr(self.model.config, "max_position_embeddings", 1 << 30)
        return request, encode(self.tokenizer, request, longest)


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


def _within(whole: str, span: tuple[int, int], begin: int, end: int) -> bool:
    """Whether a token stands for characters of the text alone, blanks at its start aside."""
    first, last = _written(whole, span)
    return begin <= first < last <= end


def _written(whole: str, span: tuple[int, int]) -> tuple[int, int]:
    """The characters of a token without the blanks at its start."""
    first, last = span
    return first + len(whole[first:last]) - len(whole[first:last].lstrip()), last
