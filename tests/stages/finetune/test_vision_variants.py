"""Heads of experts and ensembles through the training loop: equal to a plain one."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup

from stages.data import stage as data_stage
from stages.data.spec import DataSpec
from stages.finetune.batches import global_batch, load_examples
from stages.finetune.recipe import Router, Trades
from stages.finetune.spec import FinetuneSpec, TrainSet
from stages.models import stage as model_stage
from stages.models.images import load_processor
from stages.models.vision_spec import VisionSpec
from tests.stages.finetune.reference import curve, plain, weights
from tests.stages.finetune.runs import Run, launch

SHAPE = {"size": "tiny", "hidden": 16, "heads": 2, "neurons": 16, "depth": 2, "patch": 4,
         "image_size": 8, "channels": 1, "labels": 10, "shared_start": False}  # fmt: skip
MODELS = {
    "sparse_head": VisionSpec(**SHAPE, head="sparse_moe", head_experts=4, head_neurons=32),
    "partitioned": VisionSpec(**SHAPE, experts=4, layers=(1,), ensemble=2),
    "deep": VisionSpec(**SHAPE, ensemble=2),
}
SPEC = FinetuneSpec(
    data=(TrainSet(dataset="digits"),),
    steps=3,
    batch_size=8,
    learning_rate=3e-3,
    gradient_clipping=0.5,
    workers=2,
    micro_batch=4,
    seed=5,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in (*MODELS, "digits")}
    for name, spec in MODELS.items():
        model_stage.run(spec, {}, made[name])
    digits = DataSpec(task="images", source="builtin:digits", splits={"train": 0.5, "test": 0.5},
                      rows={"train": 20, "test": 12})
    data_stage.run(digits, {}, made["digits"])
    return made


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    folder, planned = tmp_path_factory.mktemp("runs"), []
    for name, (model, changes) in {
        "sparse_head": ("sparse_head", {"expert_parallel": 2}),
        "partitioned": ("partitioned", {"expert_parallel": 2}),
        "deep": ("deep", {}),
        "noisy": ("sparse_head", {"router": Router(noise="1/E"), "load_loss_weight": 0.1,
                                  "importance_loss_weight": 0.1}),
        "trades": ("partitioned", {"adversarial": Trades(budget=0.1, steps=2)}),
    }.items():
        (folder / name).mkdir()
        spec = SPEC.model_copy(update=changes)
        inputs = {"model": folders[model], "data/digits": folders["digits"]}
        planned.append(Run(spec, inputs, folder / name))
    launch(2, planned, tmp_path_factory.mktemp("store") / "store")
    return folder


def losses_of(name, model, pixels, labels):
    """Of a micro-batch, summed: of an ensemble the mean of what its members lose by themselves."""
    if name == "deep":
        each = [member(pixel_values=pixels).logits for member in model.members]
    elif name == "partitioned":
        each = model(pixel_values=pixels).member_logits.unbind(1)
    else:
        each = [model(pixel_values=pixels).logits]
    return sum(cross_entropy(logits, labels, reduction="sum") for logits in each) / len(each)


@pytest.mark.parametrize("name", MODELS)
def test_training_is_a_plain_loops(runs, folders, name):
    model = plain(folders[name]).train()
    examples = load_examples(
        SPEC, {"data/digits": folders["digits"]}, load_processor(folders[name])
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=SPEC.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, SPEC.warmup_steps, SPEC.steps)
    losses, norms = [], []
    for step in range(SPEC.steps):
        batch = global_batch(len(examples), SPEC.batch_size, SPEC.seed, step)
        part = [examples[i] for i in batch]
        pixels = (part[0].processor.decode([e.image for e in part]) - 0.5) / 0.5
        labels = torch.tensor([e.label for e in part])
        loss = losses_of(name, model, pixels, labels) / SPEC.batch_size
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SPEC.gradient_clipping)
        losses.append(loss.item())
        norms.append(norm.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    got = curve(runs / name)
    assert got["loss"].tolist() == pytest.approx(losses, rel=1e-5)
    assert got["gradient_norm"].tolist() == pytest.approx(norms, rel=1e-4)
    state = model.state_dict()
    for key, value in weights(runs / name).items():
        if not key.endswith("k_proj.bias"):  # its gradient is rounding
            torch.testing.assert_close(value, state[key], rtol=0, atol=2e-4)


def test_routers_at_the_head_meet_noise_and_losses(runs):
    found = curve(runs / "noisy")
    assert (found["load_loss"] > 0).all() and (found["importance_loss"] > 0).all()
    assert set(found["expert_load_by_layer"][0]) == {"classifier"}


def test_trades_acts_on_the_averaged_prediction(runs):
    clean, found = curve(runs / "partitioned"), curve(runs / "trades")
    assert found["loss"][0] == pytest.approx(clean["loss"][0], rel=1e-5)
    assert found["gradient_norm"][0] != pytest.approx(clean["gradient_norm"][0])
