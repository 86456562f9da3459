import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from stages.models.card import ModelCard
from stages.models.spec import UpcycleSpec, WidenSpec
from stages.models.stage import run
from stages.models.tiny import CHAT_TEMPLATE
from tests.stages.models.tiny_folders import llama_folder, logits, plain


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
