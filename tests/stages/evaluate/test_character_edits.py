import random
from functools import cache

import pandas as pd
import pytest

from stages.evaluate.adversarial import CharacterEdits
from stages.evaluate.base import Response
from stages.evaluate.character_edits import (
    NEIGHBOURS,
    Surrogate,
    alignment_distance,
    edited_pair,
)
from stages.statistics import summarise

OPERATIONS = ("swap", "delete", "insert", "substitute")

TRAIN = pd.DataFrame(
    {
        "text": ["superb screen", "superb sound", "awful screen", "awful sound", "plain case"] * 4,
        "label": ["positive", "positive", "negative", "negative", "positive"] * 4,
    }
)


@pytest.fixture(scope="module")
def surrogate():
    return Surrogate(TRAIN)


def slow_distance(a, b):
    """The textbook recursion."""

    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        options = [
            distance(i - 1, j) + 1,
            distance(i, j - 1) + 1,
            distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]),
        ]
        if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
            options.append(distance(i - 2, j - 2) + 1)
        return min(options)

    return distance(len(a), len(b))


def sentence(rng, words):
    """Words of few letters, so that edits could cancel each other."""
    return " ".join(
        "".join(rng.choice("abbc'") for _ in range(rng.randint(1, 9))) for _ in range(words)
    )


def test_distance_equals_the_textbook_recursion():
    rng = random.Random(0)
    for _ in range(500):
        a, b = sentence(rng, 2), sentence(rng, 2)
        for most in (1, 4, 20):
            assert alignment_distance(a, b, most) == min(slow_distance(a, b), most + 1)
    assert alignment_distance("ca", "abc", 5) == 3  # 2 if a part could be edited twice


@pytest.mark.parametrize(
    ("a", "b"), [("great", "graet"), ("great", "grat"), ("great", "greaat"), ("great", "grest")]
)
def test_each_operation_counts_one(a, b):
    assert alignment_distance(a, b, 3) == 1


def test_neighbours_on_the_keyboard():
    assert set(NEIGHBOURS["g"]) == set("ftyhvb")
    assert set(NEIGHBOURS["q"]) == set("wa")
    assert all(a in NEIGHBOURS[b] for a in NEIGHBOURS for b in NEIGHBOURS[a])


@pytest.mark.parametrize("operations", [OPERATIONS, ("swap",), ("delete", "insert")])
def test_the_number_of_edits_is_exact(surrogate, operations):
    rng = random.Random(1)
    reached = 0
    for case in range(150):
        text = sentence(rng, rng.randint(1, 12))
        attacked, control, edits = edited_pair(
            text, "positive", surrogate, 4, operations, f"0/{case}"
        )
        assert slow_distance(text, attacked) == slow_distance(text, control) == edits <= 4
        reached += edits == 4
    assert reached > 60


@pytest.mark.parametrize(
    ("operation", "longer"), [("delete", -3), ("insert", 3), ("swap", 0), ("substitute", 0)]
)
def test_operations_are_those_asked_for(surrogate, operation, longer):
    text = "The superb screen and awful sound of it"
    attacked, control, edits = edited_pair(text, "positive", surrogate, 3, (operation,), "s")
    assert edits == 3
    for edited in (attacked, control):
        assert len(edited) - len(text) == longer
        assert (sorted(edited) == sorted(text)) == (operation == "swap")


def test_the_attack_edits_the_words_that_speak_for_the_label(surrogate):
    text = "A superb screen yet awful sound and some other words about nothing"
    assert surrogate.contribution("Superb", "positive") > 0 > surrogate.contribution(
        "superb", "negative"
    )
    assert surrogate.contribution("unheard", "positive") == 0
    touched = {"superb": 0, "awful": 0}
    control_touched = 0
    for case in range(40):
        for label, word in (("positive", "superb"), ("negative", "awful")):
            attacked, control, _ = edited_pair(text, label, surrogate, 1, OPERATIONS, f"{case}")
            touched[word] += word not in attacked.split()
            control_touched += word not in control.split()
    assert touched == {"superb": 40, "awful": 40}
    assert control_touched < 25  # one of 11 editable words, 80 draws


def test_the_control_edits_as_many_words_as_the_attack(surrogate):
    """One word speaks for the label and takes both edits; so both go into one word at random."""
    text = "superb unknown another following further"
    for case in range(20):
        *pair, edits = edited_pair(text, "positive", surrogate, 2, OPERATIONS, f"{case}")
        assert edits == 2
        for edited in pair:
            pairs = zip(text.split(), edited.split(), strict=True)
            assert sum(old != new for old, new in pairs) == 1
        assert pair[0].split()[1:] == text.split()[1:]


def test_three_labels_are_told_apart():
    train = pd.concat(
        [TRAIN, pd.DataFrame({"text": ["average thing"] * 8, "label": ["neutral"] * 8})]
    )
    three = Surrogate(train)
    for word, label in (("superb", "positive"), ("awful", "negative"), ("average", "neutral")):
        weights = {each: three.contribution(word, each) for each in three.weights}
        assert max(weights, key=weights.get) == label
        assert sum(weights.values()) == pytest.approx(0, abs=1e-4)


def test_texts_without_words_stay_as_they_are(surrogate):
    for text in ("", ":) 10/10 !!", "aaa bbb", "ok"):
        assert edited_pair(text, "positive", surrogate, 4, OPERATIONS, "s") == (text, text, 0)


EVALUATION = CharacterEdits(dataset="shop", template="sentiment", edits=2)
TEST = pd.DataFrame(
    {
        "id": ["a", "b", "c", "d"],
        "document": ["1", "1", "2", "3"],
        "text": [
            "Superb sound, superb screen.",
            "An awful case",
            "It's superb!",
            "A really awful thing",
        ],
        "label": ["positive", "negative", "positive", "negative"],
    }
)
DATA = {"shop": TEST, "shop#train": TRAIN}


def test_edits_depend_on_seed_and_id_only():
    requests = {request.id: request for request in EVALUATION.requests(DATA)}
    assert len(requests) == 12
    turned = {"shop": TEST[::-1][:3], "shop#train": TRAIN}
    for request in EVALUATION.requests(turned):
        assert request == requests[request.id]
    other = CharacterEdits(dataset="shop", template="sentiment", edits=2, seed=1)
    changed = [request for request in other.requests(DATA) if request != requests[request.id]]
    assert all(not request.id.endswith("/clean") for request in changed)
    assert len(changed) >= 6


def test_the_template_is_never_edited():
    for request in EVALUATION.requests(DATA):
        assert request.context.startswith("Text: ")
        assert request.context.endswith("\nSentiment:")
        assert request.choices == (" negative", " positive")
        text = request.context.removeprefix("Text: ").removesuffix("\nSentiment:")
        original = TEST.set_index("id").loc[request.id.split("/")[1], "text"]
        edits = 0 if request.id.endswith("/clean") else 2
        assert slow_distance(original, text) == edits


def test_sources_name_the_surrogates_split():
    assert EVALUATION.sources() == {"shop": ("shop", "test"), "shop#train": ("shop", "train")}


def test_metrics_by_hand():
    """Clean 3 of 4 right, random 2 of 4, attacked 1 of 4; two texts of each label.

    Attacked, a alone is right: b and d are taken for positive, c for negative, so that F1 is
    2/(2+3) of positive and 0 of negative.
    """
    right = {"clean": "abc", "random": "ab", "adversarial": "a"}
    gold = dict(zip(TEST["id"], TEST["label"], strict=True))
    responses = {}
    for subset, ids in right.items():
        for id, label in gold.items():
            positive = (label == "positive") == (id in ids)
            logprobs = (-2.0, -1.0) if positive else (-1.0, -2.0)
            key = f"shop/{id}/{subset}"
            responses[key] = Response(key, logprobs, (1, 1))
    scores = EVALUATION.score(DATA, responses)
    assert scores["example_id"].tolist() == [r.id for r in EVALUATION.requests(DATA)]
    assert scores["document"].tolist()[:4] == ["shop/1"] * 4
    assert scores.groupby("subset")["edits"].unique().map(list).to_dict() == {
        "clean": [0], "adversarial": [2], "random": [2]
    }  # fmt: skip
    summary = summarise(scores, EVALUATION.metrics())
    assert {name: row["value"] for name, row in summary.items()} == {
        "adversarial_accuracy": 0.25,
        "clean_accuracy": 0.75,
        "random_edit_accuracy": 0.5,
        "adversarial_drop": 0.5,
        "adversarial_excess": 0.25,
        "adversarial_macro_f1": pytest.approx((2 / 5 + 0) / 2),
        "clean_macro_f1": pytest.approx((2 * 2 / (2 + 3) + 2 / (1 + 2)) / 2),
        "random_edit_macro_f1": pytest.approx((0.5 + 0.5) / 2),
    }
    assert summary["adversarial_accuracy"]["n"] == 4
    assert EVALUATION.metrics()[0].name == EVALUATION.primary
