"""Every knob trains the same with and without expert parallelism, does what it says to the weights,
and leaves its evidence."""

import re

import pandas as pd
import pytest
import torch

from stages.finetune.evidence import ACTIVE
from stages.finetune.spec import TrainSet
from stages.models.card import ModelCard
from tests.stages.finetune import reference
from tests.stages.finetune.results import (
    BASE,
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

CLIPPED = {"weight_decay": 0.1, "gradient_clipping": 0.5}
KNOBS = {
    "default": {},
    "noise": {"router": {"noise": 0.3}},
    "jitter": {"router": {"jitter": 0.2}},
    "top_k": {"router": {"top_k": 3}},
    "random": {"router": {"assignment": "random"}},
    "balanced": {"router": {"assignment": "balanced"}},
    "expert_dropout": {"experts": {"dropout": 0.1}},
    "expert_drop": {"experts": {"drop": 0.25}},
    "residual": {"dropout": {"residual": 0.1}},
    "attention": {"dropout": {"attention": 0.1}},
    "losses": {"auxiliary_loss_weight": 0.05, "z_loss_weight": 0.01},
    "auxiliary_loss": {"auxiliary_loss_weight": 0.5},
    "z_loss": {"z_loss_weight": 0.1},
    "router_rate": {"router": {"learning_rate": 3e-2}},
    "initial": {"router": {"initial": "random"}},
    "alternate": {"alternate": {"every": 1}, "gradient_clipping": 0.5},
    "alternate_epochs": {"alternate": {"every": "epoch", "first": "router"}, "steps": 4},
    "lora": {"lora": {"roles": ("backbone", "router"), "rank": 4}},
    "lora_dropout": {"lora": {"roles": ("backbone",), "rank": 4, "dropout": 0.3}},
    "freelb": {"adversarial": {"kind": "freelb", "max_norm": 0.03}},
    "sgd": {"optimizer": {"kind": "sgd", "momentum": 0.9}, **CLIPPED},
    "adam": {"optimizer": {"kind": "adam", "betas": (0.8, 0.99)}, **CLIPPED},
    "adagrad": {"optimizer": {"kind": "adagrad", "eps": 1e-6}, **CLIPPED},
    "no_clipping": {"gradient_clipping": None},
    "vision_losses": {"router": {"noise": "1/E"}, "load_loss_weight": 0.1,
                      "importance_loss_weight": 0.1, "gshard_loss_weight": 0.1},
    "headed_load": {"router": {"noise": 0.3}, "load_loss_weight": 0.1, "head": "classification",
                    "data": [{"dataset": "reviews", "template": "sentiment"}]},
}
CAPACITY = ("switch_transformers", "nllb-moe")
LAYOUTS = {
    "gpu_moe_expert_parallel_zero2.json": 2,
    "gpu_moe_expert_parallel_zero2_nodes.json": 2,
    "gpu_moe_expert_parallel_zero2_cpu_offload.json": 2,
    "gpu_single_zero1.json": 1,
    "gpu_dense_zero2.json": 1,
    "gpu_dense_zero2_cpu_offload.json": 1,
}
"""DeepSpeed file to the expert-parallel size; stage 3 has tests of its own."""
ZERO2 = {"deepspeed_config": "cpu_moe_expert_parallel_zero2.json"}


RESUMED = {"expert_drop": {}, "alternate": ZERO2, "lora": {}, "router_rate": ZERO2}
WITNESSED = {"router": {"noise": 0.5}, "z_loss_weight": 0.05, "importance_loss_weight": 0.1}
"""Losses of which the first is measured by a pass of its own in an encoder-decoder."""


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("knob_runs")
    planned = []

    def plan(name, model, given, **fields):
        (folder / name).mkdir(exist_ok=True)
        planned.append(Run(given, {"model": models[model], **data}, folder / name, **fields))

    for name, fields in KNOBS.items():
        plan(f"{name}-ep1", "mixtral", spec(**fields))
        plan(f"{name}-ep2", "mixtral", spec(expert_parallel=2, **fields))
    for name in ("router_rate", "alternate", "freelb", "losses"):
        plan(f"{name}-zero2", "mixtral", spec(expert_parallel=2, **KNOBS[name], **ZERO2))
    for file, size in LAYOUTS.items():
        plan(file, "mixtral", spec(expert_parallel=size, deepspeed_config=file))
    for name in CAPACITY:
        for size in (1, 2):
            losses = {"auxiliary_loss_weight": 0.05, "z_loss_weight": 0.01}
            limited = spec(router={"capacity": 6}, expert_parallel=size, **losses)
            plan(f"capacity-{name}-ep{size}", name, limited)
    for size in (1, 2):
        inside = {"experts": {"dropout": 0.1}, "dropout": {"residual": 0.1}}
        plan(f"jetmoe-ep{size}", "jetmoe", spec(expert_parallel=size, **inside))
    plan("experts_lora", "mixtral", spec(lora={"roles": ("expert", "router"), "rank": 2}))
    file = "gpu_moe_expert_parallel_zero2_cpu_offload.json"
    offloaded = spec(**KNOBS["alternate"], expert_parallel=2, deepspeed_config=file)
    plan("alternate-offloaded", "mixtral", offloaded)
    for precision in ("fp32", "bf16"):
        plan(f"minimax-{precision}", "minimax", spec(precision=precision, expert_parallel=2))
        climbing = spec(adversarial={"kind": "freelb", "max_norm": 0.03}, precision=precision)
        plan(f"large-{precision}", "large", climbing)
    head = {"head": "classification", "lora": {"roles": ("backbone",)}}
    plan("drawn", "mixtral", spec(**head))
    nan = {"learning_rate": 1e30, "gradient_clipping": None, "max_nonfinite_steps": 2}
    for name, fields in (("nan", {}), ("nan_zero2", ZERO2)):
        plan(name, "mixtral", spec(expert_parallel=2, **nan, **fields))
    for name, layout in RESUMED.items():
        given = spec(**KNOBS[name], expert_parallel=2, checkpoint_every=2, **layout)
        checkpoints = tmp_path_factory.mktemp("checkpoints")
        plan(f"resumed-{name}", "mixtral", given, stop_after=3, checkpoints=checkpoints)
        plan(f"resumed-{name}", "mixtral", given, checkpoints=checkpoints)
    noisy = spec(**WITNESSED, expert_parallel=2, checkpoint_every=2)
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    plan("switch-ep2", "switch_transformers", noisy)
    plan("resumed-switch", "switch_transformers", noisy, stop_after=3, checkpoints=checkpoints)
    plan("resumed-switch", "switch_transformers", noisy, checkpoints=checkpoints)
    audited = TrainSet(dataset="refusals", exclude=("NOT 2",), limit=2, repeat=3)
    for size in (1, 2):
        mixed = spec(data=(*BASE["data"], audited), expert_parallel=size)
        plan(f"audited-ep{size}", "mixtral", mixed)
    dropped = {"router.noise": 0.3}
    plan("dense", "llama", spec(dropped=dropped))
    plan("refused", "llama", spec(router={"noise": 0.3}))
    plan("tied", "mixtral", spec(train=("head",)))
    launch(2, planned, tmp_path_factory.mktemp("store") / "store")
    return folder


@pytest.mark.parametrize("name", KNOBS)
def test_expert_parallel_training_equals_that_of_one_copy(runs, name):
    assert_same_training(runs, name)
    if name not in ("default", "alternate_epochs"):  # which has other steps
        one, plain = curve(runs / f"{name}-ep2"), curve(runs / "default-ep2")
        assert (one["loss"] - plain["loss"]).abs().max() > 1e-4


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_leaves_the_same_evidence_with_spread_experts(runs, name):
    assert_same_evidence(runs, name, KNOBS[name])


@pytest.mark.parametrize("layout", ["ep1", "ep2"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad"])
def test_each_optimiser_steps_as_that_of_torch_does(runs, models, data, name, layout):
    given, source = spec(**KNOBS[name]), models["mixtral"]
    reference.assert_same_training(runs / f"{name}-{layout}", given, source, data)


@pytest.mark.parametrize("layout", ["ep1", "ep2"])
def test_whole_epochs_take_turns(runs, layout):
    """21 rows in batches of 8: the second epoch begins within the third batch."""
    change = curve(runs / f"alternate_epochs-{layout}")["router_change"]
    assert (change > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", CAPACITY)
def test_a_capacity_drops_the_same_with_spread_experts(runs, name):
    one, two = (curve(runs / f"capacity-{name}-ep{size}") for size in (1, 2))
    for column in ("loss", "gradient_norm", "dropped_choices", "expert_load_variation"):
        assert two[column].to_numpy() == pytest.approx(one[column].to_numpy(), rel=2e-5), column
    assert (one["dropped_choices"] > 0.1).all()
    # In the evidence: of the first step, and of the worker that writes it.
    shares = [measured(runs / f"capacity-{name}-ep{size}", "router.capacity") for size in (1, 2)]
    assert shares[0] == pytest.approx(shares[1]) and 0.1 < shares[0]["share_of_choices_dropped"] < 1
    for knob in ("auxiliary_loss_weight", "z_loss_weight"):
        found = [measured(runs / f"capacity-{name}-ep{size}", knob) for size in (1, 2)]
        one, two = (part["router_gradient_norm"] for part in found)
        assert one > 1e-2 and two == pytest.approx(one, rel=1e-4)


def test_dropout_inside_blocks_is_the_same_with_spread_experts(runs):
    one, two = (curve(runs / f"jetmoe-ep{size}") for size in (1, 2))
    for column in ("loss", "gradient_norm"):
        assert two[column].to_numpy() == pytest.approx(one[column].to_numpy(), rel=2e-5), column
    # A block adds the experts' sum and a bias, which starts at 0: it has the zeros of both.
    for knob, expected in (("experts.dropout", 0.1), ("dropout.residual", 0.19)):
        one, two = (measured(runs / f"jetmoe-ep{size}", knob) for size in (1, 2))
        assert one == two and one["share_of_outputs_dropped"] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("name", ["router_rate", "alternate", "freelb", "losses"])
def test_zero2_equals_stage_0(runs, name):
    zero, two = curve(runs / f"{name}-zero2"), curve(runs / f"{name}-ep2")
    for column in ("loss", "gradient_norm"):
        assert zero[column].to_numpy() == pytest.approx(two[column].to_numpy(), rel=2e-5), column


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_for_gpus_train_the_same(runs, name):
    got, plain = curve(runs / name), curve(runs / "default-ep2")
    assert got["loss"].to_numpy() == pytest.approx(plain["loss"].to_numpy(), rel=2e-5)


@pytest.mark.parametrize("layout", ["ep1", "ep2"])
def test_adapters_change_the_roles_that_they_are_for(runs, models, layout):
    assert moved(runs / f"lora-{layout}", models["mixtral"]) == {"router", "backbone"}


@pytest.mark.parametrize("layout", ["ep1", "ep2"])
def test_dropout_before_adapters(runs, models, layout):
    assert moved(runs / f"lora_dropout-{layout}", models["mixtral"]) == {"backbone"}
    dropped = measured(runs / f"lora_dropout-{layout}", "lora")["share_of_inputs_dropped"]
    assert dropped == pytest.approx(0.3, abs=0.01)
    assert "share_of_inputs_dropped" not in measured(runs / f"lora-{layout}", "lora")


def test_adapters_of_experts_and_routers_are_merged(runs, models):
    assert moved(runs / "experts_lora", models["mixtral"]) == {"expert", "router"}
    names = set(weights(runs / "experts_lora"))
    assert names == set(weights(models["mixtral"]))  # a plain Hugging Face folder
    before, after = weights(models["mixtral"]), weights(runs / "experts_lora")
    for name in (n for n in names if "down_proj" in n):
        for change in after[name] - before[name]:  # of each expert
            assert torch.linalg.matrix_rank(change, atol=1e-5) <= 2
    assert ModelCard.read(runs / "experts_lora").notes["export_logit_difference"] <= 1e-4


def test_router_learning_rate_is_its_own(runs):
    for layout in ("ep1", "ep2"):
        got = curve(runs / f"router_rate-{layout}")
        assert got["router_learning_rate"].tolist() == pytest.approx([3e-2, 2e-2, 1e-2])
        assert got["learning_rate"].tolist() == pytest.approx([3e-3, 2e-3, 1e-3])
        rates = measured(runs / f"router_rate-{layout}", "router.learning_rate")["learning_rates"]
        assert rates == {"backbone": 3e-3, "router": 3e-2}


@pytest.mark.parametrize("layout", ["ep1", "ep2"])
def test_routers_start_anew(runs, models, layout):
    found, source = weights(runs / f"initial-{layout}"), weights(models["mixtral"])
    norm = measured(runs / f"initial-{layout}", "router.initial")["norm_of_the_change"]
    gates = [name for name in found if name.endswith("gate.weight")]
    moved = torch.cat([(found[name] - source[name]).flatten() for name in gates]).norm().item()
    plain = weights(runs / f"default-{layout}")
    trained = torch.cat([(plain[name] - source[name]).flatten() for name in gates]).norm().item()
    # Drawn anew they lie as far apart as independent draws; training alone moves them less.
    assert norm > 1 and moved == pytest.approx(norm, rel=0.3) and trained < 0.5 * moved


@pytest.mark.parametrize("layout", ["ep1", "ep2", "zero2"])
def test_parts_take_turns(runs, layout):
    change = curve(runs / f"alternate-{layout}")["router_change"]
    assert change[0] == change[2] == 0 < change[1]
    assert measured(runs / f"alternate-{layout}", "alternate") == {
        "steps_that_moved_the_routers": 1, "steps_that_did_not": 2}  # fmt: skip


def test_auxiliary_losses_reach_the_routers(runs):
    for layout in ("ep1", "ep2"):
        for knob in ("auxiliary_loss_weight", "z_loss_weight"):
            assert measured(runs / f"losses-{layout}", knob)["router_gradient_norm"] > 1e-2
    first = curve(runs / "losses-ep2").iloc[0]
    assert first["auxiliary_loss"] > 1.9 and first["z_loss"] > 0.5


def test_what_takes_turns_may_be_offloaded(runs):
    offloaded, plain = curve(runs / "alternate-offloaded"), curve(runs / "alternate-ep2")
    for column in ("loss", "gradient_norm"):
        same = pytest.approx(plain[column].to_numpy(), rel=2e-5)
        assert offloaded[column].to_numpy() == same, column


def test_decays_of_a_mixer_have_the_type_of_its_weights(runs):
    bf16, fp32 = curve(runs / "minimax-bf16")["loss"], curve(runs / "minimax-fp32")["loss"]
    assert bf16.to_numpy() == pytest.approx(fp32.to_numpy(), rel=0.04)


def test_an_adversary_that_rounding_takes_away_is_refused(runs):
    """Beside embeddings of size 20 steps of bf16 are larger than what is added."""
    left = measured(runs / "large-fp32", "adversarial")["share_of_the_norm_that_rounding_leaves"]
    assert left == pytest.approx(1, abs=0.01)
    messages = {(runs / "large-bf16" / f"failed_{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert messages.pop().startswith("adversarial: rounding in bf16 leaves ")


def test_a_drawn_head_that_nothing_trains_is_refused_beside_adapters(runs):
    refusal = (runs / "drawn" / "failed_0.txt").read_text()
    assert refusal.startswith("recipe: head: is drawn at random, and lora leaves it as it is")


def test_freelb_climbs(runs):
    seen = measured(runs / "freelb-ep2", "adversarial")
    losses = [seen[f"loss_share_in_ascent_{n}"] for n in (1, 2, 3)]
    assert losses[0] < losses[1] < losses[2]
    norms = [seen[f"norm_in_ascent_{n}"] for n in (1, 2, 3)]
    assert norms[0] == pytest.approx(0.02 / 3**0.5, rel=0.05) and max(norms) <= 0.03 + 1e-6


@pytest.mark.parametrize("name", ["nan", "nan_zero2"])
def test_steps_that_are_not_finite_are_skipped_then_stop_the_run(runs, name):
    messages = {(runs / name / f"failed_{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    message = messages.pop()  # step 2 was the first such step
    assert "step 3: the" in message and "after 1 skipped step(s)" in message


@pytest.mark.parametrize("name", RESUMED)
def test_knobs_resume_exactly(runs, name):
    whole = runs / f"{name}-{'zero2' if RESUMED[name] else 'ep2'}"
    resumed = runs / f"resumed-{name}"
    assert curve(resumed)["loss"].tolist() == curve(whole)["loss"].tolist()
    expected = weights(whole)
    for key, value in weights(resumed).items():
        assert torch.equal(value, expected[key]), key


def test_what_is_measured_in_an_encoder_decoder_changes_no_loss(runs):
    """The resumed run measures in its third step, the whole one in its first alone."""
    whole, resumed = curve(runs / "switch-ep2"), curve(runs / "resumed-switch")
    for column in ("loss", "z_loss", "importance_loss", "gradient_norm"):
        assert resumed[column].tolist() == whole[column].tolist(), column
    assert (whole["importance_loss"] > 0.01).all()
    for name in ("switch-ep2", "resumed-switch"):
        for knob in ("z_loss_weight", "importance_loss_weight"):
            assert measured(runs / name, knob)["router_gradient_norm"] > 1e-3


@pytest.mark.parametrize("layout", ["ep1", "ep2"])
def test_rows_that_were_drawn_and_removed_are_counted_and_named(runs, layout):
    reviews, refusals = evidence(runs / f"audited-{layout}")["data"]
    assert reviews["rows"] == 21 and reviews["removed"] == 0
    assert refusals == {"dataset": "refusals/train", "rows": 2, "repeat": 3, "removed": 1,
                        "removed_by_phrase": {"not 2": 1}}  # fmt: skip
    removed = pd.read_parquet(runs / f"audited-{layout}" / "removed_rows.parquet")
    assert removed.to_dict("records") == [{"dataset": "refusals", "id": "i2", "phrase": "not 2"}]
    mixed, other, plain = (curve(runs / name) for name in (
        f"audited-{layout}", "audited-ep1", "default-ep1"))  # fmt: skip
    assert mixed["tokens"].tolist() == other["tokens"].tolist() != plain["tokens"].tolist()
    assert mixed["loss"].to_numpy() == pytest.approx(other["loss"].to_numpy(), rel=2e-5)


def test_a_dense_partner_says_what_was_dropped(runs):
    found = evidence(runs / "dense")
    assert found["not_applicable"] == {
        "router.noise": {"asked": 0.3, "reason": "only Mixture-of-Experts models have it"}
    }
    assert set(found["knobs"]) == {*ACTIVE, "steps"}
    assert "router_entropy" not in curve(runs / "dense")


def test_what_cannot_act_is_refused_by_the_loop_as_well(runs):
    refusal = (runs / "refused" / "failed_0.txt").read_text()
    assert refusal == "recipe: router.noise: only Mixture-of-Experts models have it; remove it"
    assert "tied to the embedding" in (runs / "tied" / "failed_1.txt").read_text()


def test_telemetry_adds_up(runs):
    got = curve(runs / "default-ep2")
    assert (got["tokens_per_second"] * got["seconds"]).round().tolist() == got["tokens"].tolist()
    assert got["model_flops_utilisation"].isna().all()  # no accelerator whose peak is known
    last = got.iloc[-1]
    layers = [f"layer_{i}" for i in range(4)]
    assert list(last["router_entropy_by_layer"]) == layers
    for layer in layers:
        assert sum(last["expert_load_by_layer"][layer]) == pytest.approx(1)
    mean = sum(last["router_entropy_by_layer"].values()) / 4
    assert last["router_entropy"] == pytest.approx(mean)
    assert 0 < last["router_entropy"] < 1.39  # ln 4
    dropped = curve(runs / "expert_drop-ep2")["dropped_choices"]
    assert dropped.mean() == pytest.approx(0.25, abs=0.12)
    texts = re.findall("<!-- (.*?) -->", (runs / "default-ep2" / "routing.svg").read_text())
    assert "router entropy (nats)" in texts
    third = texts[texts.index("variation of the experts' loads") + 1 :]
    assert third[:4] == third[5:9] == ["0", "1", "2", "3"]
    assert (third[4], *third[9:11]) == ("expert", "layer", "load of each expert, 1 = even")
    assert not (runs / "dense" / "routing.svg").exists()
