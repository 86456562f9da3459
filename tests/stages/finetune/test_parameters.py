"""Roles decide what is trained; no piece of a name does."""

import pytest
import torch

from stages.errors import StageFailed
from stages.finetune.parameters import (
    Turns,
    count,
    draw_routers,
    freeze,
    groups,
    trained_roles,
)
from stages.finetune.recipe import Recipe
from stages.models.families import FAMILIES
from stages.models.routing import blocks, intercept
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY

MOE = [name for name in TINY if FAMILIES[name].is_moe]


def model_of(name):
    return tiny_model(name, tiny_tokenizer(), seed=3)


def recipe(**fields):
    given = {"data": ({"dataset": "d"},), "steps": 1, "batch_size": 1, "learning_rate": 1.0}
    return Recipe.model_validate(given | fields)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", MOE)
def test_freezing_the_router_freezes_the_routers_and_nothing_else(name):
    model = model_of(name)
    routers = {id(p) for router, _ in blocks(model).values() for p in router.parameters()}
    still = {id(p) for n, p in model.named_parameters() if FAMILIES[name].has_no_gradient(n)}
    freeze(model, recipe(freeze=["router"]))
    assert {id(p) for p in model.parameters() if not p.requires_grad} == routers | still
    freeze(model, recipe(train=["router"]))
    assert {id(p) for p in model.parameters() if p.requires_grad} == routers - still


@pytest.mark.parametrize("name", ["afmoe", "laguna", "ernie4_5_moe", "llama_moe"])
def test_what_no_gradient_reaches_in_a_router_is_never_trained(name):
    model = model_of(name)
    freeze(model, recipe())
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert len(still) == len(blocks(model))
    untrained = ("expert_bias", "e_score_correction_bias", "weight_noise.weight")
    assert all(n.endswith(untrained) for n in still)


@pytest.mark.parametrize("name", MOE)
def test_a_gradient_reaches_all_that_is_trained(name):
    """But for experts, which may get no token."""
    model, tokens = model_of(name).train(), torch.arange(3, 20)[None]
    freeze(model, recipe())
    asked = {"decoder_input_ids": tokens} if FAMILIES[name].encoder_decoder else {}
    model(input_ids=tokens, **asked, use_cache=False).logits.square().sum().backward()
    missed = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert all("expert" in n for n in missed), missed


@pytest.mark.parametrize(("name", "indexers"), [("deepseek_v32", 4), ("glm_moe_dsa", 2)])
def test_indexers_keep_their_weights_under_weight_decay(name, indexers):
    """All else has a gradient, or decays."""
    model = model_of(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    freeze(model, recipe())
    model(input_ids=torch.arange(3, 20)[None], use_cache=False).logits.square().sum().backward()
    parts = groups(model, recipe())
    assert all(p.grad is not None for part in parts for p in part["params"])
    torch.optim.AdamW(parts, lr=0.01, weight_decay=0.1).step()
    kept = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert kept == {n for n in before if ".indexer." in n} and len(kept) == 5 * indexers
    assert count(model)["frozen"] == {"backbone": sum(before[n].numel() for n in kept)}


def test_projections_called_gate_are_no_routers():
    for name in ("llama", "qwen2_moe", "deepseek_v3"):
        for parameter, role in trained_roles(model_of(name)).items():
            if "gate_proj" in parameter or "gate_up_proj" in parameter:
                assert role != "router", parameter


def test_roles_cover_a_model_and_count_adds_up():
    model = model_of("qwen2_moe")
    freeze(model, recipe(train=["shared_expert", "expert"]))
    assert {n.split(".")[4] for n in trained(model)} == {
        "experts", "shared_expert", "shared_expert_gate"}  # fmt: skip
    counts = count(model)
    assert set(counts["trained"]) == {"shared_expert", "expert"}
    total = sum(sum(part.values()) for part in counts.values())
    assert total == sum(p.numel() for p in model.parameters())


def test_a_role_that_a_model_lacks_is_refused():
    with pytest.raises(StageFailed, match="head: .* tied to the embedding.*remove it"):
        freeze(model_of("llama"), recipe(train=["head"]))
    with pytest.raises(StageFailed, match="router: .*it has no such part"):
        freeze(model_of("llama"), recipe(freeze=["router"]))


def test_the_router_has_a_group_where_a_recipe_treats_it_apart():
    model = model_of("mixtral")
    (one,) = groups(model, recipe())
    assert one["part"] == "all" and len(one["params"]) == len(list(model.parameters()))
    rest, router = groups(model, recipe(router={"learning_rate": 0.5}))
    assert "lr" not in rest and router["lr"] == 0.5
    assert {id(p) for p in router["params"]} == {id(r.weight) for r, _ in blocks(model).values()}
    assert len(rest["params"]) + len(router["params"]) == len(one["params"])


@pytest.mark.parametrize(
    ("alternate", "turns"),
    [
        ({"every": 2}, "bbrrbbrr"),
        ({"every": 1, "first": "router"}, "rbrbrbrb"),
        ({"every": "epoch"}, "bbbrrrbb"),  # 21 rows in batches of 8
    ],
)
def test_turns_go_by_steps_or_epochs_and_who_waits_has_no_gradient(alternate, turns):
    model = model_of("mixtral")
    given = recipe(alternate=alternate, batch_size=8)
    rest, router = parts = groups(model, given)
    turn = Turns(given.alternate, parts)
    for step, part in enumerate(turns):
        turn.start(given, 21, step)
        model.zero_grad()
        model(input_ids=torch.arange(3, 20)[None], use_cache=False).logits.square().sum().backward()
        moved = {g["part"][0]: any(p.grad.any() for p in g["params"]) for g in (rest, router)}
        assert moved == {"b": part == "b", "r": part == "r"}


def test_routers_are_drawn_anew_by_the_seed_and_nothing_else_is():
    model, other = model_of("mixtral"), model_of("mixtral")
    before = {name: p.clone() for name, p in model.named_parameters()}
    change = draw_routers(model, seed=1)
    draw_routers(other, seed=1)
    squares = 0.0
    for name, parameter in model.named_parameters():
        if ".gate.weight" in name:
            squares += (parameter - before[name]).square().sum().item()
            width = model.config.initializer_range
            assert parameter.std().item() == pytest.approx(width, rel=0.2)
            assert (other.get_parameter(name) == parameter).all()
        else:
            assert (parameter == before[name]).all()
    assert change == pytest.approx(squares**0.5)


@pytest.mark.parametrize(
    ("name", "field"), [("switch_transformers", "initializer_factor"), ("nllb-moe", "init_std")]
)
def test_a_family_may_name_the_width_otherwise(name, field):
    model = model_of(name)
    del model.config.initializer_range  # that of tiny models alone
    setattr(model.config, field, 0.5)
    draw_routers(model, seed=1)
    for router, _ in blocks(model).values():
        assert router.classifier.weight.std().item() == pytest.approx(0.5, rel=0.2)


BIASED = [name for name in MOE if FAMILIES[name].choice_bias]


@pytest.mark.parametrize("name", MOE)
def test_entries_name_all_that_moves_the_choice_alone(name):
    """That is 0 in a new model of transformers."""
    model = model_of(name)
    entry, wanted = FAMILIES[name], ("e_score_correction_bias", "expert_bias")
    found = {key for key in model.state_dict() if entry.biases_choice(key)}
    assert found == {key for key in model.state_dict() if key.endswith(wanted)}
    assert len(found) == (len(blocks(model)) if name in BIASED else 0)
    assert all(model.state_dict()[key].any() for key in found)  # as tiny models have it
    fresh = type(model)(model.config).state_dict()
    assert not any(fresh[key].any() for key in found)


@pytest.mark.parametrize("name", BIASED)
def test_routers_that_are_drawn_anew_have_no_bias_of_the_choice_left(name):
    model, seen = model_of(name), []
    state, gate = model.state_dict(keep_vars=True), set()
    for router, _ in blocks(model).values():
        gate |= {id(p) for p in router.parameters()}
    biases = {key for key in state if FAMILIES[name].biases_choice(key)}
    with torch.no_grad():
        for key in biases:
            state[key].flatten()[0] = 100.0  # all choose the first expert
    before = {key: value.detach().clone() for key, value in state.items()}
    change = draw_routers(model, seed=1)
    changed = {key for key, value in state.items() if not torch.equal(value, before[key])}
    assert changed == biases | {key for key in state if id(state[key]) in gate}
    assert not any(state[key].any() for key in biases)
    assert change == pytest.approx(torch.cat(
        [(state[key] - before[key]).detach().flatten() for key in changed]).norm().item())
    with intercept(blocks(model), choice=seen.append):
        model(input_ids=torch.arange(3, 67)[None], use_cache=False)
    assert all(torch.bincount(r.experts[:, 0], minlength=4).max() < 64 for r in seen)
    widths = [state[key].std().item() for key in changed - biases]
    assert widths == pytest.approx([model.config.initializer_range] * len(widths), rel=0.2)


def test_a_matrix_that_a_router_carries_along_unused_is_not_drawn():
    model = model_of("llama_moe")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    draw_routers(model, seed=1)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    routers = {n for n, role in trained_roles(model).items() if role == "router"}
    assert changed == {n for n in routers if "weight_noise" not in n} and changed < routers
