"""Adapters stand at the roles that a recipe names, in every family, and act."""

import pytest
import torch

from stages.errors import StageFailed
from stages.finetune import parameters
from stages.finetune.evidence import Evidence
from stages.finetune.knobs import Knobs
from stages.finetune.lora import adapt, merge
from stages.finetune.parameters import trained_roles
from stages.finetune.recipe import Lora
from stages.finetune.refusals import READS_ROUTERS_ITSELF, inapplicable
from stages.finetune.router_losses import load_balancing_loss, z_loss
from stages.models.families import FAMILIES
from stages.models.routing import blocks
from stages.models.sources import Facts
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY
from tests.stages.finetune.passes import TOKENS, recipe, run
from tests.stages.finetune.results import curve, evidence, measured, spec
from tests.stages.finetune.runs import Run, launch
from tests.stages.models.tiny_folders import dense_model

MOE = [n for n in TINY if FAMILIES[n].is_moe and not FAMILIES[n].no_training]

ROUTERS = recipe(lora={"roles": ["router"], "rank": 2})


def tiny(name):
    return tiny_model(name, tiny_tokenizer(), seed=3)


def adapted(model):
    """The parameters that have an adapter, by the name that they had without it."""
    found = set()
    for name, _ in model.named_parameters():
        if "lora_A" in name or "lora_embedding_A" in name:
            path, _, rest = name.partition(".lora_")
            inner = model.get_submodule(path)
            depth = path.count(".base_layer")
            path = path.replace(".base_layer", "")
            own = getattr(inner, "parameter_name", None) or "weight"
            found.add((path, own, depth))
    return {f"{path}.{own}" for path, own, _ in found}


@pytest.mark.parametrize("name", MOE)
def test_backbone_adapters_stand_at_the_backbone_alone(name):
    """Not at routed experts, whose matrices older layouts call by the names of a dense layer's, nor
    at indexers, which no gradient reaches."""
    model = tiny(name)
    roles = trained_roles(model)
    wanted = {f"{path}.weight" for path, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and roles.get(f"{path}.weight") == "backbone"
              and not path.rpartition(".")[0].endswith(".indexer")}
    adapt(model, Lora(roles=("backbone",), rank=2), Evidence())
    found = adapted(model)
    assert wanted <= found and {roles[each] for each in found} == {"backbone"}
    assert not any(".indexer." in each for each in found)


@pytest.mark.parametrize("name", MOE)
def test_router_adapters_act_or_are_refused(name):
    refused = dict(inapplicable(recipe(lora={"roles": ["router"]}), Facts("moe", name)))
    assert ("lora.roles" in refused) == (name in READS_ROUTERS_ITSELF)
    model = tiny(name).eval()
    tokens = torch.arange(3, 33)[None]
    asked = {"input_ids": tokens, "use_cache": False}
    if model.config.is_encoder_decoder:
        asked["decoder_input_ids"] = tokens[:, :7]

    def gradients():
        adapt(model, Lora(roles=("router",), rank=2), Evidence())
        model(**asked).logits.float().log_softmax(-1)[..., 5].sum().backward()
        return [p.grad for n, p in model.named_parameters() if "lora_B" in n]

    if name in READS_ROUTERS_ITSELF:
        with pytest.raises((AttributeError, AssertionError)):
            assert all(g is not None for g in gradients())
    else:
        found = gradients()
        assert found and all(g is not None for g in found) and any(g.any() for g in found)


@pytest.mark.parametrize("name", [n for n in MOE if n not in READS_ROUTERS_ITSELF])
def test_routing_is_seen_and_changed_as_the_merged_routers_decide_it(name):
    """What knobs, losses and telemetry see holds the adapters, which all have a gradient of it."""
    model = tiny(name)
    parameters.freeze(model, ROUTERS)
    tuner = adapt(model, ROUTERS.lora, Evidence())
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    noisy, wide, _ = run(model, router={"noise": 0.3})
    knobs = Knobs(model, ROUTERS, Evidence())
    knobs.attach()
    asked = {"labels": TOKENS} if model.config.is_encoder_decoder else {}
    with knobs.forward() as seen:
        model(input_ids=TOKENS, use_cache=False, **asked)
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters) == 2 * len(blocks(model))
    for loss in (load_balancing_loss(seen, FAMILIES[name].scores), z_loss(seen)):
        gradients = torch.autograd.grad(loss, adapters, retain_graph=True)
        assert all(gradient.norm() > 1e-7 for gradient in gradients)

    merge(tuner)
    _, merged, _ = run(model)
    again, wide_again, _ = run(model, router={"noise": 0.3})
    torch.testing.assert_close(again, noisy, rtol=1e-3, atol=1e-3)
    pairs = [*zip(seen, merged, strict=True), *zip(wide, wide_again, strict=True)]
    for adapted, plain in pairs:
        torch.testing.assert_close(adapted.logits, plain.logits, rtol=1e-3, atol=2e-3)
        same = (adapted.experts == plain.experts).float().mean().item()
        assert adapted.layer == plain.layer and same > 0.98


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    folder, planned = tmp_path_factory.mktemp("adapted"), []
    for name in ("jetmoe", "nllb-moe", "mixtral"):
        (folder / name).mkdir()
        given = spec(lora=ROUTERS.lora, auxiliary_loss_weight=0.05, z_loss_weight=0.01, workers=1)
        planned.append(Run(given, {"model": models[name], **data}, folder / name))
    launch(1, planned, folder / "store")
    return folder


@pytest.mark.parametrize("name", ["jetmoe", "nllb-moe", "mixtral"])
def test_losses_on_routers_train_their_adapters(runs, name):
    for knob in ("auxiliary_loss_weight", "z_loss_weight"):
        assert measured(runs / name, knob)["router_gradient_norm"] > 1e-3
    assert set(evidence(runs / name)["parameters"]["trained"]) == {"router"}
    assert curve(runs / name)[["auxiliary_loss", "z_loss"]].nunique().tolist() == [3, 3]


def test_adapters_of_a_dense_model_change_its_answers_and_nothing_else_is_trained():
    model = dense_model("llama", tie_word_embeddings=False).eval()
    tokens = torch.arange(3, 20)[None]
    before = model(input_ids=tokens).logits.detach()
    model.requires_grad_(False)  # as ``parameters.freeze`` leaves it for adapters alone
    adapt(model, Lora(roles=("backbone", "head"), rank=2, dropout=0.5), Evidence())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert {"head", "backbone"} == {
        "head" if name.startswith("lm_head") else "backbone" for name in trained}
    assert torch.equal(model(input_ids=tokens).logits, before)  # they start without effect
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    once = model(input_ids=tokens).logits
    assert (once - before).abs().max() > 1e-2
    model.train()
    drawn = [model(input_ids=tokens).logits for _ in range(2)]
    assert not torch.equal(*drawn)  # dropout before the adapters, in training


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 128, "do_layer_norm_before": True}),
        ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 512}),
        ("jamba", None),
    ],
)
def test_merged_adapters_of_a_backbone_compute_what_the_adapters_did(name, changes):
    """Positions that are looked up by a mask and states of mixers have none."""
    model = tiny(name) if changes is None else dense_model(name, **changes)
    tuner = adapt(model.eval(), Lora(roles=("backbone",), rank=2), Evidence())
    model(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)[..., 5].sum().backward()
    added = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert added and not any("embed_positions" in n or "A_log" in n for n in added)
    without = {n.split(".")[-4] for n, p in added.items() if p.grad is None}
    assert without == ({"dt_proj"} if name == "jamba" else set())  # whose weight Mamba reads itself
    with torch.no_grad():
        for parameter in (p for p in added.values() if p.grad is not None):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        plain = model(input_ids=TOKENS, use_cache=False).logits
        merged = merge(tuner)(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(merged, plain, rtol=1e-4, atol=1e-4)


def test_adapters_that_would_change_more_than_they_name_are_refused():
    with pytest.raises(StageFailed, match="head of this llama is tied to its embedding"):
        adapt(dense_model("llama"), Lora(roles=("head",), rank=2), Evidence())
    with pytest.raises(StageFailed, match="lora.dropout: cannot act on .*no linear layer"):
        adapt(tiny("mixtral"), Lora(roles=("expert",), rank=2, dropout=0.1), Evidence())
