"""The stage on a tiny model: every kind of evaluation from Parquet files to a summary."""

import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from stages.data.templates import TEMPLATES, Template
from stages.errors import StageFailed
from stages.evaluate import spec as evaluate_spec
from stages.evaluate import techniques, thinking
from stages.evaluate.base import AXES
from stages.evaluate.registry import KINDS, AnyEvaluation
from stages.evaluate.shards import requests_from_table, responses_from_table
from stages.evaluate.spec import EvaluateSpec
from stages.evaluate.stage import requests_for, run, score_node
from stages.evaluate.techniques import DoLa, SelfConsistency
from stages.models.tiny import tiny_model, tiny_tokenizer

EVALUATIONS = {
    "refusal": {"harmful": ["prompts"], "benign": ["others"], "max_new_tokens": 4},
    "multiple_choice": {"dataset": "quiz"},
    "character_edits": {"dataset": "shop", "template": "sentiment", "edits": 2},
    "out_of_distribution": {
        "in_distribution": "shop",
        "out_of_distribution": ["film"],
        "template": "sentiment",
    },
    "adversarial_sets": {
        "standard": "snli", "adversarial": ["anli"], "template": "nli", "method": "prompting"
    },
    "truthfulqa": {"dataset": "statements"},
    "truthfulqa_generation": {"dataset": "statements", "max_new_tokens": 4},
    "open_question": {
        "dataset": "open", "max_new_tokens": 4, "technique": {"kind": "self_consistency"}
    },
    "false_premises": {"false": ["open"], "max_new_tokens": 4},
    "perplexity": {"in_domain": ["plain"], "out_of_domain": ["shop"]},
    "text_attacks": {
        "dataset": "shop",
        "template": "sentiment",
        "attacks": [
            {"kind": "embedding_pgd", "steps": 1, "restarts": 1},
            {"kind": "gcg", "steps": 1, "candidates": 2, "routing": "joint"},
            {"kind": "homoglyphs", "edits": 1},
        ],
        "checked": 0,
    },
    "target_attack": {
        "harmful": ["prompts"], "steps": 1, "candidates": 2, "suffix": "x x", "max_new_tokens": 2
    },
    "safety_experts": {"harmful": ["prompts"], "benign": ["others"], "max_new_tokens": 2},
    "expert_interventions": {
        "dataset": "shop", "template": "sentiment", "substitutions": ["random"], "prune": [1]
    },
    "router_geometry": {"dataset": "shop", "template": "sentiment", "steps": 1},
    "expert_specialisation": {"dataset": "shop", "template": "sentiment"},
    "local_lipschitz": {
        "dataset": "shop", "template": "sentiment", "steps": 1, "restarts": 1, "samples": 2
    },
}  # fmt: skip

# Tasks of lm-evaluation-harness bring their own data: test_harness.py.
# What images are shown for: test_vision_runs.py, test_sharpness_evaluation.py.
SHOWN = ("image_", "sharpness")
OURS = [kind for kind in KINDS if kind != "lm_eval" and not kind.startswith(SHOWN)]


def spec(kind, **fields):
    return EvaluateSpec(evaluation={"kind": kind} | EVALUATIONS[kind], **fields)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    ids = [f"{number}" for number in range(6)]
    rows = pd.DataFrame({"id": ids, "document": ids})
    prompts = rows.assign(prompt=[f"Explain the number {i}." for i in ids], category="x")
    texts = rows.assign(
        text=[f"{word} thing" for word in ["Great", "Awful"] * 3],
        label=["positive", "negative"] * 3,
    )
    quiz = rows.assign(
        question="Which?", choices=[np.array(["one", "two"], object)] * 6, answer=0, context=""
    )
    lists = [np.array(["one", "two"], object)] * 6
    asked = rows.assign(question=[f"Which {i}?" for i in ids], category="")
    statements = asked.assign(
        best_answer="one",
        best_incorrect_answer="",
        correct_answers=lists,
        incorrect_answers=[np.array(["six"], object)] * 6,
    )
    pairs = rows.assign(premise="It rains.", hypothesis="It is wet.", label=["entailment"] * 6)
    tables = {
        "snli": pairs,
        "anli": pairs,
        "statements": statements,
        "open": asked.assign(answers=lists),
        "plain": texts,
    }
    tables |= {"prompts": prompts, "others": prompts, "shop": texts, "film": texts, "quiz": quiz}
    for name, table in tables.items():
        (root / name).mkdir()
        for split in ("train", "test"):
            table.to_parquet(root / name / f"{split}.parquet")
    tokenizer = tiny_tokenizer()
    tiny_model("mixtral", tokenizer, seed=0).save_pretrained(root / "checkpoint")
    tokenizer.save_pretrained(root / "checkpoint")
    return {"checkpoint": root / "checkpoint"} | {f"data/{name}": root / name for name in tables}


@pytest.mark.parametrize("kind", OURS)
def test_each_kind_runs_from_files_to_a_summary(kind, inputs, tmp_path):
    run(spec(kind, shard_size=4), inputs, tmp_path)
    requests = requests_from_table(pq.read_table(tmp_path / "requests.parquet"))
    shards = sorted((tmp_path / "responses").iterdir())
    responses = [r for file in shards for r in responses_from_table(pq.read_table(file))]
    most = 1 if requests[0].procedure else 4
    assert len(shards) == -(-len(requests) // most)
    assert {r.id for r in responses} == {r.id for r in requests}
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    assert scores["example_id"].is_unique
    summary = json.loads((tmp_path / "summary.json").read_text())
    evaluation = spec(kind).evaluation
    # A tiny model refuses nothing, so there is nothing to silence.
    absent = ("/", "_beyond_") if kind == "safety_experts" else ()
    expected = [m.name for m in evaluation.metrics()]
    assert list(summary) == [n for n in expected if not any(part in n for part in absent)]
    assert list(summary)[0] == evaluation.primary
    assert evaluation.axis in AXES
    # What MLflow takes as the name of a metric.
    assert all(re.fullmatch(r"[/\w.\- :]+", name) for name in summary)
    for name, row in summary.items():
        # Of those that were right, of those that a linear map can fit: there may be none.
        if name.startswith(("success/", "smoothness", "refusals_lost")):
            continue
        # Too large in small tables and more so in resamples: they stand beside permuted ones.
        if name.startswith(("information", "purity")):
            continue
        slack = 1e-6 * abs(row["value"])  # resamples are summed in float32
        assert row["ci_low"] - slack <= row["value"] <= row["ci_high"] + slack
        assert row["n"] in ((6, 12, 18) if kind != "safety_experts" else (3, 6))


@pytest.mark.parametrize("kind", OURS)
def test_shard_size_and_order_of_responses_change_nothing(kind, inputs, tmp_path):
    for name, size in (("one", 64), ("many", 2)):
        (tmp_path / name).mkdir()
        run(spec(kind, shard_size=size), inputs, tmp_path / name)
    files = sorted((tmp_path / "many" / "responses").iterdir(), reverse=True)
    responses = [r for file in files for r in responses_from_table(pq.read_table(file))]
    (tmp_path / "again").mkdir()
    score_node(spec(kind).evaluation, inputs, responses, tmp_path / "again")
    first = pd.read_parquet(tmp_path / "one" / "scores.parquet")
    for other in ("many", "again"):
        pd.testing.assert_frame_equal(first, pd.read_parquet(tmp_path / other / "scores.parquet"))


def test_a_truncated_data_file_is_named(inputs, tmp_path):
    broken = tmp_path / "quiz"
    broken.mkdir()
    content = (inputs["data/quiz"] / "test.parquet").read_bytes()
    (broken / "test.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(StageFailed, match="data set 'quiz': .*test.parquet cannot be read"):
        requests_for(spec("multiple_choice").evaluation, inputs | {"data/quiz": broken})


def test_kinds_are_told_apart_by_name():
    adapter = TypeAdapter(AnyEvaluation)
    for kind, fields in EVALUATIONS.items():
        parsed = adapter.validate_python({"kind": kind} | fields)
        assert type(parsed) is KINDS[kind]
        assert set(parsed.tasks()) == set(parsed.datasets())
    with pytest.raises(ValidationError, match="union_tag_invalid"):
        adapter.validate_python({"kind": "toxicity"})
    with pytest.raises(ValidationError, match="extra_forbidden"):
        adapter.validate_python({"kind": "multiple_choice", "dataset": "quiz", "shots": 5})


def test_identity_is_what_changes_results(monkeypatch):
    one = spec("character_edits")
    spread = spec("character_edits", workers=4, cpus=2, gpus=1, shard_size=7)
    assert one.identity() == spread.identity()
    assert one.run_time_fields() == {
        "workers", "cpus", "gpus", "expert_parallel", "shard_size"}
    half, before = spec("character_edits", dtype="bfloat16"), one.identity()
    stored = half.identity()
    assert stored != before
    # What is in float32 under another precision makes stale the scores in that one alone.
    monkeypatch.setattr(evaluate_spec, "LOWER_PRECISION_VERSION", 99)
    assert half.identity() != stored and one.identity() == before
    reworded = Template("Review: {text}\nSentiment:", TEMPLATES["sentiment"].labels)
    monkeypatch.setitem(TEMPLATES, "sentiment", reworded)
    assert one.identity() != before
    # How written answers are stripped and voted on makes stale what takes them, and nothing else.
    before, written, drawn = one.identity(), spec("refusal"), spec("open_question")
    drawn = drawn.model_copy(update={"evaluation": drawn.evaluation.model_copy(
        update={"technique": SelfConsistency(kind="self_consistency", samples=2)})})
    stored = written.identity(), drawn.identity()
    monkeypatch.setattr(techniques, "VOTES_VERSION", 99)
    assert written.identity() == stored[0] and drawn.identity() != stored[1]
    monkeypatch.setattr(thinking, "VERSION", 99)
    assert written.identity() != stored[0] and one.identity() == before
    # So does what the authors' DoLa is, of that alone.
    dola, original = (one.model_copy(update={"evaluation": one.evaluation.model_copy(
        update={"technique": DoLa(kind=kind)})}) for kind in ("dola", "dola_original"))
    stored = dola.identity(), original.identity()
    monkeypatch.setattr(techniques, "DOLA_ORIGINAL_VERSION", 99)
    assert dola.identity() == stored[0] and original.identity() != stored[1]


def test_the_planner_does_not_wait_for_heavy_imports():
    code = (
        "import sys, stages.evaluate.spec, stages.evaluate.stage; "
        "print([m for m in ('torch', 'transformers', 'sklearn', 'ray') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
