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
from wrong_sweeps import GONE, WRONG

from pipeline.checks import check
from pipeline.cli import main
from pipeline.sweep_file import load
from stages.errors import BadInput

SWEEPS = Path(__file__).parents[2] / "sweeps"


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


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sweep_is_refused_with_field_reason_and_remedy(sweep, case):
    changes, reason, remedy = WRONG[case]
    path = sweep(changes)
    message = refusal(path)
    line = next((line for line in message.splitlines() if reason in line), "")
    assert line.startswith(f"{path}: "), message
    assert remedy in line, message


OLMOE = {"models.tiny-moe": {"source": "hub:allenai/OLMoE-1B-7B-0924@main"},
         "models.tiny-wide": {"source": "pack:smollm2"}}
SWITCH = {"models.tiny": {"source": "hub:google-t5/t5-base@main"},
          "models.tiny-moe": {"source": "hub:google/switch-base-32@main"},
          "models.tiny-wide": {"source": "pack:smollm2"}}
RELEASED = {
    "more experts than there are": (
        OLMOE | {"evaluations.questions.technique": {"kind": "expert_count", "top_k": 65}},
        "evaluations.questions.technique.top_k: 65 is more than the 64 experts of tiny-moe"),
    "workers that do not divide the experts": (
        OLMOE | {"resources.finetune.workers": 3, "resources.finetune.expert_parallel": 3},
        "resources.finetune.expert_parallel: 3 does not divide the 64 experts of tiny-moe"),
    "dropout that cannot be set": (
        SWITCH | {"recipes.sft.dropout": {"attention": 0.1}},
        "recipes.sft.dropout.attention: tiny-moe: switch_transformers has none that can be set"),
    "what neither of a pair can do": (
        SWITCH | {"evaluations.questions.technique": {"kind": "dola"}},
        "evaluations.questions.technique.kind: dola is for decoders, tiny is an encoder-decoder"),
    "another number of experts where there is none": (
        SWITCH | {"evaluations.questions.technique": {"kind": "expert_count", "top_k": 1}},
        "evaluations.questions.technique.kind: tiny-moe: switch_transformers chooses its experts "
        "inside its blocks, so their number per token cannot be set; remove technique"),
    "a partner of the wrong kind": (
        {"models.tiny-wide": {"source": "hub:allenai/OLMo-1B-hf@main"}, "pairs.0.moe": "tiny-wide"},
        "pairs.0.moe: tiny-wide is a dense model"),
}


@pytest.mark.parametrize("case", RELEASED)
def test_what_a_released_model_cannot_do_is_refused_without_a_network(sweep, case):
    changes, reason = RELEASED[case]
    path = sweep(changes)
    assert f"{path}: {reason}" in refusal(path)


HELD_OUT = {
    "rows that are trained on": (
        {"split": "train"}, "recipes.sft.validation.split: the recipe trains on reviews/train"),
    "rows that are scored": (
        {"split": "test"},
        "evaluations.edits: scores reviews/test, on which recipe sft is validated"),
    "no such split": (
        {"split": "held"}, "recipes.sft.validation.dataset: reviews has no split 'held'"),
    "no template": (
        {"split": "test", "template": None},
        "recipes.sft.validation.template: is missing for a data set of task classification"),
    "never": ({"every": 0}, "recipes.sft.validation.every"),
}


@pytest.mark.parametrize("case", HELD_OUT)
def test_rows_to_validate_on_are_neither_trained_on_nor_scored(sweep, case):
    changes, reason = HELD_OUT[case]
    validation = {"dataset": "reviews", "template": "sentiment"} | changes
    path = sweep({"recipes.sft.validation": validation})
    if case == "never":
        with pytest.raises(BadInput, match=reason):
            load(path)
    else:
        assert f"{path}: {reason}" in refusal(path)


def test_what_one_model_of_several_cannot_do_is_a_gap_that_the_plan_names(sweep, tmp_path, capsys):
    path = sweep({"models.wide": {"source": "tiny:switch_transformers"},
                  "models.short": {"source": "tiny:t5"},
                  "pairs": [{"moe": "tiny-moe", "dense": "tiny"},
                            {"moe": "wide", "dense": "short"}],
                  "evaluations": {"choices": {"kind": "multiple_choice", "dataset": "questions",
                                              "technique": {"kind": "dola"}}}})
    assert main(["plan", str(path), "--store", str(tmp_path / "store")]) == 0
    gaps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  gap ")]
    assert gaps[0] == ("  gap       wide-none-choices: dola is for decoders, this is an "
                       "encoder-decoder")
    models = {line.split()[1].split("-")[0] for line in gaps}
    assert models == {"wide", "short"}


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
     ("recipes.sft.optimizer={kind: adamw, betas: [0.9, 0.95]}",
      lambda s: s.recipes["sft"].optimizer.betas, (0.9, 0.95)),
     ("recipes.sft.schedule=cosine", lambda s: s.recipes["sft"].schedule.cycles, 0.5),
     ("recipes.sft.train=backbone", lambda s: s.recipes["sft"].train, ("backbone",)),
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
