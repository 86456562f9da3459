"""Log-probability of whole texts: the windows by hand, as the harness cuts them, and by a loop."""

import pytest
import torch

from stages.evaluate.base import Request
from stages.evaluate.decoding import Plain
from stages.evaluate.windows import score_windows, windows
from stages.models.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def pairs(tokens, size):
    """Context and scored tokens of each window."""
    return [(w.tokens[: w.start], w.tokens[w.start :]) for w in windows(tokens, size, first=0)]


def test_windows_by_hand():
    assert pairs([1, 2, 3], 8) == [([0], [1, 2, 3])]
    assert pairs([1, 2, 3, 4, 5, 6], 3) == [([0], [1, 2, 3]), ([3], [4, 5, 6])]
    # The last window is as full as the others: 5 is read again before 6 and 7.
    assert pairs([1, 2, 3, 4, 5, 6, 7, 8], 3) == [
        ([0], [1, 2, 3]), ([3], [4, 5, 6]), ([5, 6], [7, 8])
    ]  # fmt: skip
    assert pairs([], 3) == []


@pytest.mark.parametrize("length", [1, 6, 7, 8, 13, 30])
def test_windows_are_the_harness_s(length):
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(1, length + 1))
    expected = [
        utils.make_disjoint_window(pair)
        for pair in utils.get_rolling_token_windows(tokens, 0, max_seq_len=7, context_len=1)
    ]
    assert pairs(tokens, 7) == [(list(a), list(b)) for a, b in expected]


def test_a_text_is_scored_token_by_token():
    model = tiny_model("mixtral", TOKENIZER, seed=0)
    model.config.max_position_embeddings = 20
    texts = ["A text of more than twenty tokens, one per byte.", "short", "é…"]
    for window, size in ((8, 8), (1000, 20)):
        requests = [Request(str(i), text, window=window) for i, text in enumerate(texts)]
        responses = score_windows(Plain(model), TOKENIZER, requests)
        for text, response in zip(texts, responses, strict=True):
            tokens = TOKENIZER(text)["input_ids"]
            total = 0.0
            for start in range(0, len(tokens), size):
                end = min(start + size, len(tokens))
                begin = max(end - size, 0)
                row = [tokens[begin - 1] if begin else TOKENIZER.bos_token_id, *tokens[begin:end]]
                with torch.no_grad():
                    logprobs = model(torch.tensor([row])).logits[0].log_softmax(-1)
                total += sum(float(logprobs[i - begin, tokens[i]]) for i in range(start, end))
            assert response.logprobs == (pytest.approx(total, abs=1e-4),)
            assert response.tokens == (len(tokens),)
