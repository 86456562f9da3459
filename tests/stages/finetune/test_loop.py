"""EP=1, EP=2 and a plain Hugging Face loop give the same numbers; resumed equals uninterrupted."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.finetune.batches import load_examples
from stages.finetune.export import padded_logits
from stages.finetune.recipe import Experts
from stages.finetune.sets import Validation
from stages.finetune.spec import FinetuneSpec, TrainSet
from stages.finetune.stage import run as run_stage
from stages.models.card import ModelCard
from stages.models.expert_parallel import ExpertParallel
from tests.stages.finetune.reference import assert_same_training, curve, weights
from tests.stages.finetune.runs import Run, launch
from tests.stages.models.tiny_folders import dense_folder

ROOT = str(Path(__file__).parents[3])
SPEC = FinetuneSpec(
    data=(TrainSet(dataset="reviews", template="sentiment"), TrainSet(dataset="refusals")),
    steps=6,
    batch_size=8,
    learning_rate=3e-3,
    warmup_steps=2,
    weight_decay=0.1,
    gradient_clipping=0.5,
    workers=2,
    micro_batch=2,
    checkpoint_every=3,
    seed=5,
)
PARTNERS = ("gpt_neox", "olmo", "olmo2", "qwen2", "qwen3", "mistral", "gemma")
MOE = SPEC.model_copy(update={"auxiliary_loss_weight": 0.05})


HEAD = MOE.model_copy(
    update={"data": MOE.data[:1], "head": "classification", "expert_parallel": 2}
)


def misdirect() -> None:
    """Let rank 1 mix up the results of one exchange, the fifth: it is that of the third layer's
    experts when converted blocks are checked (they alone and with their block, layer by layer),
    and no exchange of the training."""
    own, calls = ExpertParallel._exchange, itertools.count()

    def exchange(self, tokens_ND, expert_N):
        output_ND = own(self, tokens_ND, expert_N)
        wrong = next(calls) == 4 and torch.distributed.get_rank() == 1
        return output_ND.roll(1, dims=0) if wrong else output_ND

    ExpertParallel._exchange = exchange


def copy(spec, **changes):
    return spec.model_copy(update=changes)


VALIDATION = Validation(dataset="reviews", split="train", template="sentiment", limit=5, every=2)
DROPPED = copy(MOE, expert_parallel=2, experts=Experts(dropout=0.3), steps=5)
ZERO2 = copy(SPEC, steps=3, deepspeed_config="cpu_dense_zero2.json")
TEN = copy(ZERO2, steps=10)


@pytest.fixture(scope="module")
def partners(tmp_path_factory):
    """Tiny dense models of the architectures that mixtures are compared with."""
    shapes = {name: {} for name in PARTNERS} | {"gemma": {"head_dim": 16}}
    return {name: dense_folder(tmp_path_factory.mktemp(name), name, **shapes[name])
            for name in PARTNERS}


@pytest.fixture(scope="module")
def runs(models, partners, data, tmp_path_factory):
    """The outputs of fine-tunes in two processes, by name."""
    folder = tmp_path_factory.mktemp("runs")
    planned, sources = [], models | partners

    def plan(name, model, spec, **fields):
        (folder / name).mkdir(exist_ok=True)
        planned.append(Run(spec, {"model": sources[model], **data}, folder / name, **fields))

    for name in PARTNERS:
        plan(f"zero2-{name}", name, ZERO2)
    for name in ("llama", "t5"):
        plan(f"zero2-{name}", name, TEN)

    plan("ep2", "mixtral", copy(MOE, expert_parallel=2))
    plan("ep1", "mixtral", MOE)
    plan(
        "zero2",
        "mixtral",
        copy(MOE, expert_parallel=2, deepspeed_config="cpu_moe_expert_parallel_zero2.json"),
    )
    plan("bf16", "mixtral", copy(MOE, expert_parallel=2, precision="bf16"))
    for name in ("ep2", "zero2"):
        spec = next(run.spec for run in planned if run.output.name == name)
        checkpoints = tmp_path_factory.mktemp("checkpoints")
        plan(f"resumed_{name}", "mixtral", spec, stop_after=5, checkpoints=checkpoints)
        plan(f"resumed_{name}", "mixtral", spec, checkpoints=checkpoints)
    plan("other_layout", "mixtral", MOE, checkpoints=checkpoints)
    plan("qwen", "qwen2_moe", copy(MOE, expert_parallel=2))
    for size in (1, 2):
        dropped = copy(DROPPED, expert_parallel=size)
        plan(f"dropped-{size}", "mixtral", dropped)
        plan(f"validated-{size}", "mixtral", copy(dropped, validation=VALIDATION))
    plan("dense", "llama", SPEC)
    plan("head", "mixtral", HEAD)
    rung = tmp_path_factory.mktemp("rung")
    plan("until", "llama", copy(SPEC, until=2), checkpoints=rung)
    plan("past", "llama", copy(SPEC, until=1), checkpoints=rung)
    plan("onwards", "llama", copy(SPEC, checkpoint_every=50), checkpoints=rung)
    plan(
        "nan",
        "mixtral",
        copy(MOE, expert_parallel=2, learning_rate=1e30, gradient_clipping=None, warmup_steps=0),
    )
    # Last, as what it does to the processes stays.
    plan("misdirected", "mixtral", copy(MOE, expert_parallel=2), prepare=misdirect)
    launch(2, planned, tmp_path_factory.mktemp("store") / "store")
    return folder


@pytest.mark.parametrize("name", ["ep2", "ep1", "zero2"])
def test_mixtral_trains_as_a_plain_loop_does(name, runs, models, data):
    assert_same_training(runs / name, MOE, models["mixtral"], data)


@pytest.mark.parametrize("size", [1, 2])
def test_held_out_rows_are_looked_at_as_the_model_is_and_leave_no_trace(runs, models, data, size):
    """Five rows for two workers of two rows a pass; the last look is at what is exported."""
    plain, watched = (curve(runs / f"{name}-{size}") for name in ("dropped", "validated"))
    looks = watched["validation_loss"].notna()
    assert watched.loc[looks, "step"].tolist() == [2, 4, 5]
    for column in ("loss", "gradient_norm", "auxiliary_loss"):
        assert watched[column].tolist() == plain[column].tolist()
    left, right = (weights(runs / f"{name}-{size}") for name in ("dropped", "validated"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    spec = copy(DROPPED, validation=VALIDATION)
    tokenizer = AutoTokenizer.from_pretrained(models["mixtral"])
    examples = load_examples(spec, data, tokenizer, held_out=True)
    model = AutoModelForCausalLM.from_pretrained(
        runs / f"validated-{size}", dtype=torch.float32, use_safetensors=True).eval()
    losses = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        answer = range(len(example.input_ids) - example.answer, len(example.input_ids))
        losses += [-logprobs[place - 1, ids[0, place]].item() for place in answer]
    assert len(examples) == 5
    last = watched["validation_loss"].iloc[-1]
    assert last == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    told = json.loads((runs / f"validated-{size}/recipe_evidence.json").read_text())
    told = told["knobs"]["validation"]["measured"]
    assert told["looks"] == 3 and 0 < told["share_of_time"] < 1
    assert told["seconds"] == pytest.approx(watched["validation_seconds"].sum())


def test_four_workers_with_two_copies_of_each_expert(models, data, tmp_path):
    spec = copy(MOE, expert_parallel=2, workers=4, steps=3)
    output = tmp_path / "output"
    output.mkdir()
    launch(4, [Run(spec, {"model": models["mixtral"], **data}, output)], tmp_path / "store")
    assert_same_training(output, spec, models["mixtral"], data)


def test_qwen_with_dense_layers_trains_as_a_plain_loop_does(runs, models, data):
    assert_same_training(runs / "qwen", MOE, models["qwen2_moe"], data)


def test_a_classification_head_trains_as_a_plain_loop_does(runs, models, data):
    """With experts spread, and with the load-balancing loss, which transformers' classifiers never
    add to theirs."""
    assert_same_training(runs / "head", HEAD, models["mixtral"], data)
    evidence = json.loads((runs / "head" / "recipe_evidence.json").read_text())
    assert evidence["parameters"]["trained"]["head"] == 2 * 64
    head = {"labels": ["negative", "positive"], "drawn": True}
    assert evidence["knobs"]["head"] == {"asked": "classification", "measured": head}
    measured = evidence["knobs"]["auxiliary_loss_weight"]["measured"]
    assert measured["router_gradient_norm"] > 1e-2


def test_dense_model_trains_as_a_plain_loop_does(runs, models, data):
    assert_same_training(runs / "dense", SPEC, models["llama"], data)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_ten_steps_under_zero_equal_those_of_a_plain_loop(name, runs, models, data):
    assert_same_training(runs / f"zero2-{name}", TEN, models[name], data, norm=1e-4)


@pytest.mark.parametrize("name", PARTNERS)
def test_dense_partners_train_under_zero_as_a_plain_loop_does(name, runs, partners, data):
    assert_same_training(runs / f"zero2-{name}", ZERO2, partners[name], data)


def test_bf16_stays_near_fp32(runs):
    fp32, bf16 = curve(runs / "ep2")["loss"], curve(runs / "bf16")["loss"]
    assert fp32[0] != bf16[0] == pytest.approx(fp32[0], rel=1e-3)
    assert bf16.to_numpy() == pytest.approx(fp32.to_numpy(), rel=0.03)
    assert bf16.iloc[-1] < bf16[0] - 2
    precision = json.loads((runs / "bf16" / "recipe_evidence.json").read_text())["precision"]
    assert precision == {"weights": ["torch.bfloat16"], "optimizer": ["torch.float32"]}


def test_one_process_equals_two(runs, models, data, tmp_path):
    run_stage(SPEC, {"model": models["llama"], **data}, tmp_path)
    one, two = curve(tmp_path), curve(runs / "dense")
    for column in ("loss", "gradient_norm"):
        assert one[column].to_numpy() == pytest.approx(two[column].to_numpy(), rel=1e-5)
    assert one["tokens"].tolist() == two["tokens"].tolist()


def test_torchrun_trains_the_same_and_ends_without_an_error(runs, models, data, tmp_path):
    spec = copy(SPEC, threads=1)
    inputs = {name: str(path) for name, path in {"model": models["llama"], **data}.items()}
    script = tmp_path / "train.py"
    script.write_text(f"""
from pathlib import Path
import torch
from stages.finetune.spec import FinetuneSpec
from stages.finetune.stage import run
spec = FinetuneSpec.model_validate_json({spec.model_dump_json()!r})
run(spec, {{name: Path(path) for name, path in {inputs!r}.items()}}, Path({str(tmp_path)!r}))
assert not torch.distributed.is_initialized()
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ROOT}
    )
    assert done.returncode == 0, done.stderr
    assert curve(tmp_path)["loss"].to_list() == curve(runs / "dense")["loss"].to_list()


@pytest.mark.parametrize("name", ["ep2", "zero2"])
def test_resumed_equals_uninterrupted(name, runs):
    resumed, whole = curve(runs / f"resumed_{name}"), curve(runs / name)
    own = [c for c in whole if c not in ("seconds", "tokens_per_second", "expert_load_by_layer")]
    pd.testing.assert_frame_equal(resumed[own], whole[own], check_exact=True)
    expected = weights(runs / name)
    for key, value in weights(runs / f"resumed_{name}").items():
        assert torch.equal(value, expected[key]), key


def test_the_first_steps_of_a_fine_tune_are_exported_and_go_on_to_its_end(runs):
    """The schedule of the first steps is that of the whole, and going on loses nothing."""
    first, onwards, whole = (
        curve(runs / name).drop(columns=["seconds", "tokens_per_second"])
        for name in ("until", "onwards", "dense")
    )
    pd.testing.assert_frame_equal(first, whole[:2], check_exact=True)
    pd.testing.assert_frame_equal(onwards, whole, check_exact=True)
    expected = weights(runs / "dense")
    assert all(torch.equal(v, expected[k]) for k, v in weights(runs / "onwards").items())
    assert any(not torch.equal(v, expected[k]) for k, v in weights(runs / "until").items())
    # A checkpoint after the last step asked for is of no use.
    assert (runs / "past" / "past_0.txt").read_text() == (
        "the resumed training is at step 2, after step 1")


def test_a_checkpoint_goes_on_with_another_expert_parallel_size_and_zero_stage(runs):
    got, whole = curve(runs / "other_layout"), curve(runs / "zero2")
    for column in ("loss", "gradient_norm", "auxiliary_loss"):
        assert got[column].to_numpy() == pytest.approx(whole[column].to_numpy(), rel=1e-5)
    assert (got["seconds"][:3] == curve(runs / "resumed_zero2")["seconds"][:3]).all()  # not redone
    assert got["learning_rate"].to_list() == whole["learning_rate"].to_list()


def test_non_finite_loss_fails_on_every_rank(runs):
    messages = {(runs / "nan" / f"failed_{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert re.match("step 2: the (loss|gradient norm) is (nan|inf); lower ", messages.pop())
    assert not (runs / "nan" / "config.json").exists()


def test_a_block_that_exchanges_wrongly_on_one_rank_stops_every_rank_before_training(runs):
    messages = {(runs / "misdirected" / f"failed_{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert re.match(r"model\.layers\.2\.mlp\.experts: the expert-parallel layer ", messages.pop())
    assert {file.name for file in (runs / "misdirected").iterdir()} == {
        "failed_0.txt", "failed_1.txt"}  # fmt: skip


def test_export_is_a_hugging_face_folder(runs, models, data):
    folder = runs / "ep2"
    examples = load_examples(MOE, data, AutoTokenizer.from_pretrained(folder))[:3]
    before = padded_logits(AutoModelForCausalLM.from_pretrained(models["mixtral"]), examples)
    after = padded_logits(AutoModelForCausalLM.from_pretrained(folder), examples)
    assert (after - before).abs().max() > 0.1
    card, source = ModelCard.read(folder), ModelCard.read(models["mixtral"])
    assert card.origin == "fine-tuned for 6 steps from: tiny:mixtral"
    assert card.notes["export_logit_difference"] <= 1e-4
    assert card.total_parameters == source.total_parameters
    tokenizer = "tokenizer.json"
    assert (folder / tokenizer).read_bytes() == (models["mixtral"] / tokenizer).read_bytes()
