import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from sklearn import metrics as sklearn_metrics

from stages.errors import StageFailed
from stages.evaluate.base import Request, Response
from stages.evaluate.confusion import balanced_accuracy, macro_f1
from stages.evaluate.out_of_distribution import AdversarialSets, OutOfDistribution
from stages.statistics import paired, summarise

EVALUATION = OutOfDistribution(
    in_distribution="shop", out_of_distribution=("film", "news"), template="sentiment"
)


def domain(gold):
    """Rows whose text is a number; labels by their first letters."""
    labels = [{"p": "positive", "n": "negative"}[letter] for letter in gold]
    ids = [str(number) for number in range(len(gold))]
    return pd.DataFrame({"id": ids, "document": ids, "text": ids, "label": labels})


# The template's first choice is " negative".
LOGPROBS = {"n": (-1.0, -2.0), "p": (-2.0, -1.0)}
DATA = {"shop": domain("ppnn"), "film": domain("pppn"), "news": domain("nn")}
PREDICTED = {"shop": "ppnp", "film": "ppnn", "news": "np"}
RESPONSES = {
    f"{name}/{number}": Response(f"{name}/{number}", LOGPROBS[letter], (1, 1))
    for name, letters in PREDICTED.items()
    for number, letter in enumerate(letters)
}


def summary():
    scores = EVALUATION.score(DATA, RESPONSES)
    return {name: row["value"] for name, row in summarise(scores, EVALUATION.metrics()).items()}


def test_requests_use_the_templates_words():
    requests = EVALUATION.requests(DATA)
    assert len(requests) == 10
    assert requests[4] == Request("film/0", "Text: 0\nSentiment:", (" negative", " positive"))


def test_metrics_by_hand():
    """shop 3/4; film 3/4, news 1/2: 5/8, 4 of 6 pooled; 3/4 - 5/8 = 1/8 lost."""
    film = (2 * 2 / (3 + 2) + 2 * 1 / (1 + 2)) / 2
    news = (0 + 2 * 1 / (2 + 1)) / 2
    assert summary() == pytest.approx(
        {
            "ood_accuracy": (3 / 4 + 1 / 2) / 2,
            "id_accuracy": 3 / 4,
            "id_balanced_accuracy": (2 / 2 + 1 / 2) / 2,
            "id_macro_f1": (2 * 2 / (2 + 3) + 2 * 1 / (2 + 1)) / 2,
            "id_minus_ood": 1 / 8,
            "ood_macro_f1": (film + news) / 2,
            "ood_pooled_accuracy": 4 / 6,
            "ood_worst_accuracy": 1 / 2,
            "ood_worst_macro_f1": min(film, news),
            "accuracy/film": 3 / 4,
            "accuracy/news": 1 / 2,
            "macro_f1/film": film,
            "macro_f1/news": news,
        },
        abs=1e-12,
    )
    assert EVALUATION.metrics()[0].name == EVALUATION.primary
    assert {m.name for m in EVALUATION.metrics() if not m.higher_is_better} == {"id_minus_ood"}


def test_a_premise_that_several_sets_share_is_one_cluster():
    premise, other = "0123456789abcdef", "fedcba9876543210"  # digests of texts
    data = DATA | {
        "shop": DATA["shop"].assign(document=[premise, premise, "2", "3"]),
        "film": DATA["film"].assign(document=[other, premise, "2", "3"]),
    }
    scores = EVALUATION.score(data, RESPONSES).set_index("example_id")
    assert scores.loc[["shop/0", "shop/1", "film/1"], "document"].tolist() == [premise] * 3
    assert scores.loc[["shop/2", "film/2", "film/0"], "document"].tolist() == [
        "shop/2", "film/2", other]


@pytest.mark.parametrize("kind", [OutOfDistribution, AdversarialSets])
def test_declared_documents_are_one_cluster_in_all_sets(kind):
    """200 sentences in ten styles; the answers follow the sentence, and one model errs where the
    other does not on some of them: by style a difference would seem shown that is none."""
    rng = np.random.default_rng(5)
    sets = [f"style{number}" for number in range(10)]
    fields = [name for name in kind.model_fields if name in (
        "in_distribution", "out_of_distribution", "standard", "adversarial")]
    evaluation = kind(**dict(zip(fields, ("plain", sets), strict=True)), template="sentiment")
    ids = [str(number) for number in range(200)]
    frame = pd.DataFrame({"id": ids, "document": ids, "text": ids, "label": "positive"})
    wrong = rng.permutation(200)[:60]
    errs = {"first": set(wrong[:26]), "second": set(wrong[26:])}

    def scores(model, documents):
        data = dict.fromkeys(("plain", *sets), frame.assign(document=documents))
        letters = {id: "pn"[int(id) in errs[model]] for id in ids}
        said = {f"{name}/{id}": Response(f"{name}/{id}", LOGPROBS[letter], (1, 1))
                for name in data for id, letter in letters.items()}
        return evaluation.score(data, said)

    found = {}
    for shared in (False, True):
        documents = [f"=sst2/{id}" for id in ids] if shared else ids
        tables = [[scores(model, documents)] for model in ("first", "second")]
        assert tables[0][0]["document"].nunique() == (200 if shared else 2200)
        found[shared] = paired(*tables, evaluation.metrics()[0])
    assert found[True].difference == found[False].difference == pytest.approx(0.04)
    assert found[False].documents == 2000 and found[False].p_value < 0.01
    assert found[True].documents == 200 and found[True].p_value > 0.2
    assert found[False].ci_low > 0 > found[True].ci_low


def test_metrics_equal_scikit_learn():
    scores = EVALUATION.score(DATA, RESPONSES)
    values = summary()
    for name in ("shop", "film", "news"):
        rows = scores[scores["domain"] == name]
        f1 = sklearn_metrics.f1_score(rows["gold"], rows["prediction"], average="macro")
        assert values["id_macro_f1" if name == "shop" else f"macro_f1/{name}"] == pytest.approx(f1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # classes that do not occur
def test_functions_of_counts_equal_scikit_learn_on_any_labels():
    rng = np.random.default_rng(0)
    for classes, n in ((2, 5), (3, 4), (3, 200), (5, 9)):
        for _ in range(50):
            gold, predicted = rng.integers(classes, size=(2, n))
            counts = np.zeros((classes, classes))
            np.add.at(counts, (gold, predicted), 1)
            assert macro_f1(counts) == pytest.approx(
                sklearn_metrics.f1_score(gold, predicted, average="macro")
            )
            assert balanced_accuracy(counts) == pytest.approx(
                sklearn_metrics.balanced_accuracy_score(gold, predicted)
            )


def test_values_are_computed_for_many_resamples_at_once():
    scores = EVALUATION.score(DATA, RESPONSES)
    weights = np.random.default_rng(1).integers(1, 3, size=(7, len(scores)))
    for metric in EVALUATION.metrics():
        sums = weights @ metric.statistics(scores)
        each = [metric.value(row) for row in sums]
        np.testing.assert_allclose(metric.value(sums), each)
        repeated = scores.loc[np.repeat(np.arange(len(scores)), weights[0])]
        np.testing.assert_allclose(each[0], metric.value(metric.statistics(repeated).sum(axis=0)))


def test_the_first_label_wins_a_tie():
    tie = RESPONSES | {"news/1": Response("news/1", (-1.0, -1.0), (1, 1))}
    scores = EVALUATION.score(DATA, tie).set_index("example_id")
    assert scores.loc["news/1", "prediction"] == "negative"


def test_a_label_without_a_word_is_refused():
    data = DATA | {"news": DATA["news"].assign(label="mixed")}
    with pytest.raises(StageFailed, match="'news' has the label 'mixed', which template"):
        EVALUATION.requests(data)


@pytest.mark.parametrize("outside", [["shop"], ["film", "film"], []])
def test_domains_are_named_once_and_at_all(outside):
    with pytest.raises(ValidationError):
        OutOfDistribution(
            in_distribution="shop", out_of_distribution=outside, template="sentiment"
        )
