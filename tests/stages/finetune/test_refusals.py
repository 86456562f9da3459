"""What a recipe asks for and cannot have is refused with the reason, before anything is trained."""

import pytest

from stages.finetune.recipe import AUXILIARY_WEIGHTS
from stages.finetune.refusals import inapplicable
from stages.models.families import FAMILIES
from stages.models.sources import Facts
from tests.stages.finetune.passes import recipe

FREELB = {"adversarial": {"kind": "freelb"}}
LOAD = {"load_loss_weight": 0.1, "router": {"noise": 0.1}}


def test_a_member_of_an_ensemble_has_no_more_experts_than_its_share():
    facts = Facts("moe", "vit_moe_ensemble", experts=4, top_k=1, members=2)
    assert not dict(inapplicable(recipe(router={"top_k": 2}), facts))
    found = dict(inapplicable(recipe(router={"top_k": 3}), facts))
    assert found["router.top_k"] == "3 is more than the 2 experts of a member; lower it"


@pytest.mark.parametrize(
    ("name", "fields", "field", "reason"),
    [
        ("nllb-moe", LOAD, "load_loss_weight", "trained on padded sequences"),
        ("nllb-moe", {"head": "classification"}, "head", "write their answers"),
        ("nllb-moe", {"router": {"top_k": 2}}, "router.top_k", "2 is the model's own"),
        ("nllb-moe", {"router": {"top_k": 5}}, "router.top_k", "more than the 4 experts"),
        ("nllb-moe", {"freeze": ["shared_expert"]}, "freeze", "no shared experts"),
        ("vit_moe", FREELB, "adversarial", "reads images; use pgd or trades"),
        ("mixtral", {"adversarial": {"kind": "pgd"}}, "adversarial", "reads texts; use freelb"),
        ("mixtral", {"router": {"capacity": 2}}, "router.capacity", "no capacity that can be set"),
        ("vit_moe", {"head": "classification"}, "head", "have one"),
        ("phimoe", {"router": {"top_k": 1}}, "router.top_k", "by a rule of its own"),
        *(("phimoe", {"router": {"assignment": way}}, "router.assignment", "a rule of its own")
          for way in ("random", "balanced")),
        *((name, {"dropout": {"residual": 0.1}}, "dropout.residual", "none that can be set")
          for name in ("vit_moe", "nllb-moe", "granitemoeshared")),
    ],
)
def test_what_a_family_lacks_is_refused_with_the_reason(name, fields, field, reason):
    found = dict(inapplicable(recipe(**fields), Facts("moe", name, experts=4, top_k=2)))
    assert list(found) == [field] and reason in found[field]
    remedy = found[field].split("; ")[1]
    assert remedy.startswith(("remove", "lower", "use"))


MOE_ONLY = [
    *((weight, {weight: 0.1}) for weight in AUXILIARY_WEIGHTS),
    ("alternate", {"alternate": {"every": 2}}),
    *((f"router.{knob}", {"router": {knob: value}}) for knob, value in {
        "learning_rate": 0.1, "initial": "random", "noise": 0.1, "jitter": 0.1, "top_k": 1,
        "capacity": 3, "assignment": "balanced"}.items()),
    ("experts.dropout", {"experts": {"dropout": 0.1}}),
    ("experts.drop", {"experts": {"drop": 0.1}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        *MOE_ONLY,
        ("train", {"train": ["router", "backbone"]}),
        ("freeze", {"freeze": ["expert"]}),
        ("lora.roles", {"lora": {"roles": ["expert", "backbone"]}}),
    ],
)
def test_what_only_a_mixture_has_is_refused_for_a_dense_model(field, fields):
    found = dict(inapplicable(recipe(**fields), Facts("dense", "llama")))
    assert found == {field: "only Mixture-of-Experts models have it; remove it"}


ROLES = {  # of which a dense model has none
    "routers": ("train", {"train": ["router"]}),
    "experts": ("train", {"train": ["expert"]}),
    "adapted routers": ("lora.roles", {"lora": {"roles": ["router"]}}),
    "adapted experts": ("lora.roles", {"lora": {"roles": ["expert"]}}),
}


# Of two the choice is made inside their blocks, of MoLM as well but for its size.
REFUSING = {
    "router.top_k": {"switch_transformers", "jetmoe", "phimoe"},
    "router.assignment": {"phimoe"},
    "experts.drop": {"switch_transformers", "jetmoe", "moduleformer"},
}


@pytest.mark.parametrize("roles", ROLES)
def test_roles_that_only_a_mixture_has_hide_no_refusal(roles):
    """Each knob beside them is refused by the families that refuse it alone, and by no other."""
    place, named = ROLES[roles]
    refusing = {field: set() for field, _ in MOE_ONLY}
    for name, entry in FAMILIES.items():
        facts = Facts("moe" if entry.is_moe else "dense", name, experts=4, top_k=2)
        own = dict(inapplicable(recipe(**named), facts))
        assert entry.is_moe or own == {place: "only Mixture-of-Experts models have it; remove it"}
        for field, fields in MOE_ONLY:
            alone = dict(inapplicable(recipe(**fields), facts))
            beside = dict(inapplicable(recipe(**named, **fields), facts))
            assert beside == alone | own, (name, field)
            if entry.is_moe and field in beside:
                refusing[field].add(name)
            assert entry.is_moe or field in beside
    assert {field: refusing[field] for field in REFUSING} == REFUSING
