"""Jitter that an architecture has of its own acts in training where a recipe leaves it, and nowhere
else."""

import json

import pytest
import torch

from stages.finetune.evidence import Evidence, write
from stages.finetune.knobs import Knobs
from stages.finetune.spec import FinetuneSpec
from stages.models.families import FAMILIES
from stages.models.routing import blocks
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY
from tests.stages.finetune.passes import TOKENS, recipe, run

OWN = [name for name in TINY if FAMILIES[name].jitter]
WIDTH = 0.1


def jittered(name):
    model = tiny_model(name, tiny_tokenizer(), seed=3)
    found = FAMILIES[name].own_jitter(model)
    assert found
    for module, attribute in found:
        setattr(module, attribute, WIDTH)
    return model.train()  # the tiny models have no dropout


def test_the_families_with_jitter_of_their_own_are_known():
    assert set(OWN) == {"minimax", "minimax_m2", "mixtral", "phimoe", "switch_transformers"}


@pytest.mark.parametrize("name", [name for name in TINY if FAMILIES[name].is_moe])
def test_no_family_has_another_jitter(name):
    model = tiny_model(name, tiny_tokenizer(), seed=3)
    known = {(id(module), attribute) for module, attribute in FAMILIES[name].own_jitter(model)}
    for module in model.modules():
        for attribute in vars(module):
            if "jitter" in attribute and attribute != "router_jitter_noise":  # Phi-MoE's threshold
                assert (id(module), attribute) in known, attribute


@pytest.mark.parametrize("name", OWN)
def test_it_acts_where_none_is_asked_for_and_ends_at_zero(name):
    """Seen in the first router's logits, as Phi-MoE's routers draw their experts besides."""
    model = jittered(name)

    def first(seed, **fields):
        _, routings, evidence = run(model, seed, **fields)
        return routings[0].logits, evidence.measured("router.jitter")

    (one, told), (two, _) = first(1), first(2)
    assert (one - two).abs().max() > 1e-2
    assert told == {"of_the_model_itself": WIDTH}
    (one, told), (two, _) = (first(seed, router={"jitter": 0.0}) for seed in (1, 2))
    assert torch.equal(one, two)
    assert told == {"in_place_of_the_models_own": WIDTH}
    assert {getattr(*each) for each in FAMILIES[name].own_jitter(model)} == {WIDTH}  # afterwards
    plain = tiny_model(name, tiny_tokenizer(), seed=3).train()
    for module, attribute in FAMILIES[name].own_jitter(plain):
        setattr(module, attribute, 0.0)
    assert torch.equal(run(plain, 1)[1][0].logits, one)


@pytest.mark.parametrize("name", [name for name in OWN if name != "phimoe"])
def test_losses_do_not_depend_on_random_numbers_without_it(name):
    model = jittered(name)

    def loss(seed, jitter):
        knobs = Knobs(model, recipe(router={"jitter": jitter}), Evidence())
        knobs.attach()
        torch.manual_seed(seed)
        with torch.no_grad(), knobs.forward():
            return model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.item()

    assert loss(1, 0.0) == loss(2, 0.0)
    assert loss(1, None) != loss(2, None)


def test_a_number_stands_in_its_place_and_moves_the_routers_input_alone():
    model, inputs = jittered("mixtral"), {}
    router, experts = next(iter(blocks(model).values()))
    experts.register_forward_pre_hook(lambda m, args: inputs.update(experts=args[0]))
    _, clean, _ = run(model, router={"jitter": 0.0})
    untouched = inputs["experts"]
    _, moved, evidence = run(model, router={"jitter": 0.02})
    assert torch.equal(inputs["experts"], untouched)
    # Uniform in [0.98, 1.02], so the logits of one token move by at most 0.02 |w| |x| summed.
    difference = (moved[0].logits - clean[0].logits).abs()
    bound = 0.02 * (untouched.abs() @ router.weight.abs().T)
    assert (difference <= bound + 1e-5).all() and difference.max() > 1e-3
    told = evidence.measured("router.jitter")
    assert told["in_place_of_the_models_own"] == WIDTH
    assert told["mean_deviation_of_the_factor"] == pytest.approx(0.01, rel=0.1)


def test_the_file_of_evidence_tells_it_unasked(tmp_path):
    _, _, evidence = run(jittered("switch_transformers"))
    spec = FinetuneSpec(data=({"dataset": "d"},), steps=1, batch_size=1, learning_rate=1.0)
    write(tmp_path, spec, evidence, {})
    found = json.loads((tmp_path / "recipe_evidence.json").read_text())["knobs"]["router.jitter"]
    assert found == {"asked": None, "measured": {"of_the_model_itself": WIDTH}}
