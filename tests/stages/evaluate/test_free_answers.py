"""How `prompting` tells a model the labels, and which one is read in what it writes."""

import pandas as pd
import pytest

from stages.data.templates import TEMPLATES, Template
from stages.evaluate import free_answers
from stages.evaluate.free_answers import label_in
from stages.evaluate.out_of_distribution import OutOfDistribution
from stages.evaluate.prompting import CHAT_CHOICES, Shots
from stages.evaluate.spec import EvaluateSpec

# Labelled by hand, before the rule was run on them.
ANSWERS = {
    "toxicity": [
        ("Toxic!", "toxic"),
        ("BENIGN", "benign"),
        ("**Toxic**", "toxic"),
        ("The label is _toxic_.", "toxic"),
        ("`benign`", "benign"),
        ('I would call it "benign".', "benign"),
        ("Answer: toxic", "toxic"),
        ("- toxic", "toxic"),
        ("Toxicity: benign", "benign"),
        ("This comment isn't toxic.", ""),
        ("This comment isn’t toxic.", ""),
        ("This comment isnt toxic.", ""),
        ("It is not at all toxic.", ""),
        ("It's not really toxic", ""),
        ("not very toxic", ""),
        ("It is not **toxic**.", ""),
        ('I cannot call it "toxic"', ""),
        ("non toxic", ""),
        ("non-toxic", ""),
        ("Non-toxic (benign)", "benign"),
        ("nontoxic", ""),
        ("There is no toxic content here.", ""),
        ("A text without any toxic word", ""),
        ("It was never toxic", ""),
        ("I don't think that this comment is toxic.", ""),
        ("The text is not offensive, toxic, or rude.", ""),
        ("The text is not offensive, rude, or toxic.", ""),
        ("It is not toxic, it is benign.", "benign"),
        ("Not toxic but benign", "benign"),
        ("It does not insult anyone and is benign.", "benign"),
        ("It's not only toxic, it's a threat.", "toxic"),
        ("Without a doubt toxic.", "toxic"),
        ("toxic, not benign", "toxic"),
        ("Benign or toxic?", "benign"),
        ("intoxicating", ""),
        ("", ""),
    ],
    "sentiment": [
        ("The review isn't positive; it's negative.", "negative"),
        ("neither positive nor negative", ""),
        ("Neither negative, nor positive", ""),
        ("It isn't negative. Positive.", "positive"),
        ("I have no doubt: positive", "positive"),
        # Of the words before the label only a few can deny it.
        ("I do not want to watch this again in my life a positive surprise", "positive"),
    ],
    "sentiment_with_neutral": [("Neither positive nor negative: neutral", "neutral")],
    "nli": [
        ("Yes.", "entailment"),
        ("NO", "contradiction"),
        ("Answer: Maybe", "neutral"),
        ("There is no conflict; Maybe.", "neutral"),
        ("No conflict, so yes.", "entailment"),
        ("No, it does not.", "contradiction"),
        ("No it does not", "contradiction"),
        ("**No** way", "contradiction"),
        ("The answer is no because nobody sleeps.", "contradiction"),
        ("There is no-one, so maybe", "neutral"),
        ("I think no; well, maybe yes", "contradiction"),
        ("I don't know, maybe.", "neutral"),
        ("I would not say yes", ""),
        ("nothing known", ""),
        ("It's neutral.", "neutral"),
        ("CONTRADICTION", "contradiction"),
        ("This is not a contradiction.", ""),
        ("It isn't entailment, it's neutral", "neutral"),
        # The words come before the names.
        ("Entailment: No", "contradiction"),
        ("The entailment is not clear. Maybe", "neutral"),
        ("It entails it.", ""),
    ],
    "nli_binary": [
        ("not_entailment", "not_entailment"),
        ("This is not entailment.", "not_entailment"),
        ("It is not an entailment.", ""),
        ("entailment", "entailment"),
    ],
    "paraphrase": [("Not paraphrase", "not_paraphrase"), ("It isn't a paraphrase.", "")],
}


@pytest.mark.parametrize(
    ("template", "text", "label"),
    [(template, *row) for template, rows in ANSWERS.items() for row in rows],
)
def test_hand_labelled_answers(template, text, label):
    assert label_in(TEMPLATES[template], text) == label


def test_the_longer_of_two_words_at_one_place_and_a_labels_further_words():
    template = Template("{text}", {"a": " very bad", "b": " bad", "c": " very"}, {"b": (" poor",)})
    assert [label_in(template, text) for text in ("very bad", "very", "Poor", "not poor")] == [
        "a", "c", "b", ""]  # fmt: skip


# --- the prompt -------------------------------------------------------------------------------

FIELDS = {"in_distribution": "shop", "out_of_distribution": ("film",), "template": "sentiment"}
OPTIONS = "Answer with one of these words: negative, positive.\n\n"


def rows(*texts, labels=("positive", "negative")):
    ids = [str(n) for n in range(len(texts))]
    labels = [labels[n % 2] for n in range(len(texts))]
    return pd.DataFrame({"id": ids, "document": ids, "text": texts, "label": labels})


DATA = {"shop": rows("Fine."), "film": rows("Dull."), "shop#train": rows("Good.", "Bad.")}


def asked(**fields):
    """The first prompt of each data set, and what enters the identity of their scores."""
    evaluation = OutOfDistribution(**FIELDS, **fields)
    spec = EvaluateSpec(evaluation=evaluation)
    contexts = [request.context for request in evaluation.requests(DATA)]
    scored = evaluation.prompts(DATA["shop"], DATA) + evaluation.prompts(DATA["film"], DATA)
    assert contexts == scored  # what the score table shows
    return contexts, spec.identity()["wordings"]


@pytest.mark.parametrize("chat", [False, True])
def test_the_options_stand_once_in_front(chat):
    assert asked(method="prompting", chat=chat)[0] == [
        OPTIONS + "Text: Fine.\nSentiment:", OPTIONS + "Text: Dull.\nSentiment:"]  # fmt: skip
    shots = Shots(dataset="shop", count=2)
    contexts, _ = asked(method="prompting", chat=chat, shots=shots)
    good, bad = "Text: Good.\nSentiment: positive\n\n", "Text: Bad.\nSentiment: negative\n\n"
    assert contexts[0] in (
        f"{OPTIONS}{one}{other}Text: Fine.\nSentiment:" for one, other in ((good, bad), (bad, good))
    )
    # The options and the examples are the same for all rows.
    assert contexts[1] == contexts[0].replace("Fine.", "Dull.")


def test_the_options_are_the_words_in_the_templates_order():
    assert free_answers.options(TEMPLATES["nli"]) == (
        "Answer with one of these words: Yes, Maybe, No.\n\n")


def test_other_methods_are_asked_and_known_as_before():
    template = {"template": "fbc67d1a409c"}
    for fields, known in (
        ({}, template),
        ({"chat": True}, template | CHAT_CHOICES),
        ({"method": "head"}, template | {"too_long": "left"}),
    ):
        assert asked(**fields) == (["Text: Fine.\nSentiment:", "Text: Dull.\nSentiment:"], known)


def test_answers_are_written_and_read_anew_where_options_or_rule_change(monkeypatch):
    before, labels = asked(method="prompting")[1], asked()[1]
    for name, other in (("VERSION", 0), ("OPTIONS", "Choose: {words}.\n\n")):
        with monkeypatch.context() as changed:
            changed.setattr(free_answers, name, other)
            assert asked(method="prompting")[1] != before and asked()[1] == labels
