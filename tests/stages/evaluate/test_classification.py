import math

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from scipy.special import logsumexp
from sklearn import metrics as sklearn_metrics

from stages.data.templates import TEMPLATES, Template
from stages.errors import StageFailed
from stages.evaluate.base import Request, Response
from stages.evaluate.classification import most_probable
from stages.evaluate.out_of_distribution import AdversarialSets
from stages.evaluate.prompting import CHAT_CHOICES, Shots
from stages.evaluate.scorer import encode
from stages.models.tiny import tiny_tokenizer
from stages.statistics import summarise

FIELDS = {"standard": "snli", "adversarial": ("r1", "r2"), "template": "nli"}
LABELS = {"e": "entailment", "n": "neutral", "c": "contradiction"}


def rows(golds):
    ids = [str(n) for n in range(len(golds))]
    return pd.DataFrame(
        {
            "id": ids,
            "document": ids,
            "premise": [f"P{n}" for n in ids],
            "hypothesis": [f"H {{premise}} {n}" for n in ids],
            "label": [LABELS[gold] for gold in golds],
        }
    )


DATA = {"snli": rows("eenc"), "r1": rows("encc"), "r2": rows("ec")}
PREDICTED = {"snli": "eenc", "r1": "eecx", "r2": "cc"}  # x: no label
WORDS = {"e": "Yes, it does.", "n": "maybe", "c": "<think>Yes?</think> NO", "x": "It rains."}


def responses(method, table=PREDICTED):
    made = {}
    for name, letters in table.items():
        for number, letter in enumerate(letters):
            place = "enc".find(letter)
            outputs = tuple(float(i == place) for i in range(3))
            id = f"{name}/{number}"
            made[id] = {
                "label_words": Response(id, outputs, (1, 1, 1)),
                "head": Response(id, outputs=outputs),
                "prompting": Response(id, tokens=(2,), text=WORDS[letter]),
            }[method]
    return made


# --- templates --------------------------------------------------------------------------------


def test_a_template_fills_in_columns_and_leaves_braces_of_the_text():
    request = AdversarialSets(**FIELDS).requests(DATA)[0]
    assert "Premise: P0\nHypothesis: H {premise} 0\n" in request.context
    assert request.choices == (" Yes", " Maybe", " No")
    assert TEMPLATES["nli"].columns == ("premise", "hypothesis")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "no field", "labels": {"a": " a"}},
        {"prompt": "{premise} {text}", "labels": {"a": " a"}},
        {"prompt": "{text}", "labels": {"a": " a"}, "synonyms": {"b": (" c",)}},
    ],
)
def test_templates_that_cannot_work(fields):
    with pytest.raises(ValueError, match="no task has the fields|synonyms of no label: {'b'}"):
        Template(**fields)


@pytest.mark.parametrize(
    ("prompt", "task"),
    [
        ("{text}", "classification"),
        ("{hypothesis}", "nli"),
        ("{sentence2} {sentence1}", "paraphrase"),
    ],
)
def test_the_columns_of_a_template_tell_its_task(prompt, task):
    assert Template(prompt, {"a": " a"}).task == task


def test_pairs_of_questions_are_asked_whether_they_mean_the_same():
    def pairs(*labels):
        ids = [str(n) for n in range(len(labels))]
        return pd.DataFrame({"id": ids, "document": ids, "sentence1": "Is it?", "label": labels,
                             "sentence2": [f"Was it {n}?" for n in ids]})

    same, other = "paraphrase", "not_paraphrase"
    evaluation = AdversarialSets(standard="qqp", adversarial=("hard",), template="paraphrase")
    data = {"qqp": pairs(same, other), "hard": pairs(same, other, other)}
    assert set(evaluation.tasks().values()) == {"paraphrase"}
    asked = evaluation.requests(data)
    assert asked[1].context == "First: Is it?\nSecond: Was it 1?\nDo both mean the same?"
    assert asked[0].choices == (" Yes", " No")
    # The model always says yes.
    answered = {r.id: Response(r.id, (-1.0, -2.0), (1, 1)) for r in asked}
    scores = evaluation.score(data, answered)
    found = summarise(scores, evaluation.metrics(), resamples=10)
    assert found["standard_accuracy"]["value"] == 1 / 2
    assert found["adversarial_accuracy"]["value"] == pytest.approx(1 / 3)
    # F1 of yes: 2 / (2 + 2); of no: 0.
    assert found["adversarial_macro_f1"]["value"] == pytest.approx(1 / 4)


def test_every_part_of_a_template_is_in_its_hash():
    base = {"prompt": "{text}:", "labels": {"a": " a", "b": " b"}}
    others = [
        base | {"prompt": "{text}?"},
        base | {"labels": {"b": " b", "a": " a"}},  # the order decides ties and a head's outputs
        base | {"synonyms": {"a": (" c",)}},
    ]
    assert len({Template(**fields).hash for fields in (base, *others)}) == 4


# --- label words ------------------------------------------------------------------------------


def test_a_labels_probability_is_the_sum_over_its_words():
    template = Template("{text}", {"a": " one", "b": " two"}, synonyms={"b": (" 2", " both")})
    assert [word for _, word in template.words] == [" one", " two", " 2", " both"]
    # .4 against .2 + .15 + .15
    assert most_probable(template, np.log([0.4, 0.2, 0.15, 0.15])) == "b"
    assert most_probable(template, np.log([0.51, 0.2, 0.15, 0.15])) == "a"
    assert most_probable(template, np.array([-900.0, -905, -905, -905])) == "a"


def test_calibration_divides_by_the_prompt_without_content():
    plain = AdversarialSets(**FIELDS)
    calibrated = AdversarialSets(**FIELDS, calibrated=True)
    assert plain.requests(DATA) == calibrated.requests(DATA)[:-1]
    last = calibrated.requests(DATA)[-1]
    assert last.id == "#calibration" and "Premise: N/A\nHypothesis: N/A\n" in last.context
    # "Yes" has .6 before every text: what the text adds speaks for "No".
    answer = Response("#calibration", tuple(np.log([0.6, 0.3, 0.1])), (1, 1, 1))
    table = {
        id: Response(id, tuple(np.log([0.5, 0.2, 0.3])), (1, 1, 1)) for id in responses("head")
    }
    assert set(plain.score(DATA, table)["prediction"]) == {"entailment"}
    found = calibrated.score(DATA, table | {answer.id: answer})
    assert set(found["prediction"]) == {"contradiction"}


def test_shots_take_turns_and_stand_before_every_prompt():
    evaluation = AdversarialSets(**FIELDS, shots=Shots(dataset="snli", count=3))
    assert evaluation.sources()["snli#train"] == ("snli", "train")
    # The first row is also scored, in other letters: it is passed over.
    others = rows("eeeennc").assign(premise=["p0", *(f"Other {n}" for n in range(6))])
    others.loc[0, "hypothesis"] = "h {premise}  0"
    data = DATA | {"snli#train": others}
    first, second = evaluation.requests(data)[:2]
    shown, _, _ = first.context.rpartition("Premise: P0")
    assert second.context.startswith(shown)
    endings = [part.rsplit(": ", 1)[1] if ": " in part else part for part in shown.split("\n\n")]
    assert sorted(ending.split()[-1] for ending in endings if ending) == ["Maybe", "No", "Yes"]
    assert "p0" not in shown and shown.count("Premise: Other") == 3
    with pytest.raises(StageFailed, match="snli/train has 0 rows whose texts are not scored, and "):
        evaluation.requests(DATA | {"snli#train": rows("eec")})
    strange = DATA | {"snli#train": others.assign(label="odd")}
    with pytest.raises(StageFailed, match="'snli' has the label 'odd'"):
        evaluation.requests(strange)


# --- the three methods ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["label_words", "prompting", "head"])
def test_requests_and_predictions(method):
    evaluation = AdversarialSets(**FIELDS, method=method)
    request = evaluation.requests(DATA)[4]
    assert (request.id, bool(request.choices), request.head, request.generates) == (
        "r1/0", method == "label_words", method == "head", method == "prompting"
    )  # fmt: skip
    table = PREDICTED if method == "prompting" else PREDICTED | {"r1": "eece"}
    scores = evaluation.score(DATA, responses(method, table))
    last = "" if method == "prompting" else "entailment"
    assert scores["prediction"].tolist()[:8] == [
        *("entailment", "entailment", "neutral", "contradiction"),
        *("entailment", "entailment", "contradiction", last),
    ]
    assert scores["correct"].tolist() == [1, 1, 1, 1, 1, 0, 1, 0, 0, 1]
    assert ("out_of_set_rate" in {m.name for m in evaluation.metrics()}) == (method == "prompting")


def test_summaries_by_hand_and_as_scikit_learn():
    evaluation = AdversarialSets(**FIELDS, method="prompting")
    scores = evaluation.score(DATA, responses("prompting"))
    values = {n: row["value"] for n, row in summarise(scores, evaluation.metrics()).items()}
    f1 = {
        name: sklearn_metrics.f1_score(
            part["gold"],
            part["prediction"],
            labels=sorted({*part["gold"], *part["prediction"]} - {""}),
            average="macro",
            zero_division=0,
        )
        for name, part in scores.groupby("domain")
    }
    assert values == pytest.approx(
        {
            "adversarial_accuracy": 1 / 2,
            "standard_accuracy": 1,
            "standard_balanced_accuracy": 1,
            "standard_macro_f1": 1,
            "robustness_gap": 1 - (1 / 2 + 1 / 2) / 2,
            "adversarial_macro_f1": (f1["r1"] + f1["r2"]) / 2,
            "adversarial_pooled_accuracy": 3 / 6,
            "adversarial_worst_accuracy": 1 / 2,
            "adversarial_worst_macro_f1": min(f1["r1"], f1["r2"]),
            "accuracy/r1": 1 / 2,
            "accuracy/r2": 1 / 2,
            "macro_f1/r1": f1["r1"],
            "macro_f1/r2": f1["r2"],
            "out_of_set_rate": 1 / 10,
        }
    )
    assert f1["r1"] != pytest.approx(f1["r2"])
    assert list(values)[0] == evaluation.primary


def test_a_head_with_other_labels_is_refused():
    evaluation = AdversarialSets(**FIELDS, method="head")
    wrong = {id: Response(id, outputs=(0.0, 1.0)) for id in responses("head")}
    with pytest.raises(StageFailed, match="has 2 outputs, the template 3 labels"):
        evaluation.score(DATA, wrong)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"calibrated": True, "method": "prompting"}, "calibrated has no effect with method"),
        ({"max_new_tokens": 3}, "max_new_tokens has no effect with method: label_words"),
        ({"shots": Shots(dataset="a", count=1), "method": "head"}, "shots has no effect"),
        ({"chat": True, "method": "head"}, "chat has no effect"),
        ({"technique": {"kind": "dola"}, "method": "head"}, "technique has no effect"),
        ({"technique": {"kind": "contrastive", "amateur": "a"}, "method": "head"}, "no effect"),
        ({"technique": {"kind": "self_consistency"}}, "generates none"),
        ({"adversarial": ("snli",)}, "name each set once"),
    ],
)
def test_fields_that_cannot_act_are_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        AdversarialSets(**(FIELDS | fields))


def test_extreme_scores_are_summed_without_underflow():
    template = Template("{text}", {"a": " a", "b": " b"}, synonyms={"a": (" aa",)})
    scores = np.array([-2000.0, -1999.5, -2000.0])
    assert logsumexp(scores[[0, 2]]) == pytest.approx(-2000 + math.log(2))
    assert most_probable(template, scores) == "a"


def test_requests_of_a_chat():
    evaluation = AdversarialSets(**FIELDS, chat=True, method="prompting")
    assert evaluation.requests(DATA)[0] == Request(
        "snli/0", evaluation.requests(DATA)[0].context, max_new_tokens=16, chat=True
    )
    # Label words lose their blank after a chat template, so older scores of such chats are stale.
    words = AdversarialSets(**FIELDS, chat=True)
    context = words.requests(DATA)[0].context
    turns = f"<|im_start|>user\n{context}<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = tiny_tokenizer()
    assert [tokenizer.decode(choice.tokens) for choice in
            encode(tokenizer, words.requests(DATA)[0], 9999)] == [
        turns + word for word in ("Yes", "Maybe", "No")]
    plain = AdversarialSets(**FIELDS)
    assert words.wordings() == plain.wordings() | CHAT_CHOICES
    written = AdversarialSets(**FIELDS, method="prompting")
    assert evaluation.wordings() == written.wordings()
