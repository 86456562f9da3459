"""Every family answers as transformers does: packed and alone, scored and generated."""

import pytest
import torch

from stages.evaluate import scorer, seq2seq
from stages.evaluate.base import Request
from stages.evaluate.generate import generate
from stages.models.families import FAMILIES
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY

TOKENIZER = tiny_tokenizer()
PENALTIES = {"repetition_penalty": 5.0, "min_length": 40, "no_repeat_ngram_size": 1, "num_beams": 3}
QUICK = ("llama", "mixtral", "deepseek_v3", "gpt_oss", "switch_transformers")
EVALUATED = [
    n if n in QUICK else pytest.param(n, marks=pytest.mark.families)
    for n in TINY
    if not FAMILIES[n].no_evaluation
]
CHOICES = (" yes", " no way", " perhaps")
CONTEXTS = ("Is it so?", "A longer question, with more words: does it rain?", "Why")


@torch.no_grad()
def alone(model, context, choice):
    """Log-probability of a choice by one plain forward pass."""
    prompt = TOKENIZER(context)["input_ids"]
    answer = TOKENIZER(choice)["input_ids"]
    if model.config.is_encoder_decoder:
        labels = torch.tensor([answer])
        logits = model(input_ids=torch.tensor([prompt]), labels=labels).logits[0]
    else:
        row = torch.tensor([prompt + answer])
        logits = model(row, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(answer)), answer].sum().item()


@pytest.mark.parametrize("name", EVALUATED)
def test_scores_are_those_of_each_choice_alone(name):
    model = tiny_model(name, TOKENIZER, seed=1)
    requests = [Request(str(i), context, CHOICES) for i, context in enumerate(CONTEXTS)]
    score = seq2seq.score if model.config.is_encoder_decoder else scorer.score
    for request, response in zip(requests, score(model, TOKENIZER, requests), strict=True):
        expected = [alone(model, request.context, choice) for choice in CHOICES]
        assert response.logprobs == pytest.approx(expected, abs=1e-3)
        assert response.tokens == tuple(len(choice) for choice in CHOICES)


@pytest.mark.parametrize("name", EVALUATED)
def test_generation_is_greedy_decoding(name):
    model = tiny_model(name, TOKENIZER, seed=1)
    requests = [Request(str(i), c, max_new_tokens=6) for i, c in enumerate(CONTEXTS)]
    decode = seq2seq.generate if model.config.is_encoder_decoder else generate
    for request, response in zip(requests, decode(model, TOKENIZER, requests), strict=True):
        rows = torch.tensor([TOKENIZER(request.context)["input_ids"]])
        (whole,) = model.generate(rows, max_new_tokens=6, do_sample=False)
        own = whole[1 if model.config.is_encoder_decoder else rows.shape[1] :].tolist()
        assert response.text == TOKENIZER.decode(own, skip_special_tokens=True)
    # A checkpoint's own settings make other answers, and do not act here.
    expected = decode(model, TOKENIZER, requests)
    own = model.generation_config
    own.update(**PENALTIES)
    assert decode(model, TOKENIZER, requests) == expected and model.generation_config is own
