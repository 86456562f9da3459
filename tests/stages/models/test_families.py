import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.errors import BadInput
from stages.models.families import FAMILIES, family, roles
from stages.models.tiny import tiny_model, tiny_tokenizer


def meta_model(model_type: str, **fields):
    config = AutoConfig.for_model(model_type, **{"num_hidden_layers": 2} | fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_every_part_of_a_model_with_dense_and_sparse_layers_has_its_role():
    model = tiny_model("qwen2_moe", tiny_tokenizer(), seed=0)
    found = {n: r for n, r in roles(model).items() if ".layers.0." in n or ".layers.1." in n}
    attention = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight")
    backbone = [f"self_attn.{name}" for name in (*attention, "v_proj.bias", "o_proj.weight")]
    backbone += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    expected = {f"model.layers.{i}.{name}": "backbone" for i in (0, 1) for name in backbone}
    for name in ("gate_proj", "up_proj", "down_proj"):
        expected[f"model.layers.0.mlp.{name}.weight"] = "backbone"
        expected[f"model.layers.1.mlp.shared_expert.{name}.weight"] = "shared_expert"
    expected["model.layers.1.mlp.gate.weight"] = "router"
    expected["model.layers.1.mlp.experts.gate_up_proj"] = "expert"
    expected["model.layers.1.mlp.experts.down_proj"] = "expert"
    expected["model.layers.1.mlp.shared_expert_gate.weight"] = "shared_expert_gate"
    assert found == expected
    assert roles(model)["model.embed_tokens.weight"] == "embedding"
    assert roles(model)["model.norm.weight"] == "backbone"


def test_an_untied_head_has_a_role_of_its_own():
    assert roles(meta_model("olmoe"))["lm_head.weight"] == "head"
    assert roles(meta_model("gpt_neox"))["lm_head.weight"] == "head"


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_each_family_finds_its_parts_in_the_model_that_transformers_builds(name):
    model = meta_model(name)
    found = set(roles(model).values())
    entry = FAMILIES[name]
    assert "embedding" in found and "backbone" in found
    assert {"router", "expert"} <= found if entry.is_moe else not {"router", "expert"} & found
    routers = entry.modules(model, "router")
    layers = tuple(int(path.split(".")[2]) for path in routers)
    assert layers == entry.sparse_layers(model.config.to_dict())
    for router in routers.values():
        assert router.weight.shape[0] == getattr(model.config, entry.num_experts)
        assert router.top_k == getattr(model.config, entry.top_k)
    for experts in entry.modules(model, "expert").values():
        assert {p.shape[0] for p in experts.parameters()} == {
            getattr(model.config, entry.num_experts)
        }


@pytest.mark.parametrize("name", sorted(n for n, entry in FAMILIES.items() if entry.is_moe))
def test_the_auxiliary_loss_is_added_to_the_loss_with_the_configured_weight(name):
    shape = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 50, "pad_token_id": 0}
    config = AutoConfig.for_model(
        name, **shape, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokens = torch.arange(1, 21)[None]
    plain = model(tokens, labels=tokens)
    both = model(tokens, labels=tokens, output_router_logits=True)
    assert FAMILIES[name].auxiliary_loss == (both.aux_loss is not None)
    weighted = plain.loss + config.router_aux_loss_coef * both.aux_loss
    torch.testing.assert_close(both.loss, weighted)


def test_qwen2_moe_sparse_layers_follow_both_configuration_fields():
    config = {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert FAMILIES["qwen2_moe"].sparse_layers(config) == (1, 5, 7)


def test_an_unknown_architecture_is_refused_with_the_nearest_known_one():
    with pytest.raises(BadInput, match=r"'mixtrall' is not .* \(nearest: mixtral\)"):
        family({"model_type": "mixtrall"})


def test_a_layout_that_the_entry_does_not_fit_is_refused():
    model = tiny_model("mixtral", tiny_tokenizer(), seed=0)
    for layer in model.model.layers:
        layer.mlp.scorer = layer.mlp.gate
        del layer.mlp.gate
    with pytest.raises(BadInput, match=r"mixtral: no module model\.layers\.\*\.mlp\.gate"):
        roles(model)
