import numpy as np
import pandas as pd
import pytest

from stages.errors import StageFailed
from stages.evaluate.base import Request, Response
from stages.evaluate.scorer import encode
from stages.evaluate.spec import EvaluateSpec
from stages.evaluate.truthfulness import MultipleChoice
from stages.models.tiny import tiny_tokenizer
from stages.statistics import summarise

EVALUATION = MultipleChoice(dataset="quiz")

# Choices come from Parquet as NumPy arrays.
DATA = {
    "quiz": pd.DataFrame(
        {
            "id": ["7", "8", "9", "10"],
            "document": ["7", "8", "9", "9"],
            "question": ["What is wet?", "Who?", "Which?", "How?"],
            "choices": [
                np.array(["water", "a stone"], object),
                np.array(["Al", "Bernadette"], object),
                np.array(["ab", "abcd"], object),
                np.array(["one", "two", "six"], object),
            ],
            "answer": [0, 1, 1, 2],
            "context": ["  Rivers are water.", "", "", ""],
        }
    )
}
RESPONSES = {
    r.id: r
    for r in (
        Response("quiz/7", (-2.0, -9.0), (1, 2)),
        # The long choice is less probable, -4 against -3, but more so per character: -.4 > -1.5.
        Response("quiz/8", (-3.0, -4.0), (1, 4)),
        # The other way round for the gold choice: -3 > -4, but -3/2 < -4/4.
        Response("quiz/9", (-3.0, -4.0), (1, 1)),
        Response("quiz/10", (-1.0, -2.0, -1.5), (1, 1, 1)),
    )
}


def test_prompts_are_those_of_lm_evaluation_harness():
    requests = EVALUATION.requests(DATA)
    assert requests[0] == Request(
        "quiz/7", "Rivers are water.\nQuestion: What is wet?\nAnswer:", (" water", " a stone")
    )
    assert requests[1].context == "\nQuestion: Who?\nAnswer:"


def test_a_chat_has_the_prompt_as_the_users_turn_and_the_choice_as_the_assistants():
    chat = MultipleChoice(dataset="quiz", chat=True).requests(DATA)[0]
    tokenizer, plain = tiny_tokenizer(), EVALUATION.requests(DATA)[0]
    prompt = "Rivers are water.\nQuestion: What is wet?\nAnswer:"
    turns = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    read = {name: [tokenizer.decode(choice.tokens) for choice in encode(tokenizer, request, 999)]
            for name, request in (("chat", chat), ("plain", plain))}
    assert read == {"chat": [f"{turns}water", f"{turns}a stone"],
                    "plain": [f"{prompt} water", f"{prompt} a stone"]}
    # A model without a template is asked plainly, blank included.
    tokenizer.chat_template = None
    assert [tokenizer.decode(c.tokens) for c in encode(tokenizer, chat, 999)] == read["plain"]


def test_scores_without_a_chat_are_what_they_were():
    def identity(**fields):
        return EvaluateSpec(evaluation=MultipleChoice(dataset="quiz", **fields)).identity()

    assert identity()["evaluation"] == {
        "kind": "multiple_choice", "dataset": "quiz", "split": "test", "technique": None,
        "declared": {}}
    assert identity(chat=True)["evaluation"]["chat"] is True


def test_accuracy_by_sum_and_by_characters():
    """By the sum only the first is right; per character the first three are."""
    scores = EVALUATION.score(DATA, RESPONSES)
    assert scores["example_id"].tolist() == ["quiz/7", "quiz/8", "quiz/9", "quiz/10"]
    assert scores["document"].tolist() == ["quiz/7", "quiz/8", "quiz/9", "quiz/9"]
    assert scores["correct"].tolist() == [1, 0, 0, 0]
    assert scores["correct_norm"].tolist() == [1, 1, 1, 0]
    assert scores["gold"].tolist() == ["water", "Bernadette", "abcd", "six"]
    assert scores["prediction"].tolist() == ["water", "Al", "ab", "one"]
    summary = summarise(scores, EVALUATION.metrics())
    assert summary["accuracy"]["value"] == 0.25
    assert summary["accuracy_norm"]["value"] == 0.75
    assert summary["accuracy"]["n"] == 4
    assert summary["accuracy"]["documents"] == 3
    assert EVALUATION.metrics()[0].name == EVALUATION.primary


def test_missing_responses_are_named():
    some = {"quiz/7": RESPONSES["quiz/7"], "quiz/9": RESPONSES["quiz/9"]}
    with pytest.raises(StageFailed, match="2 of 4 responses are missing, the first 'quiz/8'"):
        EVALUATION.score(DATA, some)


def test_a_diverged_model_is_no_wrong_answer():
    broken = RESPONSES | {"quiz/8": Response("quiz/8", (float("nan"), -1.0), (1, 1))}
    with pytest.raises(StageFailed, match="in 1 of 4 responses, the first 'quiz/8'"):
        EVALUATION.score(DATA, broken)
