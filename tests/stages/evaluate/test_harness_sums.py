"""Numbers over all examples of a task of lm-evaluation-harness, from sums over examples."""

import random

import numpy as np
import pandas as pd
import pytest
from lm_eval.api import registry
from sklearn.metrics import f1_score

from stages.evaluate.harness import GroupMeasure, Harness, HarnessTask, LmEval, Measure
from stages.evaluate.harness_sums import AGGREGATIONS, BLOCKS, aggregation, influences
from stages.statistics import estimate, paired

WORDS = "the river stone, a cloud of green lamps (seven) bread winter door music.".split()


def test_corpus_measures_of_hand_worked_counts():
    columns = np.array([[1, 1], [1, 1], [1, 0], [0, 1], [0, 0], [0, 0]], float)
    for name, expected in (("f1", 4 / 6), ("matthews_corrcoef", 1 / 3)):
        measure = AGGREGATIONS[name]
        sums = measure.statistics(columns).sum(axis=0)
        assert measure.value(sums) == pytest.approx(expected)
    weighted = AGGREGATIONS["weighted_perplexity"]
    texts = np.array([[-6.0, 2], [-3.0, 1]])
    assert weighted.value(weighted.statistics(texts).sum(axis=0)) == pytest.approx(np.exp(3))


def texts(count, seed, references=1):
    """References, and predictions that are some of their words; some empty."""
    rng = random.Random(seed)
    for _ in range(count):
        wanted = [rng.choices(WORDS, k=rng.randint(4, 12)) for _ in range(references)]
        kept = [word if rng.random() < 0.8 else rng.choice(WORDS) for word in wanted[0]]
        predicted = " ".join(kept) if rng.random() < 0.9 else ""
        joined = [" ".join(words) for words in wanted]
        yield (joined if references > 1 else joined[0]), predicted


def table(values, documents=None, subset="t"):
    """Score rows of a task with the metric m."""
    count = len(next(iter(values.values())))
    return pd.DataFrame({
        "example_id": [f"{subset}/{n}" for n in range(count)],
        "document": [f"{subset}/{n}" for n in documents or range(count)],
        "subset": subset,
        **{f"m{part}": column for part, column in values.items()},
    })  # fmt: skip


def metric(name, *tasks, group=()):
    made = tuple(
        HarnessTask(name=task, output_types=("generate_until",),
                    measures=(Measure(metric="m", aggregation=name),))
        for task in tasks or ("t",)
    )  # fmt: skip
    harness = Harness(version="0", digest="", tasks=made, group=group)
    return LmEval(task="g", harness=harness).metrics()[0]


def stored(name, items):
    found = aggregation(name)
    return dict(zip(found.parts, zip(*map(found.split, items), strict=True), strict=True))


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize("name", ["bleu", "chrf", "chrf++", "ter"])
def test_measures_of_translation_and_their_intervals_are_sacrebleu_s(name, references):
    items = list(texts(40, 0, references))
    function = registry.get_aggregation(name)
    found = estimate([table(stored(name, items))], metric(name), resamples=200)
    assert found.value == pytest.approx(function(items), rel=1e-12)
    assert found.value > 10 and found.n == found.documents == 40
    rng = np.random.default_rng(1)
    direct = [function([items[i] for i in rng.integers(40, size=40)]) for _ in range(200)]
    assert found.ci_high - found.ci_low == pytest.approx(
        np.subtract(*np.quantile(direct, [0.975, 0.025])), rel=0.2
    )


@pytest.mark.parametrize("items", [
    [("a b c d e", "")],  # no answer at all
    [("a b c d e", "x y z u v")],  # nothing right
    [("a b c d e", "a b q c d")],  # no trigram: smoothed
    [("a b c d e", "a b c")],  # no 4-gram at all
])  # fmt: skip
@pytest.mark.parametrize("name", ["bleu", "chrf", "chrf++", "ter"])
def test_measures_of_translation_at_their_edges(name, items):
    sums = np.sum([aggregation(name).split(item) for item in items], axis=0)
    expected = registry.get_aggregation(name)(items)
    assert aggregation(name).value(sums) == pytest.approx(expected, rel=1e-12)


def test_the_difference_of_two_systems_in_bleu_is_tested():
    items = list(texts(40, 0))
    worse = [(wanted, " ".join(text.split()[::2])) for wanted, text in items]
    one, two = (table(stored("bleu", each)) for each in (items, worse))
    found = paired([one], [two], metric("bleu"), resamples=500)
    bleu = registry.get_aggregation("bleu")
    assert found.difference == pytest.approx(bleu(items) - bleu(worse))
    assert found.p_value < 0.01 < found.ci_low
    assert paired([one], [one], metric("bleu"), resamples=500).p_value == 1


def macro_f1(items):
    return f1_score(*zip(*items, strict=True), average="macro")


def labelled(count, seed):
    rng = np.random.default_rng(seed)
    gold = rng.choice(3, size=count, p=[0.6, 0.3, 0.1])
    right = rng.random(count) < 0.7
    return [(int(g), int(g) if r else 0) for g, r in zip(gold, right, strict=True)]


@pytest.mark.parametrize("count", [300, BLOCKS + 200])  # each left out, and some together
def test_an_interval_from_influences_is_that_of_resampling_the_function(count):
    items = labelled(count, 0)
    column = influences(macro_f1, items, range(count))
    found = estimate([table({".influence": column})], metric("own.macro_f1"))
    assert found.value == pytest.approx(macro_f1(items), rel=1e-12)
    rng = np.random.default_rng(1)
    direct = [macro_f1([items[i] for i in rng.integers(count, size=count)]) for _ in range(400)]
    low, high = np.quantile(direct, [0.025, 0.975])
    assert found.ci_high - found.ci_low == pytest.approx(high - low, rel=0.15)
    assert found.ci_low == pytest.approx(low, abs=0.02)


def test_the_difference_of_two_models_by_influences_is_that_of_swapping_their_answers():
    items = labelled(120, 0)
    rng = np.random.default_rng(3)
    others = [(g, p if rng.random() < 0.9 else 1) for g, p in items]
    frames = [table({".influence": influences(macro_f1, i, range(120))}) for i in (items, others)]
    found = paired(*[[frame] for frame in frames], metric("own.macro_f1"))
    observed = macro_f1(items) - macro_f1(others)
    assert found.difference == pytest.approx(observed)
    null = []
    for _ in range(400):
        swap = rng.random(120) < 0.5
        both = [(b, a) if s else (a, b) for a, b, s in zip(items, others, swap, strict=True)]
        null.append(np.subtract(*map(macro_f1, zip(*both, strict=True))))
    p_value = np.mean(np.abs(null) >= abs(observed))
    assert 0.001 < p_value < 0.5
    assert found.p_value == pytest.approx(p_value, abs=0.06)


def test_influences_by_hand():
    # Sum of squares over n: the mean of 1, 4, 9; of a mean they are its values.
    squares = influences(lambda items: sum(x * x for x in items) / len(items), [1, 2, 3], [*"abc"])
    assert squares.tolist() == [1, 4, 9]
    # One document of two items and one of one: their own means.
    joint = influences(lambda items: sum(items) / len(items), [0.5, 1.0, 0.25], ["a", "a", "b"])
    assert joint == pytest.approx([0.75, 0.75, 0.25])
    # A square of a mean, 4: without one item 6.25, 4, 2.25, so that pseudo-values are -0.5, 4, 7.5,
    # whose bias of -1/3 is taken off.
    curved = influences(lambda items: (sum(items) / len(items)) ** 2, [1, 2, 3], [*"abc"])
    assert curved == pytest.approx([-0.5 + 1 / 3, 4 + 1 / 3, 7.5 + 1 / 3])


def test_functions_that_have_no_influences():
    calls = iter(range(100))
    for function, reason in [
        (lambda items: next(calls), "drawn at random"),
        (lambda items: {"all": 1.0}, "fails with TypeError"),
        (lambda items: float("nan"), "gives no number"),
        (lambda items: 1 / (len(items) - 2), "fails with ZeroDivisionError"),
    ]:
        with pytest.raises(ValueError, match=reason):
            influences(function, [1, 2, 3], [*"abc"])


@pytest.mark.parametrize("weighed", [True, False])
def test_a_group_of_numbers_that_are_no_means(weighed):
    first = table({".gold": [1, 1, 0, 0], ".prediction": [1, 0, 0, 0]}, subset="a")  # F1 2/3
    second = table({".gold": [1, 0], ".prediction": [1, 1]}, subset="b")  # F1 2/3
    third = table({".gold": [1, 1], ".prediction": [1, 1]}, subset="c")  # F1 1
    group = (GroupMeasure(metric="m", filters=("none",), weight_by_size=weighed),)
    own = metric("f1", "a", "b", "c", group=group)
    found = estimate([pd.concat([first, second, third], ignore_index=True)], own, resamples=50)
    expected = (4 * 2 / 3 + 2 * 2 / 3 + 2) / 8 if weighed else (2 / 3 + 2 / 3 + 1) / 3
    assert own.gap == "" and found.value == pytest.approx(expected)
