import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from stages.errors import BadInput
from stages.models.families import FAMILIES, family
from stages.models.load import auto_class
from stages.models.roles import roles
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY
from stages.models.unsupported import NO_FAMILY

TOKENIZER = tiny_tokenizer()


def meta_model(model_type: str, **fields):
    fields = {name: 4 for name in FAMILIES[model_type].layer_counts} | fields
    config = AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        return auto_class(config).from_config(config)


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


LISTED = ("deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "exaone_moe", "mimo_v2_flash", "hy_v3",
          "laguna", "mellum", "cohere2_moe", "axk1", "axk2",
          "bailing_hybrid", "kimi_linear")  # fmt: skip


@pytest.mark.parametrize("fields", [{}, {"first_k_dense_replace": 2}])
@pytest.mark.parametrize("name", LISTED)
def test_layers_that_a_raw_configuration_does_not_list_are_those_of_transformers(name, fields):
    """Some read the number of dense layers, others always have their own."""
    raw = {"model_type": name, "num_hidden_layers": 5, **fields}
    kinds = AutoConfig.for_model(**raw).mlp_layer_types
    expected = tuple(i for i, kind in enumerate(kinds) if kind == "sparse")
    assert FAMILIES[name].sparse_layers(raw) == expected
    reads = name in ("deepseek_v32", "glm_moe_dsa", "exaone_moe", "cohere2_moe", "axk1",
                     "axk2", "bailing_hybrid", "kimi_linear")  # fmt: skip
    assert not (reads and fields) or expected == (2, 3, 4)


@pytest.mark.parametrize("name", ["axk1", "axk2"])
def test_ax_has_experts_in_every_so_manyth_layer_after_the_dense_ones(name):
    raw = {"num_hidden_layers": 9, "first_k_dense_replace": 3, "moe_layer_freq": 2}
    kinds = AutoConfig.for_model(name, **raw).mlp_layer_types
    assert [i for i, kind in enumerate(kinds) if kind == "sparse"] == [4, 6, 8]
    assert FAMILIES[name].sparse_layers(raw) == (4, 6, 8)


@pytest.mark.parametrize("dense", [None, [], [2]])
def test_the_first_two_layers_of_flint_are_dense_where_it_is_not_told_which(dense):
    raw = {"num_hidden_layers": 4, "mlp_only_layers": dense}
    blocks = meta_model("flint", **raw).model.layers
    expected = tuple(i for i, layer in enumerate(blocks) if hasattr(layer.mlp, "experts"))
    assert expected == {"None": (2, 3), "[]": (0, 1, 2, 3), "[2]": (0, 1, 3)}[str(dense)]
    assert FAMILIES["flint"].sparse_layers(raw) == expected


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_each_family_finds_its_parts_in_the_model_that_transformers_builds(name):
    model = tiny_model(name, TOKENIZER, seed=0) if name in TINY else meta_model(name)
    found = set(roles(model).values())
    entry = FAMILIES[name]
    assert "embedding" in found and "backbone" in found
    assert {"router", "expert"} <= found if entry.is_moe else not {"router", "expert"} & found
    assert ("shared_expert" in found) == bool(entry.shared_expert)
    assert ("shared_expert_gate" in found) == bool(entry.shared_expert_gate)
    assert entry.encoder_decoder == model.config.is_encoder_decoder
    experts, _ = entry.experts_of(model.config.to_dict())
    for module in entry.modules(model, "expert").values():
        if isinstance(module, torch.nn.ModuleDict):
            assert [name for name in module if name.startswith("expert_")] == [
                f"expert_{number}" for number in range(experts)
            ]
        else:
            assert {p.shape[0] for p in module.parameters()} == {experts}


@pytest.mark.parametrize("name", sorted(n for n in TINY if FAMILIES[n].is_moe))
def test_the_registry_says_what_a_router_returns_and_how_experts_are_called(name):
    entry, model = FAMILIES[name], tiny_model(name, TOKENIZER, seed=0)
    config, routed, called = model.config.to_dict(), {}, {}
    experts, top_k = entry.experts_of(config)
    for path, module in entry.modules(model, "router").items():
        module.register_forward_hook(lambda m, _, out, path=path: routed.update({path: out}))
    for path, module in entry.modules(model, "expert").items():
        module.register_forward_hook(lambda m, args, _, path=path: called.update({path: args}))
    tokens = torch.randint(3, 259, (1, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(tokens, labels=tokens, use_cache=False)
    assert len(routed) == len(entry.modules(model, "router")) >= len(entry.sparse_layers(config))
    for out in routed.values():
        logits = out[entry.logits].reshape(-1, experts)
        assert logits.shape == (5, experts)
        assert (logits < 0).any()  # raw, neither softmax nor sigmoid
        if entry.index is None:
            continue
        weights, index = out[entry.weights].float(), out[entry.index]
        assert weights.shape == index.shape == (5, top_k)
        normalised = entry.normalised
        if isinstance(normalised, str):
            normalised = config[normalised]
        scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid()}
        scores = scores.get(entry.scores, logits.softmax(-1)).gather(1, index)
        if entry.scores != "sparsemixer":
            if normalised:
                scores = scores / scores.sum(-1, keepdim=True)
            scale = weights.sum() / scores.sum()
            torch.testing.assert_close(weights, scale * scores, rtol=1e-4, atol=1e-6)
    if entry.index is not None:
        for path, (hidden, index, weights) in called.items():
            assert hidden.shape == (5, model.config.hidden_size)
            router = routed[next(r for r in routed if path.rpartition(".")[0] in r)]
            assert torch.equal(index, router[entry.index])
            assert torch.equal(weights, router[entry.weights].to(weights.dtype))


@pytest.mark.parametrize("name", sorted(n for n in TINY if FAMILIES[n].is_moe))
def test_logits_in_bfloat16_are_near_to_those_in_full_precision(name):
    model = tiny_model(name, TOKENIZER, seed=0).eval()
    tokens = torch.randint(3, 259, (1, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(tokens, labels=tokens, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(tokens, labels=tokens, use_cache=False).logits
    assert half.dtype == torch.bfloat16
    assert 0 < (half.float() - full).norm() / full.norm() < 0.1


@pytest.mark.parametrize("name", sorted(n for n in TINY if FAMILIES[n].is_moe))
def test_the_auxiliary_loss_is_the_one_that_the_model_adds_to_its_loss(name):
    model = tiny_model(name, TOKENIZER, seed=0)
    tokens = torch.arange(3, 27)[None]
    plain = model(tokens, labels=tokens, use_cache=False)
    both = model(tokens, labels=tokens, use_cache=False, output_router_logits=True)
    known = [field for field in both if field.endswith("aux_loss") and both[field] is not None]
    assert sorted(FAMILIES[name].auxiliary_loss) == sorted(known)
    if known:
        config = model.config
        weight = getattr(config, "router_aux_loss_coef", None) or config.aux_loss_coef
        added = weight * sum(both[field] for field in known)
        if "encoder_z_loss" in both:
            added += config.router_z_loss_coef * (both.encoder_z_loss + both.decoder_z_loss)
        torch.testing.assert_close(both.loss, plain.loss + added)


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


LANGUAGE_MODELS = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
                   *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}


def times_experts_are_named(model_type: str) -> int:
    """In the modelling code of an architecture; a comment or two name them elsewhere too."""
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
    return sum(len(re.findall("expert", file.read_text(), re.IGNORECASE))
               for file in folder.glob("modeling_*.py"))


def test_every_language_model_of_transformers_with_experts_is_known_or_refused_with_a_reason():
    """A new version of transformers may have more; each needs an entry or a reason."""
    found = {name for name in LANGUAGE_MODELS if times_experts_are_named(name) > 5}
    assert len(found) > 50
    assert sorted(found - FAMILIES.keys() - NO_FAMILY.keys()) == []
    assert not FAMILIES.keys() & NO_FAMILY.keys()


def test_what_is_refused_is_there_and_what_has_no_class_has_none():
    assert sorted(NO_FAMILY.keys() - CONFIG_MAPPING_NAMES.keys()) == []
    for name, reason in NO_FAMILY.items():
        assert times_experts_are_named(name) > 5, name
        if reason.startswith("AutoModelForCausalLM"):
            assert name not in LANGUAGE_MODELS, name


def test_an_architecture_that_is_refused_says_why():
    with pytest.raises(BadInput, match="model_type 'qwen3_5_moe' is refused: it reads images or "
                                       "sounds too.*alone is known, as qwen3_5_moe_text; choose"):
        family({"model_type": "qwen3_5_moe"})
    with pytest.raises(BadInput, match="'dbrx' is refused: its router returns raw scores alone"):
        family({"model_type": "dbrx"})
