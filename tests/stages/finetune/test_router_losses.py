"""The auxiliary losses equal their definitions, and reach the router in every family."""

import math

import pytest
import torch

from stages.finetune.router_losses import load_balancing_loss, z_loss
from stages.models.routing import Routing, blocks, intercept
from stages.models.tiny import tiny_model, tiny_tokenizer


def routing(logits, experts):
    logits = torch.tensor(logits)
    return Routing("block", logits, torch.tensor(experts), torch.ones(len(logits), 1))


def test_a_case_worked_by_hand():
    # Two experts, logits ln 3 and 0: probabilities 3/4 and 1/4; both tokens go to expert 0.
    seen = [routing([[math.log(3), 0.0]] * 2, [[0], [0]])]
    assert load_balancing_loss(seen).item() == pytest.approx(2 * 1 * 0.75)
    assert z_loss(seen).item() == pytest.approx(math.log(4) ** 2)
    # A second layer whose tokens are spread evenly: f = (3/4, 1/4), P = (5/8, 3/8).
    seen.append(routing([[0.0, 0.0]] * 2, [[0], [1]]))
    assert load_balancing_loss(seen).item() == pytest.approx(2 * (0.75 * 0.625 + 0.25 * 0.375))
    assert z_loss(seen).item() == pytest.approx((math.log(4) ** 2 + math.log(2) ** 2) / 2)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe", "granitemoe", "gpt_oss"])
def test_load_balancing_equals_transformers(name):
    model, seen = tiny_model(name, tiny_tokenizer(), seed=3), []
    with intercept(blocks(model), choice=seen.append):
        out = model(input_ids=torch.arange(3, 60)[None], output_router_logits=True)
    assert load_balancing_loss(seen).item() == pytest.approx(out.aux_loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("loss", [load_balancing_loss, z_loss])
def test_families_whose_head_returns_none_have_the_gradient_all_the_same(name, loss):
    model, seen = tiny_model(name, tiny_tokenizer(), seed=3), []
    with intercept(blocks(model), choice=seen.append):
        model(input_ids=torch.arange(3, 60)[None])
    routers = [p for router, _ in blocks(model).values() for p in router.parameters()]
    gradients = torch.autograd.grad(loss(seen), routers)
    assert all(gradient.norm() > 1e-6 for gradient in gradients)
