"""What lm-evaluation-harness defines: tasks as they are described, and refusals."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.errors import BadInput
from stages.evaluate.harness import LmEval
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
        ("xsum", "is written as a class that knows its metrics only with its data"),
        ("scrolls_quality", "whose module fails with ModuleNotFoundError: .*transformers.data.met"),
        ("humaneval", "runs code that the model writes"),
        ("gsm8k_cot_self_consistency", "samples its answers"),
    ],
)
def test_refusals(task, reason):
    with pytest.raises(BadInput, match=reason):
        describe(task)


def test_tags_and_classes_of_the_harness_itself():
    arc = LmEval(task="ai2_arc", harness=describe("ai2_arc"))
    assert [metric.name for metric in arc.metrics()] == [
        "acc/arc_challenge", "acc_norm/arc_challenge", "acc/arc_easy", "acc_norm/arc_easy"
    ]  # fmt: skip
    (fda,) = describe("fda").tasks
    assert fda.output_types == ("generate_until",)
    assert [(m.metric, m.aggregation) for m in fda.measures] == [("contains", "mean")]
    (squad,) = describe("squadv2").tasks
    assert squad.output_types == ("loglikelihood", "generate_until")
    assert {m.aggregation for m in squad.measures} == {"task._squad_agg"}
    assert not any(m.gap for m in LmEval(task="ifeval", harness=describe("ifeval")).metrics())


def test_without_the_package_the_remedy_is_named():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from stages.evaluate.harness_tasks import describe\n"
        "import importlib.util as u; u.find_spec = lambda name: None\n"
        "describe('hellaswag')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "needs the package lm-eval, which is not installed; `pip install" in ended.stderr
