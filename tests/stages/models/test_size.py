import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralForCausalLM

from stages.models.families import family
from stages.models.size import measure
from stages.models.tiny import tiny_model, tiny_tokenizer

# The tiny models: hidden size, feed-forward neurons, layers, width of keys and values, vocabulary.
D, F, L, KV, V = 64, 128, 4, 32, 259
ATTENTION = 2 * D * D + 2 * D * KV
NORMS = (2 * L + 1) * D


def card(name):
    return measure(tiny_model(name, tiny_tokenizer(), seed=0), "test")


def test_dense_counts_by_hand():
    found = card("llama")
    products = L * (ATTENTION + 3 * D * F)
    assert found.total_parameters == found.active_parameters == products + NORMS + V * D
    assert found.flops_per_token == 2 * (products + V * D)
    assert (found.architecture, found.experts, found.moe_layers) == ("dense", 0, ())


def test_mixtral_counts_by_hand():
    found = card("mixtral")
    per_layer = ATTENTION + 4 * D  # 4 experts to route to
    assert found.total_parameters == L * (per_layer + 4 * 3 * D * F) + NORMS + V * D
    assert found.active_parameters == L * (per_layer + 2 * 3 * D * F) + NORMS + V * D
    assert found.flops_per_token == 2 * (L * (per_layer + 2 * 3 * D * F) + V * D)
    assert (found.architecture, found.experts, found.top_k) == ("moe", 4, 2)
    assert found.moe_layers == (0, 1, 2, 3)


def test_qwen2_moe_counts_by_hand():
    found = card("qwen2_moe")
    dense = 3 * D * F
    sparse = (
        4 * D + D + 3 * D * 64
    )  # router, gate of the shared expert, shared expert of 64 neurons
    biases = L * (D + 2 * KV)
    shared = L * ATTENTION + 2 * dense + 2 * sparse
    assert found.total_parameters == shared + 2 * 4 * 3 * D * 64 + NORMS + biases + V * D
    assert found.active_parameters == shared + 2 * 2 * 3 * D * 64 + NORMS + biases + V * D
    assert found.flops_per_token == 2 * (shared + 2 * 2 * 3 * D * 64 + V * D)
    assert found.moe_layers == (1, 3)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe"])
def test_operations_agree_with_those_that_torch_counts(name):
    model = tiny_model(name, tiny_tokenizer(), seed=0)
    # The counter knows matrix products only, not fused attention or grouped products.
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    length = 48
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None])
    scores = L * 2 * 2 * length * length * D  # queries x keys, then weights x values
    assert counter.get_total_flops() == length * card(name).flops_per_token + scores


@pytest.mark.parametrize("top_k", [1, 3])
def test_another_number_of_experts_per_token(top_k):
    """The tiny Mixtral has 526,720 operations per token with its two experts."""
    model = tiny_model("mixtral", tiny_tokenizer(), seed=0)
    found = measure(model, "test", top_k=top_k)
    per_expert = 2 * L * 3 * D * F
    assert card("mixtral").flops_per_expert == per_expert
    assert found.flops_per_token == 526_720 + (top_k - 2) * per_expert
    assert found.top_k == top_k and found.total_parameters == card("mixtral").total_parameters


READ, WRITTEN = 40, 12


@pytest.mark.parametrize("name", ["t5", "switch_transformers", "nllb-moe"])
def test_an_encoder_decoders_tokens_pass_one_stack_each(name):
    """As torch counts them: keys and values of the cross-attention are those of tokens read."""
    model = tiny_model(name, tiny_tokenizer(), seed=0)
    model.set_attn_implementation("eager")
    if name == "switch_transformers":  # an expert takes all tokens, none is left out
        for module in family(model).modules(model, "router").values():
            module.expert_capacity = READ
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(READ)[None], decoder_input_ids=torch.arange(WRITTEN)[None])
    stacks, pairs = 2, READ * READ + WRITTEN * WRITTEN + READ * WRITTEN
    scores = stacks * 2 * 2 * pairs * D  # queries x keys, then weights x values
    found = card(name)
    assert counter.get_total_flops() == found.flops(READ, WRITTEN) + scores
    # Not both stacks for every token.
    assert found.flops(120, 4) < 0.5 * 124 * found.flops_per_token


def test_an_untied_head_counts_once_and_its_embedding_not():
    model = tiny_model("llama", tiny_tokenizer(), seed=0)
    config = type(model.config).from_dict(model.config.to_dict() | {"tie_word_embeddings": False})
    untied = measure(type(model)(config), "test")
    assert untied.total_parameters == card("llama").total_parameters + V * D
    assert untied.flops_per_token == card("llama").flops_per_token


def test_shapes_alone_are_enough():
    config = tiny_model("mixtral", tiny_tokenizer(), seed=0).config
    with torch.device("meta"):
        assert measure(MixtralForCausalLM(config), "test") == card("mixtral")
