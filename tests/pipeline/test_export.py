"""``export``: a folder that other programs load, with the checkpoint's own logits; refusals."""

import re
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.checks import check
from pipeline.cli import main
from pipeline.job import Job, run_stage
from pipeline.plan import build
from pipeline.store import Store
from pipeline.sweep_file import load

CONTENT = {
    "name": "out",
    "datasets": {"questions": {"task": "multiple_choice", "source": "file:questions.jsonl"}},
    "models": {
        "tiny": {"source": "tiny:llama"},
        "tiny-moe": {"source": "tiny:mixtral"},
        "own": {"source": "tiny:gpt_neox_moe"},
    },
    "pairs": [{"moe": "tiny-moe", "dense": "tiny"}, {"moe": "own", "dense": "tiny"}],
    "recipes": {},
    "evaluations": {"questions": {"kind": "multiple_choice", "dataset": "questions"}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A sweep file and a store with its models in it."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "questions.jsonl").write_text(
        '{"question": "a?", "choices": ["b", "c"], "answer": 0, "context": ""}\n' * 3)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(CONTENT))
    sweep = load(path)
    plan, store = build(sweep, check(sweep, path)), Store(str(folder / "store"))
    for name in ("tiny", "tiny-moe", "own"):
        outcome = run_stage(Job.of(plan.nodes[f"model/{name}"], plan, store, folder))
        assert outcome.status == "done", outcome.message
    return path, store, plan


def run(made, *arguments):
    path, store, _ = made
    return main(["export", *map(str, arguments), "--store", store.uri])


def logits(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer("A folder to be read.", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(inputs["input_ids"]).logits


def test_an_exported_folder_gives_the_checkpoint_s_logits(made, tmp_path, capsys):
    path, store, plan = made
    assert run(made, path, "--model", "tiny-moe", "--to", tmp_path / "out") == 0
    source = store.fetch(plan.nodes["model/tiny-moe"].folder)
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json",
            "chat_template.jinja", "card.json", "README.md"} <= names
    text = (tmp_path / "out" / "README.md").read_text()
    assert "mixtral (Mixture-of-Experts, top-2 of 4)" in text
    assert plan.nodes["model/tiny-moe"].folder in text
    assert "pretrained=" in capsys.readouterr().out


def test_lm_eval_loads_it(made, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    assert run(made, made[0], "--model", "tiny", "--to", tmp_path / "out") == 0
    peer = HFLM(pretrained=str(tmp_path / "out"), device="cpu", batch_size=1)
    instance = Instance("loglikelihood", {}, ("A folder", " read"), 0)
    ((logprob, _),) = peer.loglikelihood([instance], disable_tqdm=True)
    assert -60 < logprob < 0


def test_a_checkpoint_named_by_its_folder_and_one_fine_tuned(made, tmp_path):
    """A fine-tuned checkpoint's training records stay in the store; its recipe is told."""
    _, store, plan = made
    node = plan.nodes["model/tiny-moe"]
    tuned = "finetune/tiny-moe-sft-seed0@0123456789ab"
    with store.attempt(tuned) as (attempt, output):
        shutil.copytree(store.fetch(node.folder), output, dirs_exist_ok=True)
        (output / "generation_config.json").unlink()
        (output / "recipe_evidence.json").write_text("{}")
        (output / "training_curve.parquet").write_bytes(b"")
    store.commit(tuned, {"attempt": attempt, "identity": {"steps": 6}, "commit": "abc"})
    assert run(made, tuned, "--to", tmp_path / "out") == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert not {"recipe_evidence.json", "training_curve.parquet"} & names
    assert "generation_config.json" in names
    text = (tmp_path / "out" / "README.md").read_text()
    assert '"steps": 6' in text and "commit `abc`" in text


@pytest.mark.parametrize(("arguments", "reason"), [
    (["SWEEP", "--model", "tinny"], "--model tinny: is of no pair of the sweep; did you mean"),
    (["SWEEP"], "--model None: is of no pair of the sweep; known: own, tiny, tiny-moe"),
    (["SWEEP", "--model", "tiny", "--recipe", "sft"], "--recipe sft: not in the sweep"),
    (["SWEEP", "--model", "tiny", "--seed", "7"], "--seed 7: none is run for 0"),
    (["SWEEP", "--model", "own"], "gpt_neox_moe cannot be exported: it is a class of this project"),
    (["data/questions@0"], "CHECKPOINT data/questions@0: neither a sweep file nor a checkpoint"),
    (["model/tiny@0"], "CHECKPOINT model/tiny@0: no finished checkpoint of .*; did you mean"),
    (["model/tiny@0", "--seed", "0"], "--seed: chooses among a sweep's checkpoints; remove it"),
    (["full"], "--to .*: is there already and not empty; name a new folder"),
])  # fmt: skip
def test_refusals(made, arguments, reason, tmp_path, capsys):
    path, _, plan = made
    output = tmp_path / "out"
    if arguments == ["full"]:
        output.mkdir()
        (output / "a").write_text("")
        arguments = [plan.nodes["model/tiny"].folder]
    assert run(made, *[path if a == "SWEEP" else a for a in arguments], "--to", output) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(reason, error), error
    assert not (output / "config.json").exists()


def test_what_has_not_been_run_is_told(made, tmp_path, capsys):
    path, store, _ = made
    code = main(["export", str(path), "--model", "tiny", "--to", str(tmp_path / "out"),
                 "--store", str(tmp_path / "empty")])
    assert code == 1
    assert "model/tiny has not been run; run `moe-reliability run" in capsys.readouterr().err
