"""What is trained, at which rate and in which precision: as the recipe says, with whole and with
spread experts."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.stages.finetune import reference
from tests.stages.finetune.results import (
    assert_same_evidence,
    assert_same_training,
    curve,
    evidence,
    measured,
    moved,
    spec,
    weights,
)
from tests.stages.finetune.runs import Run, launch

KNOBS = {
    "default": {},
    "train_router": {"train": ("router",)},
    "train_experts": {"train": ("expert",)},
    "train_backbone": {"train": ("backbone",)},
    "train_embedding": {"train": ("embedding",)},
    "train_shared": {"train": ("shared_expert",)},
    "train_head": {"train": ("head",), "head": "classification"},
    "freeze_router": {"freeze": ("router",)},
    "freeze_experts": {"freeze": ("expert",)},
    "freeze_backbone": {"freeze": ("backbone",)},
    "freeze_embedding": {"freeze": ("embedding",)},
    "freeze_shared": {"freeze": ("shared_expert",)},
    "freeze_head": {"freeze": ("head",), "head": "classification", "learning_rate": 1e-3},
    "constant": {"schedule": "constant", "warmup_steps": 1, "weight_decay": 0.1},
    "cosine": {"schedule": {"kind": "cosine", "cycles": 1}, "steps": 4},
    "stairs": {"schedule": {"kind": "step", "gamma": 0.5, "every": 1}},
    "epochs": {"epochs": 2, "steps": None, "warmup_ratio": 0.34,
               "schedule": {"kind": "step", "gamma": 0.5}},
}  # fmt: skip
LAYOUTS = pytest.mark.parametrize("layout", ["ep1", "ep2"])


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("role_runs")
    planned = []

    def plan(name, given, checkpoints=None):
        (folder / name).mkdir()
        source = "qwen2_moe" if "shared" in name else "mixtral"
        inputs = {"model": models[source], **data}
        planned.append(Run(given, inputs, folder / name, checkpoints=checkpoints))

    for size in (1, 2):
        for name, fields in KNOBS.items():
            plan(f"{name}-ep{size}", spec(expert_parallel=size, **fields))
        kept = folder / f"checkpoint-ep{size}"
        kept.mkdir()
        half = spec(expert_parallel=size, precision="bf16", checkpoint_every=2)
        plan(f"bf16-ep{size}", half, kept)
    launch(2, planned, tmp_path_factory.mktemp("store") / "store")
    return folder


@pytest.mark.parametrize("name", KNOBS)
def test_whole_and_spread_experts_are_trained_the_same(runs, name):
    assert_same_training(runs, name)
    assert_same_evidence(runs, name, KNOBS[name])
    one, plain = curve(runs / f"{name}-ep2"), curve(runs / "default-ep2")
    assert name == "default" or (one["loss"] - plain["loss"]).abs().max() > 1e-4


@LAYOUTS
@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("default", {"router", "expert", "backbone", "embedding"}),
        ("train_router", {"router"}),
        ("train_experts", {"expert"}),
        ("train_backbone", {"backbone"}),
        ("train_embedding", {"embedding"}),
        ("train_shared", {"shared_expert"}),
        ("freeze_router", {"expert", "backbone", "embedding"}),
        ("freeze_experts", {"router", "backbone", "embedding"}),
        ("freeze_backbone", {"router", "expert", "embedding"}),
        ("freeze_embedding", {"router", "expert", "backbone"}),
        ("freeze_shared", {"router", "expert", "backbone", "embedding"}),
    ],
)
def test_the_trained_roles_move_and_no_others(runs, models, run, expected, layout):
    source = models["qwen2_moe" if "shared" in run else "mixtral"]
    assert moved(runs / f"{run}-{layout}", source) == expected
    assert set(evidence(runs / f"{run}-{layout}")["parameters"]["trained"]) == expected


@LAYOUTS
def test_a_head_is_trained_alone(runs, models, layout):
    before = reference.headed(models["mixtral"], spec(**KNOBS["train_head"])).state_dict()
    after = reference.weights(runs / f"train_head-{layout}")
    change = {name: (value - before[name]).abs().max().item() for name, value in after.items()}
    # Each of Adam's three steps is about the rate, which falls from 3e-3 to 1e-3.
    assert 3e-3 < change.pop("score.weight") < 6.1e-3 and not any(change.values())
    trained = evidence(runs / f"train_head-{layout}")["parameters"]["trained"]
    assert trained == {"head": 2 * 64}


@LAYOUTS
def test_a_frozen_head_stays_as_it_was_drawn(runs, models, layout):
    before = reference.headed(models["mixtral"], spec(**KNOBS["freeze_head"])).state_dict()
    after = reference.weights(runs / f"freeze_head-{layout}")
    assert {name for name in after if torch.equal(after[name], before[name])} == {"score.weight"}


@LAYOUTS
@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("default", [3e-3, 2e-3, 1e-3]),
        ("constant", [0, 3e-3, 3e-3]),
        ("cosine", [3e-3, 1.5e-3, 0, 1.5e-3]),  # a whole cycle; linear would end with a quarter
        ("stairs", [3e-3, 1.5e-3, 0.75e-3]),
        # ⌈2 × 21 / 8⌉ steps, of which 3 warm up; the second epoch begins within step 3.
        ("epochs", [0, 1e-3, 2e-3, 1.5e-3, 1.5e-3, 1.5e-3]),
    ],
)
def test_rates_of_each_schedule(runs, name, rates, layout):
    assert curve(runs / f"{name}-{layout}")["learning_rate"].tolist() == pytest.approx(rates)


@LAYOUTS
def test_evidence_tells_schedules_and_lengths_apart(runs, layout):
    cosine = measured(runs / f"cosine-{layout}", "schedule")
    assert list(cosine.values()) == pytest.approx([3e-3, 3e-3, 1.5e-3, 0, 3e-3, 1.5e-3])
    warmup = measured(runs / f"constant-{layout}", "warmup_steps")
    assert warmup == {"steps_before_the_largest_rate": 1}
    epochs = measured(runs / f"epochs-{layout}", "epochs")
    assert epochs == {"steps": 6, "passes_over_the_rows": 6 * 8 / 21}


@LAYOUTS
def test_bf16_keeps_weights_and_moments_in_fp32(runs, layout):
    fp32, bf16 = (curve(runs / f"{name}-{layout}")["loss"] for name in ("default", "bf16"))
    assert fp32[0] != bf16[0] == pytest.approx(fp32[0], rel=5e-3)
    assert bf16.to_numpy() == pytest.approx(fp32.to_numpy(), rel=0.04)
    told = {"weights": ["torch.bfloat16"], "optimizer": ["torch.float32"]}
    assert measured(runs / f"bf16-{layout}", "precision") == told
    kept = dcp.FileSystemReader(runs / f"checkpoint-{layout}").read_metadata()
    for state in ("weight", "exp_avg", "exp_avg_sq"):
        stored = [tensor.properties.dtype for name, tensor in kept.state_dict_metadata.items()
                  if name.endswith(f"/{state}")]  # fmt: skip
        assert len(stored) > 20 and set(stored) == {torch.float32}, state
    # Next to 1, where norms start, bf16 is 2^-7 apart: each of Adam's steps, of 3e-3 at most, would
    # be rounded away, but their sum is more than half of that.
    norm = weights(runs / f"bf16-{layout}")["model.layers.0.input_layernorm.weight"]
    assert norm.max().item() == 1 + 2**-7
