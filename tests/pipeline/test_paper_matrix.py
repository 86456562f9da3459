"""Every evaluation of paper.yaml on a tiny model of every family of the paper: a number, or the
named reason that there is none."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.sweep_file import load
from stages.data.templates import TEMPLATES
from stages.errors import StageFailed
from stages.evaluate.engine import Engine
from stages.evaluate.techniques import (
    DoLa,
    ExpertCount,
    SelfConsistency,
    applied,
    collected,
)
from stages.models.classifier import register
from stages.models.families import FAMILIES
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY
from stages.statistics import summarise

PAPER = Path(__file__).parents[2] / "sweeps" / "moe_rbench" / "paper.yaml"
MODELS = ("switch_transformers", "t5", "moduleformer", "gpt_neox", "llama_moe", "llama")
TOKENIZER = tiny_tokenizer()


def rows(task, labels, name, count=6):
    """Each source has texts of its own: what is scored is not shown before it."""
    ids = [str(number) for number in range(count)]
    texts = [f"text number {number} of {name}" for number in ids]
    many = [np.array([f"is {number}", "is so"], object) for number in ids]
    if name in ("jailbreaks", "dan"):
        texts = [f"{text}: {{prompt}}" for text in texts]
    table = {
        "prompts": {"prompt": texts, "category": "x"},
        "text": {"text": texts},
        "paraphrase": {"sentence1": texts, "sentence2": "It is a text."},
        "multiple_choice": {"question": texts, "choices": many, "answer": 1, "context": ""},
        "nli": {"premise": texts, "hypothesis": "It is a text."},
        "classification": {"text": texts},
        "open_question": {"question": texts, "answers": many, "category": ""},
        "statements": {
            "question": texts,
            "best_answer": "is so",
            "best_incorrect_answer": "is not",
            "correct_answers": many,
            "incorrect_answers": [np.array(["is not"], object)] * count,
            "category": "",
        },
    }[task]
    frame = pd.DataFrame({"id": ids, "document": ids} | table)
    if labels:
        frame["label"] = [labels[number % len(labels)] for number in range(count)]
    return frame


@pytest.fixture(scope="module")
def evaluations():
    """As in the sweep, but with short answers, fewer shots and no judge to be downloaded."""
    found = load(PAPER).evaluations
    for name, evaluation in found.items():
        changes = {"max_new_tokens": 3} if "max_new_tokens" in type(evaluation).model_fields else {}
        if "judges" in type(evaluation).model_fields:
            changes["judges"] = ()
        if isinstance(evaluation.technique, DoLa):  # the tiny models have few layers
            technique = evaluation.technique.model_copy(update={"candidate_layers": (1,)})
            changes["technique"] = technique
        found[name] = evaluation.model_copy(update=changes)
    return found


def language_model(family):
    if family in TINY:
        return tiny_model(family, TOKENIZER, seed=0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        family, vocab_size=len(TOKENIZER), num_hidden_layers=2, pad_token_id=2, **shape
    )
    return AutoModelForCausalLM.from_config(config)


def engine_of(family, labels, folder):
    """A tiny language model, or its body with so many labels on top."""
    model = language_model(family)
    if labels:
        register(family)
        model.config.num_labels = labels
        model = AutoModelForSequenceClassification.from_config(model.config)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return Engine(folder)


def reason_for_none(evaluation, family):
    """Why a family gives no number; empty where it does."""
    technique, entry = evaluation.technique, FAMILIES[family]
    if isinstance(technique, ExpertCount):
        return "number per token cannot be set" if family == "switch_transformers" else ""
    if entry.encoder_decoder and technique is not None:
        return f"{technique.kind} is for decoders, .*remove technique"
    if entry.encoder_decoder and evaluation.kind == "perplexity":
        return "evaluate it without perplexity"
    return ""


@pytest.mark.parametrize("family", MODELS)
def test_every_cell_gives_a_number_or_a_reason(family, evaluations, tmp_path):
    decoder = not FAMILIES[family].encoder_decoder
    engines, numbers, reasons = {}, {}, {}
    for name, evaluation in evaluations.items():
        if isinstance(evaluation.technique, ExpertCount) and not FAMILIES[family].is_moe:
            # The dense partner answers plainly, as the plan has it.
            evaluation = evaluation.model_copy(update={"technique": None})
        if evaluation.asks_head and not decoder:
            continue  # recipes refuse a head there, before any training
        template = TEMPLATES.get(getattr(evaluation, "template", None))
        labels = tuple(template.labels) if template else ()
        data = {key: rows(evaluation.tasks()[dataset], labels, key)
                for key, (dataset, _) in evaluation.sources().items()}
        outputs = len(labels) if evaluation.asks_head else 0
        if outputs not in engines:
            engines[outputs] = engine_of(family, outputs, tmp_path / str(outputs))
        engine = engines[outputs]
        asked = applied(evaluation.technique, evaluation.requests(data))
        if reason := reason_for_none(evaluation, family):
            with pytest.raises(StageFailed, match=reason):
                engine.respond(asked)
            reasons[name] = reason
            continue
        responses = {response.id: response for response in engine.respond(asked)}
        answers = responses
        if isinstance(evaluation.technique, SelfConsistency):
            answers = collected(
                evaluation.technique, evaluation.requests(data), responses, evaluation.vote)
        scores = evaluation.score(data, answers)
        summary = summarise(scores, evaluation.metrics(), resamples=20)
        numbers[name] = summary[evaluation.primary]["value"]
        # Two passes over one checkpoint, a router's noise or none: the same answers.
        assert {response.id: response for response in engine.respond(asked)} == responses
    assert all(math.isfinite(value) for value in numbers.values())
    whole = len(evaluations)
    heads = sum(evaluation.asks_head for evaluation in evaluations.values())
    assert len(numbers) == whole - (0 if decoder else heads) - len(reasons)
    lacking = {"truthfulqa_dola", "truthfulqa_generation_dola", "nq_open_self_consistency",
               "perplexity"}
    counted = {"truthfulqa_one_expert", "truthfulqa_four_experts"}
    assert set(reasons) == {
        "t5": lacking, "switch_transformers": lacking | counted}.get(family, set())
