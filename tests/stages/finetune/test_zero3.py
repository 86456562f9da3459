"""ZeRO stage 3 with spread experts trains, resumes and exports as the other stages do."""

import json
from functools import partial

import pytest
import torch

from stages.finetune import config
from stages.finetune.spec import FinetuneSpec, TrainSet
from stages.models.card import ModelCard
from tests.stages.finetune.reference import assert_same_training, curve, weights
from tests.stages.finetune.runs import Run, launch

FILE = "gpu_moe_expert_parallel_zero3.json"
SPEC = FinetuneSpec(
    data=(TrainSet(dataset="reviews", template="sentiment"), TrainSet(dataset="refusals")),
    steps=4,
    batch_size=8,
    learning_rate=3e-3,
    warmup_steps=2,
    weight_decay=0.1,
    gradient_clipping=0.5,
    auxiliary_loss_weight=0.05,
    workers=2,
    expert_parallel=2,
    micro_batch=2,
    checkpoint_every=2,
    deepspeed_config=FILE,
    seed=5,
)


def partition_everything(folder):
    """DeepSpeed keeps small parameters whole, and all those of a tiny model are small."""
    config.FOLDER = folder


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("files")
    for file in config.FOLDER.glob("*.json"):
        content = json.loads(file.read_text())
        if file.name == FILE:
            content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (files / file.name).write_text(json.dumps(content))
    two, four = [], []

    def plan(name, of=two, model="mixtral", stop_after=None, checkpoints=None, **fields):
        (folder / name).mkdir(exist_ok=True)
        given = FinetuneSpec.model_validate(SPEC.model_dump() | fields)
        inputs = {"model": models[model], **data}
        prepare = partial(partition_everything, files)
        of.append(Run(given, inputs, folder / name, stop_after, checkpoints, prepare))

    plan("zero3")
    plan("copies", four, workers=4, micro_batch=2)  # two of each expert
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    plan("resumed", stop_after=3, checkpoints=checkpoints)
    plan("resumed", checkpoints=checkpoints)
    stage0 = {"expert_parallel": 1, "deepspeed_config": None}
    plan("to_stage0", checkpoints=checkpoints, **stage0)
    back = tmp_path_factory.mktemp("back")
    plan("from_stage0", stop_after=3, checkpoints=back, **stage0)
    plan("from_stage0", checkpoints=back)
    for name in ("switch_transformers", "nllb-moe"):
        # Decoders of a few tokens: each rank leaves some experts without any.
        few = {"model": name, "micro_batch": 1, "batch_size": 2}
        for size in (1, 2):
            plan(f"{name}-{size}", expert_parallel=size, **few)
        plan(f"{name}-0", deepspeed_config=None, expert_parallel=1, **few)
        for size in (1, 2):
            stage2 = "gpu_moe_expert_parallel_zero2.json"
            plan(f"{name}-stage2-{size}", deepspeed_config=stage2, expert_parallel=size, **few)
    turns = {"alternate": {"every": 1}, "router": {"noise": 0.2}, "importance_loss_weight": 0.05}
    freelb = {"adversarial": {"kind": "freelb"}, "auxiliary_loss_weight": 0.0}
    for name, fields in (("turns", turns), ("freelb", freelb)):
        plan(name, **fields)
        plan(f"{name}-0", deepspeed_config=None, **fields)
    launch(2, two, tmp_path_factory.mktemp("two") / "store")
    launch(4, four, tmp_path_factory.mktemp("four") / "store")
    return folder


@pytest.mark.parametrize("name", ["zero3", "copies"])
def test_it_trains_as_a_plain_loop_does_and_exports_whole_weights(name, runs, models, data):
    assert_same_training(runs / name, SPEC, models["mixtral"], data)
    assert ModelCard.read(runs / name).notes["export_logit_difference"] <= 1e-4


@pytest.mark.parametrize("name", ["resumed", "to_stage0", "from_stage0"])
def test_a_checkpoint_goes_on_at_this_and_another_stage(name, runs):
    got, whole = curve(runs / name), curve(runs / "zero3")
    for column in ("loss", "gradient_norm", "auxiliary_loss"):
        assert got[column].to_numpy() == pytest.approx(whole[column].to_numpy(), rel=1e-5)
    if name != "from_stage0":
        assert got["seconds"][:2].tolist() == curve(runs / "resumed")["seconds"][:2].tolist()
    expected = weights(runs / "zero3")
    for key, value in weights(runs / name).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-4, msg=key)


@pytest.mark.parametrize("layout", ["1", "2", "stage2-1", "stage2-2"])
@pytest.mark.parametrize("name", ["switch_transformers", "nllb-moe"])
def test_ranks_may_call_different_experts(name, layout, runs):
    got, plain = curve(runs / f"{name}-{layout}"), curve(runs / f"{name}-0")
    for column in ("loss", "gradient_norm"):
        assert got[column].to_numpy() == pytest.approx(plain[column].to_numpy(), rel=2e-5), column
    for key, value in weights(runs / f"{name}-{layout}").items():
        expected = weights(runs / f"{name}-0")[key]
        torch.testing.assert_close(value, expected, rtol=0, atol=2e-4, msg=key)


def test_the_evidence_says_where_another_stage_was_used_than_the_files(runs):
    def told(name):
        return json.loads((runs / name / "recipe_evidence.json").read_text())["deepspeed"]

    found = told("switch_transformers-stage2-2")
    assert found.pop("reason").startswith("stage 2 sums gradients as they arise")
    file = "gpu_moe_expert_parallel_zero2.json"
    assert found == {"file": file, "stage_of_file": 2, "stage_used": 1}
    for name in ("zero3", "switch_transformers-2"):
        assert told(name) == {"file": FILE, "stage_of_file": 3, "stage_used": 3}


def test_perturbed_embeddings_are_gathered_too(runs):
    got, plain = curve(runs / "freelb"), curve(runs / "freelb-0")
    for column in ("loss", "gradient_norm"):
        assert got[column].to_numpy() == pytest.approx(plain[column].to_numpy(), rel=2e-5), column


def test_knobs_see_the_routers_and_evidence_is_kept(runs):
    got, plain = curve(runs / "turns"), curve(runs / "turns-0")
    for column in ("loss", "gradient_norm", "router_entropy", "router_change"):
        assert got[column].to_numpy() == pytest.approx(plain[column].to_numpy(), rel=2e-5), column
    assert got["router_change"][0] == 0 < got["router_change"][1]
    knobs = json.loads((runs / "turns" / "recipe_evidence.json").read_text())["knobs"]
    for knob in ("auxiliary_loss_weight", "importance_loss_weight"):
        assert knobs[knob]["measured"]["router_logit_gradient_norm"] > 1e-3
    assert knobs["router.noise"]["measured"]["mean_square_of_the_noise"] > 0.03
