"""What a run says of its routing, in every way in which families choose."""

import pytest
import torch

from stages.finetune.evidence import Evidence
from stages.finetune.knobs import Knobs
from stages.finetune.loop import start_distributed
from stages.finetune.recipe import Recipe
from stages.finetune.telemetry import RoutingTelemetry, model_flops_utilisation
from stages.models.families import FAMILIES
from stages.models.routing import blocks, intercept
from stages.models.tiny import tiny_model, tiny_tokenizer

TOKENS = torch.arange(3, 67)[None]
LAYERS = {
    "mixtral": [f"layer_{i}" for i in range(4)],
    "jetmoe": ["layer_0_attention", "layer_0", "layer_1_attention", "layer_1"],
    "moduleformer": ["layer_0_attention", "layer_0", "layer_1_attention", "layer_1"],
    "switch_transformers": ["encoder_layer_1", "decoder_layer_1"],
    "nllb-moe": ["encoder_layer_1", "decoder_layer_1"],
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    start_distributed()


def observed(name, passes=2, **router):
    """The row after some passes of training, and what the routers returned in the last."""
    model, returned = tiny_model(name, tiny_tokenizer(), seed=3).train(), []
    given = {"steps": 1, "batch_size": 1, "learning_rate": 1.0, "router": router}
    knobs = Knobs(model, Recipe(data=({"dataset": "d"},), **given), Evidence())
    knobs.attach()
    for module, _ in blocks(model).values():
        module.register_forward_hook(lambda m, a, out: returned.append(out))
    telemetry = RoutingTelemetry(FAMILIES[name].scores)
    for _ in range(passes):
        returned.clear()
        with torch.no_grad(), knobs.forward() as routings:
            asked = {"labels": TOKENS} if model.config.is_encoder_decoder else {}
            model(input_ids=TOKENS, **asked, use_cache=False)
        telemetry.add(routings)
    return telemetry.row(), returned


@pytest.mark.parametrize("name", LAYERS)
def test_every_router_is_seen_under_a_name_of_its_own(name):
    row, _ = observed(name)
    for column in ("router_entropy", "expert_load_variation", "dropped_choices"):
        by_layer = row[f"{column}_by_layer"]
        assert list(by_layer) == LAYERS[name]
        assert row[column] == pytest.approx(sum(by_layer.values()) / len(by_layer))
    for loads in row["expert_load_by_layer"].values():
        assert len(loads) == 4 and sum(loads) == pytest.approx(1)
    assert 0 < row["router_entropy"] < 1.39 and row["expert_load_variation"] > 0.05  # ln 4


@pytest.mark.parametrize("name", ["deepseek_v3", "minimax_m2", "afmoe", "ernie4_5_moe"])
def test_entropy_is_that_of_the_familys_own_scores(name):
    row, _ = observed(name, passes=1)
    model, seen = tiny_model(name, tiny_tokenizer(), seed=3).train(), []
    with torch.no_grad(), intercept(blocks(model), choice=seen.append):
        model(input_ids=TOKENS, use_cache=False)
    logits = torch.stack([routing.logits for routing in seen]).double()
    entropies = {}
    for scores, p in (("softmax", logits.exp()), ("sigmoid", logits.sigmoid())):
        p = p / p.sum(-1, keepdim=True)
        entropies[scores] = -(p * p.log()).sum(-1).mean().item()
    assert FAMILIES[name].scores == ("softmax" if name == "ernie4_5_moe" else "sigmoid")
    assert row["router_entropy"] == pytest.approx(entropies[FAMILIES[name].scores], rel=1e-5)
    assert abs(entropies["sigmoid"] - entropies["softmax"]) > 1e-3


def test_figures_of_switch_by_hand():
    row, returned = observed("switch_transformers", capacity=5)
    for layer, (mask, _, logits) in zip(LAYERS["switch_transformers"], returned, strict=True):
        p = logits[0].softmax(-1)
        loads = torch.bincount(p.argmax(-1), minlength=4)
        assert row["expert_load_by_layer"][layer] == pytest.approx((loads / 64).tolist())
        dropped = (loads - 5).clamp(min=0).sum().item() / 64
        assert row["dropped_choices_by_layer"][layer] == pytest.approx(dropped) and dropped > 0.2
        assert mask.sum().item() == pytest.approx(64 * (1 - dropped))
        entropy = -(p * p.log()).sum(-1).mean().item()
        assert row["router_entropy_by_layer"][layer] == pytest.approx(entropy, rel=1e-5)
        variation = (loads.float().std(correction=0) / 16).item()
        assert row["expert_load_variation_by_layer"][layer] == pytest.approx(variation)


def test_dropped_choices_of_nllb_by_hand():
    """64 tokens choose two experts each, of which 4 experts have 10 places."""
    row, returned = observed("nllb-moe", capacity=10)
    for layer, (_, experts, _) in zip(LAYERS["nllb-moe"], returned, strict=True):
        loads = torch.bincount(experts.flatten(), minlength=4)
        dropped = (loads - 10).clamp(min=0).sum().item() / 128
        assert row["dropped_choices_by_layer"][layer] == pytest.approx(dropped) and dropped > 0.5


def test_utilisation_of_a_device_whose_peak_is_known(monkeypatch):
    """2 devices of 989e12: 1e5 tokens/s of 3 × 6.594e9 operations are all that one can do."""
    passed = 1e5 * 6.594e9
    assert model_flops_utilisation(passed, "bf16", 2) is None  # no device here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    found = model_flops_utilisation(passed, "bf16", 2)
    assert found == pytest.approx(1.9782e15 / 1.978e15)
    assert model_flops_utilisation(passed, "fp32", 2) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Other")
    assert model_flops_utilisation(passed, "bf16", 2) is None
