"""Upcycling of each dense architecture, by whole copies and by splits."""

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from stages.errors import StageFailed
from stages.models.card import ModelCard
from stages.models.dense import DENSE
from stages.models.families import FAMILIES
from stages.models.roles import roles
from stages.models.spec import EveryNth, LastN, UpcycleSpec
from stages.models.stage import run
from stages.models.tiny import CHAT_TEMPLATE
from tests.stages.models.tiny_folders import dense_folder, logits, plain

SOME, ALL = (1, 3), "all"
CASES = [
    *((name, layers) for name in ("llama", "qwen2", "qwen3", "gpt_neox") for layers in (SOME, ALL)),
    ("mistral", SOME),
    ("olmo2", ALL),
]
TEXT = [name for name in DENSE if FAMILIES[name].modality == "text"]
BECOMES = {
    ("llama", SOME): "qwen2_moe",
    ("llama", ALL): "mixtral",
    ("mistral", SOME): "qwen2_moe",
    ("olmo2", ALL): "flex_olmo",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    return {name: dense_folder(root / name, name) for name in TEXT}


def upcycled(dense, folder, **fields):
    folder.mkdir()
    run(UpcycleSpec(**fields), {"dense": dense}, folder)
    return folder


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_copies_keep_the_function_in_the_architecture_chosen_for_it(
    folders, tmp_path, name, layers
):
    moe = upcycled(folders[name], tmp_path / "moe", layers=layers, noise=0, top_k=3)
    card = ModelCard.read(moe)
    expected = BECOMES.get((name, layers), f"{name}_moe")
    assert (card.family, plain(moe).config.model_type) == (expected, expected)
    assert card.moe_layers == (SOME if layers == SOME else (0, 1, 2, 3))
    assert (card.experts, card.top_k) == (4, 3)
    assert card.notes["logit_difference"] < 1e-5
    assert card.notes["logit_difference_of_twin"] == card.notes["logit_difference"]
    assert (logits(moe) - logits(folders[name])).abs().max() < 1e-5
    assert logits(folders[name]).std() > 0.1  # it is a function worth keeping


@pytest.mark.parametrize(("name", "layers"), CASES)
@pytest.mark.parametrize("kind", ["random_split", "clustered_split"])
def test_a_split_with_all_experts_at_even_weights_is_the_dense_function(
    folders, tmp_path, name, layers, kind
):
    fields = {"experts": 8, "layers": layers, "experts_from": kind}
    exact = upcycled(folders[name], tmp_path / "all", top_k=8, router="zero", **fields)
    assert (logits(exact) - logits(folders[name])).abs().max() < 1e-5
    card = ModelCard.read(exact)
    assert card.notes["logit_difference_of_twin"] < 1e-5
    # Of the experts chosen, K / E of the neurons are computed; nothing is duplicated.
    dense, few = (
        ModelCard.read(folders[name]),
        ModelCard.read(upcycled(folders[name], tmp_path / "few", top_k=2, **fields)),
    )
    matrices = 2 if name == "gpt_neox" else 3
    count = 2 if layers == SOME else 4
    skipped = count * matrices * 64 * 128 * 6 // 8
    routers = count * 8 * 64
    shared = count * (3 * 64 + 64) if few.family == "qwen2_moe" else 0
    assert few.flops_per_token == dense.flops_per_token - 2 * (skipped - routers - shared)
    biases = count * (7 * 64) if name == "gpt_neox" else 0  # one output bias per expert
    assert few.total_parameters == dense.total_parameters + routers + shared + biases
    if name != "gpt_neox":
        expected = dense.active_parameters - skipped + routers + shared
        assert few.active_parameters == expected
    assert few.notes["logit_difference"] < 1e-5
    assert few.notes["logit_difference_measured"] == "with all experts at even weights"
    assert few.notes["logit_difference_of_twin"] > 0.05


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_roles_find_routers_and_experts(folders, tmp_path, name, layers):
    model = plain(upcycled(folders[name], tmp_path / "moe", layers=layers))
    sparse = SOME if layers == SOME else range(4)
    root = "gpt_neox" if name == "gpt_neox" else "model"
    found = roles(model)
    assert {n for n, r in found.items() if r == "router"} == {
        f"{root}.layers.{i}.mlp.gate.weight" for i in sparse
    }
    experts = {n for n, r in found.items() if r == "expert"}
    assert {n.rpartition(".")[0] for n in experts} == {
        f"{root}.layers.{i}.mlp.experts" for i in sparse
    }
    per_layer = 4 if name == "gpt_neox" else 2
    assert len(experts) == per_layer * len(sparse)


@pytest.mark.parametrize("name", sorted(TEXT))
def test_what_is_not_weights_is_carried_over(tmp_path, name):
    dense = dense_folder(
        tmp_path / "dense", name, bos_token_id=7, eos_token_id=8, pad_token_id=9
    )
    GenerationConfig(temperature=0.25, do_sample=True, eos_token_id=[8, 2]).save_pretrained(dense)
    moe = upcycled(dense, tmp_path / "moe")
    config, generation = plain(moe).config, plain(moe).generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (7, 8, 9)
    assert config.max_position_embeddings == 512
    assert (generation.temperature, generation.eos_token_id) == (0.25, [8, 2])
    assert AutoTokenizer.from_pretrained(moe).chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("name", "layers", "changes"),
    [
        ("mistral", ALL, {"sliding_window": 8}),
        ("qwen3", SOME, {"attention_bias": True}),
        ("qwen3", SOME, {"head_dim": 24, "tie_word_embeddings": False}),
        (
            "qwen3",
            ALL,
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        ),
        ("qwen2", SOME, {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
        ("olmo2", ALL, {"attention_bias": True, "tie_word_embeddings": False}),
        ("gpt_neox", SOME, {"use_parallel_residual": False, "hidden_act": "relu"}),
        ("gpt_neox", SOME, {"attention_bias": False, "tie_word_embeddings": False}),
        (
            "gpt_neox",
            ALL,
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 300.0,
                    "partial_rotary_factor": 0.5,
                }
            },
        ),
    ],
)
def test_variants_of_an_architecture_keep_their_function(tmp_path, name, layers, changes):
    dense = dense_folder(tmp_path / "dense", name, **changes)
    moe = upcycled(dense, tmp_path / "moe", layers=layers, noise=0)
    assert (logits(moe) - logits(dense)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "layers", "changes", "reason"),
    [
        ("mistral", SOME, {"sliding_window": 8}, "window of 8 in some layers, which qwen2_moe"),
        (
            "qwen3",
            ALL,
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "window of 8 in some layers, which qwen3_moe",
        ),
        (
            "qwen2",
            ALL,
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "window of 8 in some layers, which qwen2_moe",
        ),
        ("olmo2", SOME, {}, "upcycle.layers: no architecture has the norms of olmo2 and both"),
    ],
)
def test_what_no_architecture_computes_is_refused(tmp_path, name, layers, changes, reason):
    dense = dense_folder(tmp_path / "dense", name, **changes)
    with pytest.raises(StageFailed, match=reason):
        upcycled(dense, tmp_path / "moe", layers=layers)


def test_layers_are_chosen_by_rule(folders, tmp_path):
    for rule, layers in ((EveryNth(every=2), (1, 3)), (LastN(last=3), (1, 2, 3))):
        card = ModelCard.read(upcycled(folders["llama"], tmp_path / str(rule), layers=rule))
        assert (card.family, card.moe_layers) == ("qwen2_moe", layers)
        assert card.origin.endswith(f"in layers {', '.join(map(str, layers))}")
    whole = ModelCard.read(upcycled(folders["llama"], tmp_path / "whole", layers=LastN(last=4)))
    assert (whole.family, whole.moe_layers) == ("mixtral", (0, 1, 2, 3))


def test_the_card_says_what_loads_the_projects_own_architecture(folders, tmp_path):
    neox = ModelCard.read(upcycled(folders["gpt_neox"], tmp_path / "neox"))
    assert neox.notes["loading"].startswith("import stages.models.gpt_neox_moe before")
    assert "loading" not in ModelCard.read(upcycled(folders["llama"], tmp_path / "llama")).notes


def test_a_token_takes_the_experts_that_its_router_scores_highest(folders, tmp_path):
    """The upcycled GPT-NeoX against the sum written out, layer by layer of one token."""
    model = plain(upcycled(folders["gpt_neox"], tmp_path / "moe", noise=0.5, top_k=2))
    block = model.gpt_neox.layers[1].mlp
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    output = block(x[None])[0]
    for token, value in zip(x, output, strict=True):
        scores = block.gate.weight @ token
        best = scores.argsort(descending=True)[:2]
        weights = scores[best].exp() / scores[best].exp().sum()
        expected = torch.zeros(64)
        for weight, e in zip(weights, best, strict=True):
            inner = block.experts.up_proj[e] @ token + block.experts.up_proj_bias[e]
            outer = block.experts.down_proj[e] @ torch.nn.functional.gelu(inner)
            expected += weight * (outer + block.experts.down_proj_bias[e])
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
