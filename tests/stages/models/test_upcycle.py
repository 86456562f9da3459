import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from stages.errors import StageFailed
from stages.models import targets, twin
from stages.models.card import ModelCard
from stages.models.spec import UpcycleSpec
from stages.models.stage import run
from stages.models.tiny import CHAT_TEMPLATE
from tests.stages.models.tiny_folders import dense_folder, llama_folder, logits, plain, save

SOME, ALL = (1, 3), "all"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("dense"))


def upcycled(dense, folder, **fields):
    folder.mkdir()
    run(UpcycleSpec(**fields), {"dense": dense}, folder)
    return folder


@pytest.mark.parametrize("layers", [SOME, ALL])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "head_dim": 24, "rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "hidden_act": "gelu"},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ],
)
def test_the_function_of_the_dense_model_is_kept(tmp_path, layers, changes):
    dense = llama_folder(tmp_path / "dense", **changes)
    moe = upcycled(dense, tmp_path / "moe", layers=layers, noise=0)
    assert ModelCard.read(moe).notes["logit_difference"] < 1e-5
    assert (logits(moe) - logits(dense)).abs().max() < 1e-5
    assert logits(dense).std() > 0.1  # it is a function worth keeping


def test_some_layers_make_a_qwen2_moe_and_all_a_mixtral(dense, tmp_path):
    some = ModelCard.read(upcycled(dense, tmp_path / "some", layers=SOME, experts=3))
    every = ModelCard.read(upcycled(dense, tmp_path / "all", layers=ALL, experts=3))
    assert (some.family, some.moe_layers, some.experts) == ("qwen2_moe", SOME, 3)
    assert (every.family, every.moe_layers, every.experts) == ("mixtral", (0, 1, 2, 3), 3)
    base = ModelCard.read(dense)
    block, router, zeros = 3 * 64 * 128, 3 * 64, 3 * 64 + 64  # zeros: shared expert and its gate
    added = 2 * (router + zeros)
    assert some.total_parameters - base.total_parameters == 2 * 2 * block + added
    assert some.active_parameters - base.active_parameters == 2 * block + added
    assert every.total_parameters - base.total_parameters == 4 * (2 * block + router)
    assert every.flops_per_token - base.flops_per_token == 2 * 4 * (block + router)
    assert some.origin == "upcycled from test: 3 experts (copies), top-2, in layers 1, 3"


@pytest.mark.parametrize("layers", [SOME, ALL])
def test_noise_has_the_stated_size_on_each_matrix_of_each_expert_and_nowhere_else(
    dense, tmp_path, layers
):
    model = plain(dense)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight *= 5  # so that a rule for the fused pair would show
    dense = save(model, tmp_path / "dense")
    exact = plain(upcycled(dense, tmp_path / "exact", layers=layers, noise=0)).state_dict()
    noisy = plain(upcycled(dense, tmp_path / "noisy", layers=layers, noise=0.05)).state_dict()
    changed = {name for name in exact if not torch.equal(exact[name], noisy[name])}
    indices = range(4) if layers == ALL else layers
    fused = ("gate_up_proj", "down_proj")
    assert changed == {f"model.layers.{i}.mlp.experts.{name}" for i in indices for name in fused}
    for name in changed:
        for before, after in zip(exact[name], noisy[name], strict=True):
            parts = 2 if "gate_up" in name else 1
            for b, a in zip(before.chunk(parts), after.chunk(parts), strict=True):
                assert ((a - b).std() / b.std()).item() == pytest.approx(0.05, rel=0.05)
        assert len({expert.sum().item() for expert in noisy[name]}) == 4


def test_the_card_states_what_the_noise_did(dense, tmp_path):
    notes = ModelCard.read(upcycled(dense, tmp_path / "moe", layers=SOME, noise=0.05)).notes
    assert notes["noise"] == "Gaussian, 0.05 of each matrix's own standard deviation, seed 0"
    assert notes["logit_difference_measured"] == "as routed"
    assert notes["logit_difference"] < 1e-5 < 1e-2 < notes["logit_difference_of_twin"]
    exact = ModelCard.read(upcycled(dense, tmp_path / "exact", layers=SOME, noise=0)).notes
    assert exact["loss_of_twin"] == pytest.approx(exact["loss_of_dense"], abs=1e-5)
    assert notes["loss_of_twin"] != pytest.approx(notes["loss_of_dense"], abs=1e-5)
    assert "noise" not in exact


def test_routers_are_drawn_with_the_initializer_range_and_differ_between_layers(tmp_path):
    dense = llama_folder(tmp_path / "dense", initializer_range=0.05)
    state = plain(upcycled(dense, tmp_path / "moe", experts=16)).state_dict()
    routers = [state[f"model.layers.{i}.mlp.gate.weight"] for i in range(4)]
    assert torch.cat(routers).std().item() == pytest.approx(0.05, rel=0.05)
    assert len({router.sum().item() for router in routers}) == 4


def test_the_same_seed_gives_the_same_file_and_another_seed_another(dense, tmp_path):
    one, two, other = (
        (upcycled(dense, tmp_path / name, layers=SOME, seed=seed) / "model.safetensors")
        for name, seed in (("one", 5), ("two", 5), ("other", 6))
    )
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()


def test_noise_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        noisy = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(0)
            matrix = torch.randn(8 * 1024, 256, generator=generator)
            twin.add_noise(matrix, 0.01, generator, torch.ones(256))
            noisy.append(matrix)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(noisy[0], noisy[1]) and torch.equal(noisy[0], noisy[2])


def test_the_zero_shared_expert_gets_no_gradient_and_the_router_does(dense, tmp_path):
    model = plain(upcycled(dense, tmp_path / "moe", layers=SOME))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens = torch.arange(3, 103)[None]
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "shared_expert" in name:
            assert not parameter.any() and not parameter.grad.any(), name
        elif name.endswith("mlp.gate.weight"):
            assert parameter.grad.norm() > 1e-5, name


def test_tokens_generation_and_chat_are_carried_over(tmp_path):
    dense = llama_folder(tmp_path / "dense", bos_token_id=7, eos_token_id=8, pad_token_id=9)
    GenerationConfig(temperature=0.25, do_sample=True, eos_token_id=[8, 2]).save_pretrained(dense)
    for layers in (SOME, ALL):
        moe = upcycled(dense, tmp_path / str(layers), layers=layers)
        model = plain(moe)
        config = model.config
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (7, 8, 9)
        assert config.max_position_embeddings == 512
        generation = model.generation_config
        assert (generation.temperature, generation.eos_token_id) == (0.25, [8, 2])
        assert AutoTokenizer.from_pretrained(moe).chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"attention_bias": True}, "upcycle: its dense model has attention_bias"),
        ("llama", {"mlp_bias": True}, "upcycle: its dense model has mlp_bias"),
        ("gpt2", {"num_key_value_heads": 4}, "is of the gpt2 architecture; only llama, mistral"),
        ("olmo", {"num_key_value_heads": 4}, "is of the olmo architecture; only llama, mistral"),
    ],
)
def test_a_dense_model_without_a_twin_is_refused(tmp_path, family, changes, reason):
    dense = dense_folder(tmp_path / "dense", family, **changes)
    with pytest.raises(StageFailed, match=reason):
        upcycled(dense, tmp_path / "moe")
    assert not (tmp_path / "moe" / "card.json").exists()


def test_a_twin_that_computes_something_else_is_refused(dense, tmp_path, monkeypatch):
    forgotten = tuple(name for name in targets.SHARED_CONFIG if name != "rope_parameters")
    monkeypatch.setattr(targets, "SHARED_CONFIG", forgotten)
    with pytest.raises(StageFailed, match=r"logits differ from the dense model's by \d"):
        upcycled(dense, tmp_path / "moe", layers=ALL)


def test_the_largest_difference_over_all_texts_counts_and_nan_is_refused():
    zeros = [torch.zeros(1, 2, 3), torch.zeros(1, 4, 3)]
    near = [torch.full((1, 2, 3), 1e-4), torch.full((1, 4, 3), -9e-4)]
    assert twin.require_same_function(near, zeros) == pytest.approx(9e-4)
    with pytest.raises(StageFailed, match="differ from the dense model's by 0.002 "):
        twin.require_same_function([near[0], near[1] - 1.1e-3], zeros)
    with pytest.raises(StageFailed, match="differ from the dense model's by nan"):
        twin.require_same_function([zeros[0], zeros[1] + float("nan")], zeros)
