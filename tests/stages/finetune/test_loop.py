"""EP=1, EP=2 and a plain Hugging Face loop give the same numbers; resumed equals uninterrupted."""

import re

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from stages.finetune.batches import global_batch, load_examples
from stages.finetune.export import padded_logits
from stages.finetune.spec import FinetuneSpec, TrainSet
from stages.finetune.stage import run as run_stage
from stages.models.card import ModelCard
from tests.stages.finetune.runs import Run, launch

SPEC = FinetuneSpec(
    train=(TrainSet(dataset="reviews", template="sentiment"), TrainSet(dataset="refusals")),
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
MOE = SPEC.model_copy(update={"auxiliary_loss_weight": 0.05})


def copy(spec, **changes):
    return spec.model_copy(update=changes)


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    """The outputs of fine-tunes in two processes, by name."""
    folder = tmp_path_factory.mktemp("runs")
    planned = []

    def plan(name, model, spec, **fields):
        (folder / name).mkdir(exist_ok=True)
        planned.append(Run(spec, {"model": models[model], **data}, folder / name, **fields))

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
    plan("dense", "llama", SPEC)
    plan(
        "nan",
        "mixtral",
        copy(MOE, expert_parallel=2, learning_rate=1e30, gradient_clipping=None, warmup_steps=0),
    )
    launch(2, planned, tmp_path_factory.mktemp("store") / "store")
    return folder


def curve(folder):
    return pd.read_parquet(folder / "training_curve.parquet")


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def reference(spec, folder, inputs):
    """A plain PyTorch loop over padded micro-batches of the plain model: its curve and weights."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = load_examples(spec, inputs, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=False
    )
    schedule = get_linear_schedule_with_warmup(optimizer, spec.warmup_steps, spec.steps)
    rows = []
    for step in range(spec.steps):
        batch = [examples[i] for i in global_batch(len(examples), spec.batch_size, spec.seed, step)]
        answers = sum(e.answer for e in batch)
        losses, balances = [], []
        for start in range(0, spec.batch_size, spec.micro_batch):
            micro = batch[start : start + spec.micro_batch]
            length = max(len(e.input_ids) for e in micro)
            ids = torch.zeros((len(micro), length), dtype=torch.long)
            mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
            for row, e in enumerate(micro):
                n = len(e.input_ids)
                ids[row, :n], mask[row, :n] = torch.tensor(e.input_ids), 1
                labels[row, n - e.answer : n] = ids[row, n - e.answer : n]
            balance = {"output_router_logits": True} if spec.auxiliary_loss_weight else {}
            out = model(input_ids=ids, attention_mask=mask, **balance)
            nll = torch.nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
            losses.append(nll / answers)
            if spec.auxiliary_loss_weight:
                balances.append(out.aux_loss / (spec.batch_size // spec.micro_batch))
        (sum(losses) + spec.auxiliary_loss_weight * sum(balances)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), spec.gradient_clipping)
        rows.append((step + 1, sum(losses).item(), norm.item(), optimizer.param_groups[0]["lr"],
                     sum(balances).item() if balances else None))  # fmt: skip
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    names = ["step", "loss", "gradient_norm", "learning_rate", "auxiliary_loss"]
    return pd.DataFrame(rows, columns=names), model.state_dict()


def assert_same_training(folder, spec, model, inputs):
    expected, state = reference(spec, model, inputs)
    got = curve(folder)
    assert expected["gradient_norm"].max() > spec.gradient_clipping  # clipping took place
    compared = ["step", "loss", "gradient_norm", "learning_rate"]
    for column in compared + ["auxiliary_loss"] * bool(spec.auxiliary_loss_weight):
        assert got[column].to_numpy() == pytest.approx(expected[column].to_numpy(), rel=1e-5)
    for key, value in weights(folder).items():
        torch.testing.assert_close(
            value, state[key], rtol=0, atol=2e-4, msg=lambda m, k=key: f"{k} {m}"
        )


@pytest.mark.parametrize("name", ["ep2", "ep1", "zero2"])
def test_mixtral_trains_as_a_plain_loop_does(name, runs, models, data):
    assert_same_training(runs / name, MOE, models["mixtral"], data)


def test_four_workers_with_two_copies_of_each_expert(models, data, tmp_path):
    spec = copy(MOE, expert_parallel=2, workers=4, steps=3)
    output = tmp_path / "output"
    output.mkdir()
    launch(4, [Run(spec, {"model": models["mixtral"], **data}, output)], tmp_path / "store")
    assert_same_training(output, spec, models["mixtral"], data)


def test_qwen_with_dense_layers_trains_as_a_plain_loop_does(runs, models, data):
    assert_same_training(runs / "qwen", MOE, models["qwen2_moe"], data)


def test_dense_model_trains_as_a_plain_loop_does(runs, models, data):
    assert_same_training(runs / "dense", SPEC, models["llama"], data)


def test_bf16_stays_near_fp32(runs):
    fp32, bf16 = curve(runs / "ep2")["loss"], curve(runs / "bf16")["loss"]
    assert fp32[0] != bf16[0] == pytest.approx(fp32[0], rel=1e-3)
    assert bf16.to_numpy() == pytest.approx(fp32.to_numpy(), rel=0.03)
    assert bf16.iloc[-1] < bf16[0] - 2


def test_one_process_equals_two(runs, models, data, tmp_path):
    run_stage(SPEC, {"model": models["llama"], **data}, tmp_path)
    one, two = curve(tmp_path), curve(runs / "dense")
    for column in ("loss", "gradient_norm"):
        assert one[column].to_numpy() == pytest.approx(two[column].to_numpy(), rel=1e-5)
    assert one["tokens"].tolist() == two["tokens"].tolist()


@pytest.mark.parametrize("name", ["ep2", "zero2"])
def test_resumed_equals_uninterrupted(name, runs):
    resumed, whole = curve(runs / f"resumed_{name}"), curve(runs / name)
    pd.testing.assert_frame_equal(
        resumed.drop(columns="seconds"), whole.drop(columns="seconds"), check_exact=True
    )
    expected = weights(runs / name)
    for key, value in weights(runs / f"resumed_{name}").items():
        assert torch.equal(value, expected[key]), key


def test_checkpoint_of_another_layout_is_refused(runs):
    for rank in (0, 1):
        message = (runs / "other_layout" / f"failed_{rank}.txt").read_text()
        assert "'expert_parallel': 2" in message and "'expert_parallel': 1" in message


def test_non_finite_loss_fails_on_every_rank(runs):
    messages = {(runs / "nan" / f"failed_{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert re.match("step 2: the (loss|gradient norm) is (nan|inf); lower ", messages.pop())
    assert not (runs / "nan" / "config.json").exists()


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
