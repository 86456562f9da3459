import math

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from stages.evaluate.base import Request, Response
from stages.evaluate.language_modelling import Perplexity
from stages.statistics import summarise

EVALUATION = Perplexity(in_domain=("news",), out_of_domain=("code", "law"), window=64)


def texts(*values):
    ids = [str(n) for n in range(len(values))]
    return pd.DataFrame({"id": ids, "document": ids, "text": values})


DATA = {"news": texts("abcd", "ab"), "code": texts("éé"), "law": texts("xyz", "x")}
RESPONSES = {
    id: Response(id, (logprob,), (tokens,))
    for id, logprob, tokens in (
        ("news/0", -4 * math.log(2), 2),  # news: 6 bits in 6 bytes and 3 tokens
        ("news/1", -2 * math.log(2), 1),
        ("code/0", -8 * math.log(2), 1),  # code: 8 bits in 4 bytes and 1 token
        ("law/0", -3 * math.log(2), 3),  # law: 16 bits in 4 bytes and 4 tokens
        ("law/1", -13 * math.log(2), 1),
    )
}


def test_requests_score_whole_texts():
    assert EVALUATION.requests(DATA)[2] == Request("code/0", "éé", window=64)


def test_sums_are_pooled_within_a_domain_and_domains_weigh_the_same():
    scores = EVALUATION.score(DATA, RESPONSES)
    assert scores["bytes"].tolist() == [4, 2, 4, 3, 1]
    values = {n: row["value"] for n, row in summarise(scores, EVALUATION.metrics()).items()}
    expected = {
        "out_of_domain_bits_per_byte": (2 + 4) / 2,
        "out_of_domain_perplexity": (2**8 + 2**4) / 2,
        "out_of_domain_worst_bits_per_byte": 4,
        "in_domain_bits_per_byte": 1,
        "in_domain_perplexity": 2**2,
        "bits_per_byte_gap": 2,
        "bits_per_byte/news": 1, "perplexity/news": 4,
        "bits_per_byte/code": 2, "perplexity/code": 2**8,
        "bits_per_byte/law": 4, "perplexity/law": 2**4,
    }  # fmt: skip
    assert values == pytest.approx(expected)
    assert list(values)[0] == EVALUATION.primary
    assert not any(metric.higher_is_better for metric in EVALUATION.metrics())


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    """The same probability of the same text, cut into more tokens: bits per byte stay."""
    finer = {id: Response(id, r.logprobs, (r.tokens[0] * 3,)) for id, r in RESPONSES.items()}
    first, second = (
        summarise(EVALUATION.score(DATA, r), EVALUATION.metrics()) for r in (RESPONSES, finer)
    )
    name = "out_of_domain_bits_per_byte"
    assert first[name] == second[name]
    assert first["in_domain_perplexity"]["value"] == 4
    assert second["in_domain_perplexity"]["value"] == pytest.approx(4 ** (1 / 3))


def test_one_domain_alone():
    alone = Perplexity(in_domain=("news",))
    assert [m.name for m in alone.metrics()] == ["in_domain_bits_per_byte", "in_domain_perplexity"]
    assert alone.primary == "in_domain_bits_per_byte"
    interval = summarise(EVALUATION.score(DATA, RESPONSES), EVALUATION.metrics())
    assert np.isfinite(interval["in_domain_perplexity"]["ci_low"])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "must name a data set"),
        ({"in_domain": ["a"], "out_of_domain": ["a"]}, "each one once"),
        ({"in_domain": ["a"], "technique": {"kind": "dola"}}, "no probabilities"),
        ({"in_domain": ["a"], "technique": {"kind": "self_consistency"}}, "generates none"),
        ({"in_domain": ["a"], "window": 1}, "greater than or equal to 2"),
    ],
)
def test_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        Perplexity(**fields)
