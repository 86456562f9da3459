import numpy as np
import pandas as pd
import pytest

from stages.evaluate import premises
from stages.evaluate.base import Request, Response
from stages.evaluate.open_questions import (
    FalsePremises,
    OpenQuestion,
    exact_match,
    normalised,
    token_f1,
)
from stages.evaluate.partial import reads
from stages.evaluate.prompting import Shots
from stages.evaluate.techniques import SelfConsistency, collected
from stages.statistics import summarise

PAIRS = [
    ("The Eiffel Tower", "eiffel tower"),
    ("eiffel tower, Paris", "the Eiffel Tower"),
    ("", "anything"),
    ("the", "a"),
    ("14 December 1911!", "December 14, 1911"),
    ("an an apple a day", "apple apple day"),
    ("O'Neill", "oneill"),
    ("don't know", "Ångström"),
    ("  many\twords  here ", "many words"),
]


def test_by_hand():
    assert normalised("The  U.S.A., an ally!") == "usa ally"
    assert exact_match("The Eiffel-Tower.", "eiffeltower") == 1
    # Words apple, day against apple, apple, day: 2 common, precision 1, recall 2/3.
    assert token_f1("an apple a day", "apple apple day") == pytest.approx(0.8)
    assert token_f1("left", "right") == 0
    assert token_f1("the", "a") == 1  # nothing is left of either


def test_equals_an_independent_implementation():
    peer = pytest.importorskip("lm_eval.tasks.qasper.metrics")  # SQuAD's own script
    for answer, gold in PAIRS:
        assert normalised(answer) == peer.normalize_answer(answer)
        if normalised(answer) and normalised(gold):
            assert token_f1(answer, gold) == pytest.approx(peer.f1_abstractive([answer], [gold]))


def texts(*values):
    return np.array(values, object)


DATA = {
    "nq": pd.DataFrame(
        {
            "id": ["1", "2"],
            "document": ["1", "2"],
            "question": ["who built it", "When was it?"],
            "answers": [texts("The Romans", "Roman army"), texts("1066")],
            "category": "",
        }
    ),
    "nq#train": pd.DataFrame(
        {
            "id": list("abc"),
            "question": ["A", "B?", "C?"],
            "answers": [texts("x"), texts("y"), texts("z")],
        }
    ),
}


def test_prompt_and_shots():
    zero = OpenQuestion(dataset="nq").requests(DATA)
    assert zero[0] == Request(
        "nq/1",
        "Answer these questions:\n\nQ: who built it?\nA:",
        max_new_tokens=32,
        stop=("\n",),
    )
    assert zero[1].context.endswith("Q: When was it?\nA:")
    few = OpenQuestion(dataset="nq", shots=Shots(dataset="nq", count=2)).requests(DATA)
    shown = few[0].context.removeprefix("Answer these questions:\n\n").split("Q: ")
    assert len(shown) == 4 and set(shown[1:3]) < {"A?\nA: x\n", "B?\nA: y\n", "C?\nA: z\n"}
    chat = OpenQuestion(dataset="nq", chat=True).requests(DATA)[0]
    assert chat.chat and chat.stop == ()


def test_the_best_of_several_answers_counts():
    evaluation = OpenQuestion(dataset="nq")
    responses = {
        "nq/1": Response("nq/1", tokens=(4,), text="<think>Hm.</think>the Roman army!"),
        "nq/2": Response("nq/2", tokens=(4,), text=" in 1066"),
    }
    scores = evaluation.score(DATA, responses)
    assert scores["exact"].tolist() == [1, 0]
    assert scores["f1"].tolist() == pytest.approx([1, 2 / 3])
    assert scores["thinking"].tolist() == ["think", "none"]
    summary = summarise(scores, evaluation.metrics())
    assert summary["exact_match"]["value"] == 0.5
    assert summary["token_f1"]["value"] == pytest.approx(5 / 6)


def test_equal_answers_agree_in_a_vote():
    evaluation = OpenQuestion(dataset="nq")
    request = Request("nq/1", "Q", max_new_tokens=3)
    said = ("The Romans.", " romans", "<think>x</think>Romans")
    votes = {evaluation.vote(request, text) for text in said}
    assert votes == {"romans"}


def test_samples_without_an_answer_have_no_vote_while_others_have_one():
    technique = SelfConsistency(kind="self_consistency", samples=4)
    evaluation = OpenQuestion(dataset="nq", technique=technique)

    def winner(*said):
        responses = {f"q#sample{n}": Response(f"q#sample{n}", text=text)
                     for n, text in enumerate(said)}
        asked = [Request("q", "Q", max_new_tokens=3)]
        return collected(technique, asked, responses, evaluation.vote)["q"].text

    assert winner("<think>a", "Greeks", "", "<think>b") == "Greeks"
    assert winner("", "Greeks", "Romans", " romans") == "Romans"
    assert winner("", "<think>a", "", "") == ""


ANSWERS = {
    "There has never been a woman president of the United States.": ("corrects", "does not exist"),
    "Tom Cruise has not won an Oscar.": ("corrects", "did not happen"),
    "As of now, humans have yet to land on Mars.": ("corrects", "not yet"),
    "That is a common misconception: bats can see.": ("corrects", "names the error"),
    "The question rests on a false premise.": ("corrects", "names the error"),
    "Actually, it didn’t happen.": ("corrects", "did not happen"),
    "She won it in 2019 for her second novel.": ("accepts", "none"),
    "The first landing on Mars was in 2021.": ("accepts", "none"),
    "I don't know.": ("unsure", "does not know"),
    "I'm not sure. I do not have information about that.": ("unsure", "does not know"),
    "": ("unsure", "does not know"),
    "You can't see the Great Wall from the Moon.": ("corrects", "did not happen"),
    "No, he was born in Ulm.": ("corrects", "names the error"),
    "Actually, no. It is in Peru.": ("corrects", "names the error"),
    "Nope! She is a singer.": ("corrects", "names the error"),
    "No one knows him.": ("corrects", "does not exist"),
    "I can't say.": ("unsure", "does not know"),
    "I'm not sure, sorry. But there is no king of France.": ("corrects", "does not exist"),
    # Only the opening counts.
    "In 2020. It was warm. Many came. It has never rained since.": ("accepts", "none"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_rule_on_premises(answer):
    assert premises.judge(answer) == premises.Verdict(*ANSWERS[answer])


def questions(*values):
    ids = [str(n) for n in range(len(values))]
    answered = [texts("x")] * len(values)
    return pd.DataFrame(
        {"id": ids, "document": ids, "question": values, "answers": answered, "category": ""}
    )


def test_false_and_true_premises():
    evaluation = FalsePremises(false=("fresh",), true=("control",))
    data = {"fresh": questions("Why did he die?", "Who won?"), "control": questions("When?")}
    request = evaluation.requests(data)[0]
    assert request == Request("fresh/0", "Why did he die?", max_new_tokens=64, chat=True)
    responses = {
        id: Response(id, tokens=(3,), text=text)
        for id, text in {
            "fresh/0": "He is not dead.",
            "fresh/1": "<think>Nobody did.</think>She won.",
            "control/0": "There was no such event.",
        }.items()
    }
    scores = evaluation.score(data, responses)
    assert scores["prediction"].tolist() == ["corrects", "accepts", "corrects"]
    assert (scores["judge"] == premises.VERSION).all()
    assert FalsePremises.VERSION == premises.VERSION + 1
    values = {n: row["value"] for n, row in summarise(scores, evaluation.metrics()).items()}
    assert values == {"corrected_rate": 0.5, "contradicted_rate": 1.0, "unsure_rate": 0.0}
    assert FalsePremises(false=("fresh",)).metrics()[1].name == "unsure_rate"


def test_premises_of_several_sets_each_and_at_worst():
    """False: fresh 1 of 1, own 1 of 3 corrected; true: plain 0 of 1, odd 1 of 2 contradicted."""
    evaluation = FalsePremises(false=("fresh", "own"), true=("plain", "odd"))
    data = {
        "fresh": questions("A?"), "own": questions("B?", "C?", "D?"),
        "plain": questions("E?"), "odd": questions("F?", "G?"),
    }  # fmt: skip
    accept, correct = "It was in 1999.", "There was no such event."
    answered = {request.id: accept for request in evaluation.requests(data)}
    answered |= dict.fromkeys(("fresh/0", "own/2", "odd/0"), correct)
    responses = {id: Response(id, tokens=(3,), text=text) for id, text in answered.items()}
    summary = summarise(evaluation.score(data, responses), evaluation.metrics())
    assert {name: row["value"] for name, row in summary.items()} == pytest.approx(
        {
            "corrected_rate": 2 / 4,
            "contradicted_rate": 1 / 3,
            "unsure_rate": 0,
            "worst_corrected_rate": 1 / 3,
            "corrected_rate/fresh": 1,
            "corrected_rate/own": 1 / 3,
            "worst_contradicted_rate": 1 / 2,
            "contradicted_rate/plain": 0,
            "contradicted_rate/odd": 1 / 2,
        }
    )
    read = {metric.name: reads(metric, evaluation) for metric in evaluation.metrics()}
    assert read["corrected_rate/own"] == {"own"}
    assert read["worst_contradicted_rate"] == {"plain", "odd"}
