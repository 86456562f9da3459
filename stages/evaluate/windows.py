"""Log-probability of whole texts, read in windows: what perplexity is made of.

Every token of a text is scored once, given the tokens before it in its window. The windows are
those of lm-evaluation-harness's rolling log-likelihood, so that numbers compare: they do not
overlap but by one token, the beginning token stands before the first, and the last one, which may
be short, reaches back until it is full.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.evaluate.base import Request, Response
from stages.evaluate.decoding import Predictor
from stages.evaluate.scorer import Encoded, beginning, context_length, prompt, score_encoded


def score_windows(
    predictor: Predictor, tokenizer: Tokenizer, requests: Sequence[Request]
) -> list[Response]:
    """A response for each request, in their order: the sum over all tokens of its context.

    A window has at most ``request.window`` tokens, or as many as the models can read.
    """
    longest = context_length(predictor)
    texts = [
        windows(
            _tokens(tokenizer, request),
            min(request.window, longest),
            beginning(tokenizer),
        )
        for request in requests
    ]
    scored = iter(score_encoded(predictor, [[window] for text in texts for window in text]))
    responses = []
    for request, text in zip(requests, texts, strict=True):
        read = [window for _ in text for window in next(scored)]
        responses.append(
            Response(
                request.id,
                logprobs=(sum(window.value for window in read),),
                tokens=(sum(len(window.tokens) - window.start for window in text),),
                layers=tuple(layer for window in read for layer in window.layers),
            )
        )
    return responses


def _tokens(tokenizer: Tokenizer, request: Request) -> list[int]:
    text, special = prompt(tokenizer, request)
    special = special and request.special_tokens
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def windows(tokens: list[int], size: int, first: int) -> list[Encoded]:
    """The windows of a text: at most ``size`` tokens are read for each, ``first`` before all."""
    found = []
    for start in range(0, len(tokens), size):
        end = min(start + size, len(tokens))
        begin = max(end - size, 0)
        before = tokens[begin - 1] if begin else first
        found.append(Encoded([before, *tokens[begin:end]], 1 + start - begin))
    return found
