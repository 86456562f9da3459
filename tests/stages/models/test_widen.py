import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from stages.models import widen
from stages.models.card import ModelCard
from stages.models.dense import DENSE
from stages.models.load import load, load_tokenizer
from stages.models.spec import UpcycleSpec, WidenSpec
from stages.models.stage import run
from stages.models.tiny import CHAT_TEMPLATE
from tests.stages.models.tiny_folders import (
    dense_folder,
    dense_model,
    llama_folder,
    logits,
    plain,
    save,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("dense"))


def made(spec, dense, folder):
    folder.mkdir()
    run(spec, {"dense": dense}, folder)
    return folder


@pytest.mark.parametrize(
    ("layers", "top_k", "neurons"),
    [((1, 3), 2, 128 + 64), ((0,), 2, 128 + 32), ("all", 2, 256), ("all", 4, 512), ((2,), 1, 128)],
)
def test_the_function_is_kept_with_the_neurons_that_the_moe_twin_activates(
    dense, tmp_path, layers, top_k, neurons
):
    wide = made(WidenSpec(layers=layers, top_k=top_k, noise=0), dense, tmp_path / "wide")
    assert plain(wide).config.intermediate_size == neurons
    assert ModelCard.read(wide).notes["logit_difference"] < 1e-5
    assert (logits(wide) - logits(dense)).abs().max() < 1e-5


@pytest.mark.parametrize("layers", [(1, 3), "all"])
def test_activated_operations_match_the_moe_twin_but_for_its_routers(dense, tmp_path, layers):
    wide = ModelCard.read(made(WidenSpec(layers=layers), dense, tmp_path / "wide"))
    moe = ModelCard.read(made(UpcycleSpec(layers=layers), dense, tmp_path / "moe"))
    # 4 experts; a shared expert of one zero neuron and its gate where only some layers are sparse.
    routers = 4 * 4 * 64 if layers == "all" else 2 * (4 * 64 + 3 * 64 + 64)
    assert moe.flops_per_token - wide.flops_per_token == 2 * routers
    assert wide.notes["flops_per_token_beyond_moe_without_routers"] == 0
    assert (wide.architecture, wide.total_parameters) == ("dense", wide.active_parameters)


def test_the_rest_of_a_rounded_neuron_is_stated(dense, tmp_path):
    # One layer of three, 100 neurons: 33 are added to each instead of 33 1/3.
    dense = llama_folder(tmp_path / "dense", num_hidden_layers=3, intermediate_size=100)
    card = ModelCard.read(made(WidenSpec(layers=(0,)), dense, tmp_path / "wide"))
    assert card.notes["neurons_added_per_layer"] == 33
    assert card.notes["flops_per_token_beyond_moe_without_routers"] == -1 * 3 * 64 * 2
    assert card.flops_per_token == ModelCard.read(dense).flops_per_token + 3 * 33 * 3 * 64 * 2


def test_copies_halve_their_down_projection_and_are_chosen_anew_in_each_layer(dense, tmp_path):
    before = plain(dense).state_dict()
    after = plain(made(WidenSpec(layers=(1, 3), noise=0), dense, tmp_path / "w")).state_dict()
    chosen = []
    for layer in range(4):
        gate, up, down = (
            f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
        )
        copied = [
            int((before[gate] == row).all(dim=1).nonzero().item()) for row in after[gate][128:]
        ]
        assert len(set(copied)) == 64
        assert torch.equal(after[up][128:], before[up][copied])
        halves = before[down].clone()
        halves[:, copied] /= 2
        assert torch.equal(after[down], torch.cat([halves, halves[:, copied]], dim=1))
        chosen.append(tuple(copied))
    assert len(set(chosen)) == 4


def test_noise_has_the_stated_size_on_feed_forward_matrices_only(dense, tmp_path):
    exact = plain(made(WidenSpec(noise=0), dense, tmp_path / "exact")).state_dict()
    noisy = plain(made(WidenSpec(noise=0.05), dense, tmp_path / "noisy")).state_dict()
    changed = {name for name in exact if not torch.equal(exact[name], noisy[name])}
    assert changed == {name for name in exact if ".mlp." in name}
    for name in changed:
        ratio = (noisy[name] - exact[name]).std() / exact[name].std()
        assert ratio.item() == pytest.approx(0.05, rel=0.05)


def test_noise_falls_on_neurons_with_a_copy_only(dense, tmp_path):
    spec = {"layers": (1, 3), "top_k": 2}
    exact = plain(made(WidenSpec(noise=0, **spec), dense, tmp_path / "exact")).state_dict()
    noisy = plain(made(WidenSpec(noise=0.05, **spec), dense, tmp_path / "noisy")).state_dict()
    for layer in range(4):
        gate, down = (f"model.layers.{layer}.mlp.{n}_proj.weight" for n in ("gate", "down"))
        changed = (exact[gate] != noisy[gate]).any(dim=1)
        rows, counts = exact[gate].unique(dim=0, return_counts=True)
        # 64 of 128 neurons are copied, so 128 of 192 have an equal.
        assert changed.sum() == 128 == counts[counts > 1].sum()
        assert torch.equal(changed, (exact[down] != noisy[down]).any(dim=0))


def test_the_same_seed_gives_the_same_file_and_another_seed_another(dense, tmp_path):
    one, two, other = (
        (made(WidenSpec(seed=seed), dense, tmp_path / name) / "model.safetensors").read_bytes()
        for name, seed in (("one", 5), ("two", 5), ("other", 6))
    )
    assert one == two != other


def test_generation_and_chat_are_carried_over(tmp_path):
    dense = llama_folder(tmp_path / "dense")
    GenerationConfig(temperature=0.25, do_sample=True, eos_token_id=[8, 2]).save_pretrained(dense)
    wide = made(WidenSpec(), dense, tmp_path / "wide")
    generation = plain(wide).generation_config
    assert (generation.temperature, generation.eos_token_id) == (0.25, [8, 2])
    assert AutoTokenizer.from_pretrained(wide).chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "olmo2", "gpt_neox", "mistral"])
def test_each_architecture_keeps_its_function_and_matches_its_moe_twin(tmp_path, name):
    dense = dense_folder(tmp_path / "dense", name)
    wide = made(WidenSpec(top_k=3, noise=0), dense, tmp_path / "wide")
    assert (logits(wide) - logits(dense)).abs().max() < 1e-5
    assert plain(wide).config.intermediate_size == 3 * 128
    moe = ModelCard.read(made(UpcycleSpec(top_k=3), dense, tmp_path / "moe"))
    card = ModelCard.read(wide)
    routers = 4 * 4 * 64 + (4 * (3 * 64 + 64) if moe.family == "qwen2_moe" else 0)
    assert moe.flops_per_token - card.flops_per_token == 2 * routers
    assert (card.family, card.notes["neurons_added_per_layer"]) == (name, 256)


@pytest.mark.parametrize(("layers", "left"), [("all", 32), ((1, 3), 80)])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_partner_of_a_split_computes_as_much_with_the_same_neurons_for_every_token(
    tmp_path, name, layers, left
):
    dense = dense_folder(tmp_path / "dense", name)
    spec = {"experts": 8, "top_k": 2, "layers": layers, "experts_from": "clustered_split"}
    moe = ModelCard.read(made(UpcycleSpec(**spec), dense, tmp_path / "moe"))
    narrow = made(WidenSpec(top_k=2, parts=8, layers=layers, noise=0), dense, tmp_path / "narrow")
    card = ModelCard.read(narrow)
    model = plain(narrow)
    assert model.config.intermediate_size == left
    count = 4 if layers == "all" else 2
    extra = count * 8 * 64 + (count * (3 * 64 + 64) if moe.family == "qwen2_moe" else 0)
    assert moe.flops_per_token - card.flops_per_token == 2 * extra
    assert card.notes["flops_per_token_beyond_moe_without_routers"] == 0
    assert card.notes["neurons_added_per_layer"] == left - 128
    assert card.origin == f"narrowed from test: {128 - left} neurons left out per layer"
    assert "logit_difference" not in card.notes
    assert card.notes["logit_difference_of_twin"] > 0.05


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_neurons_that_add_nothing_are_left_out_first(tmp_path, name):
    """Half of the neurons have the largest weights and never fire; nothing is lost without them."""
    model = dense_model(name)
    with torch.no_grad():
        for layer in range(4):
            idle = torch.randperm(128, generator=torch.Generator().manual_seed(layer))[:64]
            block = model.get_submodule(DENSE[name].block.format(layer))
            block.get_parameter(DENSE[name].output)[:, idle] *= 100
            if name == "gpt_neox":
                block.dense_h_to_4h.weight[idle] = 0
                block.dense_h_to_4h.bias[idle] = 0
            else:
                block.up_proj.weight[idle] *= 100
                block.gate_proj.weight[idle] = 0
    dense = save(model, tmp_path / "dense")
    narrow = made(WidenSpec(top_k=1, parts=2, noise=0), dense, tmp_path / "narrow")
    assert plain(narrow).config.intermediate_size == 64
    assert (logits(narrow) - logits(dense)).abs().max() < 1e-5


def test_a_neuron_counts_by_its_root_mean_square_and_its_output_weights(dense):
    model, tokenizer = load(dense), load_tokenizer(dense)
    sizes = widen.contributions(model, tokenizer, DENSE["llama"])
    inner = []
    hook = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: inner.append(inputs[0][0])
    )
    with torch.no_grad():
        for text in widen.CALIBRATION_TEXTS:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    hook.remove()
    activation_TF = torch.cat(inner)
    assert len(activation_TF) == sum(len(t.encode()) for t in widen.CALIBRATION_TEXTS)  # bytes
    down = model.model.layers[2].mlp.down_proj.weight
    expected = activation_TF.pow(2).mean(dim=0).sqrt() * down.pow(2).sum(dim=0).sqrt()
    torch.testing.assert_close(sizes[2], expected)


def test_the_same_share_of_the_copies_is_drawn_anew(dense, tmp_path):
    spec = {"layers": (1, 3), "top_k": 2, "noise": 0}
    exact = plain(made(WidenSpec(**spec), dense, tmp_path / "exact")).state_dict()
    drawn = plain(made(WidenSpec(drop=0.25, **spec), dense, tmp_path / "drawn")).state_dict()
    for layer in range(4):
        gate, down = (f"model.layers.{layer}.mlp.{n}_proj.weight" for n in ("gate", "down"))
        changed = (exact[gate] != drawn[gate]).any(dim=1)
        assert changed.sum() == 128 * 0.25  # 64 neurons and their copies
        assert torch.equal(changed, (exact[down] != drawn[down]).any(dim=0))
        rows, counts = exact[gate][changed].unique(dim=0, return_counts=True)
        for row in rows:
            assert (exact[gate] == row).all(dim=1).sum() == 2
