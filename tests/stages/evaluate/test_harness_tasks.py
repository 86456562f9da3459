"""What lm-evaluation-harness defines: tasks as they are described, refusals, corpus measures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.errors import BadInput
from stages.evaluate.harness import AGGREGATIONS, LmEval
from stages.evaluate.harness_tasks import describe

ROOT = Path(__file__).parents[3]


def test_definitions_of_the_harness_itself():
    assert [m.name for m in describe("hellaswag").tasks[0].measures] == ["acc", "acc_norm"]
    mmlu = describe("mmlu")
    assert len(mmlu.tasks) == 57
    evaluation = LmEval(task="mmlu", harness=mmlu)
    assert evaluation.primary == "acc"
    assert len(evaluation.metrics()) == 58
    words = LmEval(task="wikitext", harness=describe("wikitext"))
    assert [(m.name, m.higher_is_better) for m in words.metrics()] == [
        ("word_perplexity", False),
        ("byte_perplexity", False),
        ("bits_per_byte", False),
    ]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("hellaswagg", "has no task 'hellaswagg'; did you mean 'hellaswag'"),
        ("ai2_arc", "is a tag: .*one by one: arc_challenge, arc_easy"),
        ("squadv2", "is written as a class"),
        ("humaneval", "runs code that the model writes"),
        ("gsm8k_cot_self_consistency", "samples its answers"),
        ("wmt14-en-fr", "summed up by bleu, chrf, ter, which is no function of sums"),
    ],
)
def test_refusals(task, reason):
    with pytest.raises(BadInput, match=reason):
        describe(task)


def test_without_the_package_the_remedy_is_named():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from stages.evaluate.harness_tasks import describe\n"
        "import importlib.util as u; u.find_spec = lambda name: None\n"
        "describe('hellaswag')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "needs the package lm-eval, which is not installed; `pip install" in ended.stderr


def test_corpus_measures_of_hand_worked_counts():
    columns = np.array([[1, 1], [1, 1], [1, 0], [0, 1], [0, 0], [0, 0]], float)
    for name, expected in (("f1", 4 / 6), ("matthews_corrcoef", 1 / 3)):
        measure = AGGREGATIONS[name]
        sums = measure.statistics(columns).sum(axis=0)
        assert measure.value(sums) == pytest.approx(expected)
    weighted = AGGREGATIONS["weighted_perplexity"]
    texts = np.array([[-6.0, 2], [-3.0, 1]])
    assert weighted.value(weighted.statistics(texts).sum(axis=0)) == pytest.approx(np.exp(3))
