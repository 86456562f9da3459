"""ViT and V-MoE: equal to transformers' ViT where they must be, routing and capacity by hand."""

import json

import pytest
import torch
from pydantic import ValidationError
from transformers import ViTConfig, ViTForImageClassification

from stages.errors import StageFailed
from stages.models.capacity import within_capacity
from stages.models.card import ModelCard
from stages.models.families import family
from stages.models.images import Classifier, ImageProcessor, load_processor
from stages.models.load import load
from stages.models.roles import roles
from stages.models.routing import blocks, intercept, weighing
from stages.models.spec import EveryNth, SourceSpec, UpcycleSpec
from stages.models.stage import run
from stages.models.vision import from_scratch
from stages.models.vision_spec import SIZES, VisionSpec

IMAGES = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
DENSE = VisionSpec(
    size="tiny", hidden=32, neurons=48, depth=4, patch=7, image_size=28, channels=1, labels=10
)
SPARSE = DENSE.model_copy(update={"experts": 4, "top_k": 2})


def experts_differ(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in family(model).modules(model, "expert").values():
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def sparse():
    return experts_differ(from_scratch(SPARSE)[0])


def test_the_papers_sizes_and_names():
    spec = VisionSpec(size="S", labels=1000, experts=8, top_k=2, layers=(5, 7))
    assert spec.title == "V-MoE-S/32, E=8, K=2, layers 5, 7"
    assert VisionSpec(size="L", patch=16, labels=1000).title == "ViT-L/16"
    sizes = {name: tuple(size) for name, size in SIZES.items() if name != "tiny"}
    assert sizes == {  # hidden, layers, mlp, heads
        "S": (512, 8, 2048, 8),
        "B": (768, 12, 3072, 12),
        "B+": (832, 15, 3328, 13),
        "B++": (896, 18, 3584, 14),
        "B+++": (960, 21, 3840, 15),
        "L": (1024, 24, 4096, 16),
        "H": (1280, 32, 5120, 16),
    }
    large = VisionSpec(size="L", patch=16, labels=1000).shape
    assert (large.hidden, large.depth, large.neurons, large.heads) == sizes["L"]
    assert VisionSpec(size="B", labels=10, experts=8).moe_layers == (1, 3, 5, 7, 9, 11)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("size", "XS", "there is no 'XS'"),
        ("patch", 5, "5 does not divide image_size 28"),
        ("heads", 5, "5 does not divide the width"),
        ("top_k", 5, "more than the 4 experts"),
        ("layers", [9], "names none of the 4 layers"),
    ],
)
def test_a_model_that_cannot_be_is_refused(field, value, reason):
    with pytest.raises(ValidationError, match=reason):
        VisionSpec.model_validate_json(json.dumps(SPARSE.model_dump(mode="json") | {field: value}))


def test_weights_of_transformers_vit_give_its_logits(tmp_path):
    """A published folder is a source like any other; its logits stay transformers'."""
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                       intermediate_size=64, image_size=28, patch_size=7, num_labels=10)
    torch.manual_seed(0)
    theirs = ViTForImageClassification(config).eval()
    source, output = tmp_path / "hub", tmp_path / "out"
    theirs.save_pretrained(source)
    half = (0.5, 0.4, 0.3)
    ImageProcessor(28, 3, half, half, (), 17).save_pretrained(source)
    output.mkdir()
    run(SourceSpec(source=f"file:{source}"), {}, output)
    pixels = torch.rand(2, 3, 28, 28)
    scale = torch.tensor(half)[:, None, None]
    expected = theirs((pixels - scale) / scale)
    ours = Classifier(load(output), load_processor(output))
    assert torch.equal(ours(pixels), expected.logits)
    card = ModelCard.read(output)
    assert (card.architecture, card.family, card.notes["tokens_per_image"]) == ("dense", "vit", 17)
    assert load_processor(output).labels[:2] == ("LABEL_0", "LABEL_1")
    # Outputs named as the data names its labels.
    named = SourceSpec(source=f"file:{source}", labels=10)
    run(named, {}, output)
    assert load_processor(output).labels == tuple(map(str, range(10)))
    assert torch.equal(Classifier(load(output), load_processor(output))(pixels), expected.logits)
    assert "labels" in named.identity() and "labels" not in SourceSpec(source="tiny:vit").identity()
    with pytest.raises(StageFailed, match="labels: 2 are given for 10 outputs"):
        run(SourceSpec(source=f"file:{source}", labels=("cat", "dog")), {}, output)
    with pytest.raises(StageFailed, match="labels: 10 are given for 0 outputs of an image"):
        run(SourceSpec(source="tiny:llama", labels=10), {}, output)


def test_operations_by_hand(tmp_path):
    run(SPARSE, {}, tmp_path)
    card = ModelCard.read(tmp_path)
    attention, block, patches = 4 * 32 * 32, 2 * 32 * 48, 49 * 32
    per_token = patches + 4 * attention + 2 * block + 2 * (2 * block + 4 * 32)
    assert card.flops_per_token == 2 * per_token
    assert card.notes["flops_per_image"] == 2 * (17 * per_token + 32 * 10)
    assert (card.experts, card.top_k, card.moe_layers, card.layers) == (4, 2, (1, 3), 4)
    dense = measure_params(DENSE)
    assert card.total_parameters == dense + 2 * (3 * (block + 48 + 32) + 4 * 32)


@pytest.mark.parametrize("change", [{}, {"top_k": 1, "layers": "all"}, {"experts": 0}])
def test_the_planner_counts_as_the_card_does(change, tmp_path):
    spec = VisionSpec.model_validate_json(json.dumps(SPARSE.model_dump(mode="json") | change))
    run(spec, {}, tmp_path)
    card = ModelCard.read(tmp_path)
    assert spec.counts() == (
        card.total_parameters, card.active_parameters, card.flops_per_token
    )
    assert spec.flops_per_expert == card.flops_per_expert


def measure_params(spec):
    return sum(p.numel() for p in from_scratch(spec)[0].parameters())


def test_every_part_has_its_role(sparse):
    found = roles(sparse)
    assert found["vit.layers.1.mlp.gate.weight"] == "router"
    assert found["vit.layers.1.mlp.experts.up_proj_bias"] == "expert"
    assert found["vit.layers.0.mlp.fc1.weight"] == "backbone"
    assert found["vit.embeddings.position_embeddings"] == "embedding"
    assert found["classifier.weight"] == "head"
    assert not any("mlp.gate.bias" in name for name in found)


def test_experts_start_equal_or_not():
    def spread(**fields):
        model = from_scratch(SPARSE.model_copy(update=fields))[0]
        return model.vit.layers[1].mlp.experts.up_proj.std(dim=0).max().item()

    assert spread() == 0 and spread(shared_start=False) > 0.01


@torch.no_grad()
def test_a_chosen_expert_weighs_its_softmax_value(sparse):
    """The block is the sum of the K most probable experts, each times its unnormalised softmax."""
    block = sparse.vit.layers[1].mlp
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    probabilities = (hidden[0] @ block.gate.weight.T).softmax(-1)
    expected = torch.zeros(5, 32)
    e = block.experts
    for token in range(5):
        for expert in probabilities[token].argsort(descending=True)[:2].tolist():
            inner = torch.nn.functional.gelu(e.up_proj[expert] @ hidden[0, token]
                                             + e.up_proj_bias[expert])
            outer = e.down_proj[expert] @ inner + e.down_proj_bias[expert]
            expected[token] += probabilities[token, expert] * outer
    torch.testing.assert_close(block(hidden)[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        weighing(sparse)(torch.log(probabilities), probabilities.topk(2).indices),
        probabilities.topk(2).values,
    )


def test_capacity_by_hand():
    """Three tokens, two choices each, one place per expert."""
    indices = torch.tensor([[0, 1], [0, 2], [1, 0]])
    weights = torch.tensor([[0.5, 0.3], [0.9, 0.05], [0.6, 0.2]])
    in_order = within_capacity(indices, weights, 1, 3, first=False)
    # First choices: token 0 takes expert 0, token 1 comes too late, token 2 takes expert 1; then
    # token 0 finds expert 1 full, token 1 gets expert 2, token 2 finds expert 0 full.
    assert in_order.tolist() == [[True, False], [False, True], [True, False]]
    by_weight = within_capacity(indices, weights, 1, 3, first=True)
    assert by_weight.tolist() == [[False, False], [True, True], [True, False]]
    assert within_capacity(indices, weights, 3, 3, first=False).all()


@torch.no_grad()
def test_capacity_drops_per_group_in_its_mode(sparse):
    """round(K T C / E) tokens of a group of images: 17 tokens, 2 of 4 experts, C = 1/2 is 4."""
    seen = []

    def watch(routing):
        seen.append(routing)

    sparse.config.group_size, sparse.config.eval_capacity_factor = 1, 0.5
    try:
        with intercept(blocks(sparse), choice=watch):
            together = sparse(IMAGES).logits
            for routing in seen:
                for group in range(3):
                    part = slice(17 * group, 17 * group + 17)
                    kept = routing.experts[part][routing.weights[part] > 0]
                    load = torch.bincount(kept, minlength=4)
                    wanted = torch.bincount(routing.experts[part].flatten(), minlength=4)
                    assert load.tolist() == wanted.clamp(max=round(2 * 17 * 0.5 / 4)).tolist()
        alone = torch.cat([sparse(image[None]).logits for image in IMAGES])
        torch.testing.assert_close(together, alone)  # groups of one image are independent
        sparse.config.group_size = None
        assert (sparse(IMAGES).logits - alone).abs().max() > 1e-3
    finally:
        sparse.config.group_size = sparse.config.eval_capacity_factor = None


@torch.no_grad()
def test_upcycling_keeps_the_function(tmp_path):
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    dense.mkdir(), moe.mkdir()
    run(DENSE, {}, dense)
    spec = UpcycleSpec(experts=4, top_k=2, layers=EveryNth(every=2), noise=0.0)
    run(spec, {"dense": dense}, moe)
    twin = load(moe)
    assert twin.config.moe_layers == [1, 3] and twin.config.norm_topk_prob
    torch.testing.assert_close(twin(IMAGES).logits, load(dense)(IMAGES).logits,
                               atol=1e-5, rtol=1e-5)
    card = ModelCard.read(moe)
    assert card.notes["logit_difference"] < 1e-5 and "loss_of_twin" not in card.notes
    assert load_processor(moe) == load_processor(dense)
    routers = family(twin).modules(twin, "router").values()
    assert len(routers) == 2 and all(r.weight.std() > 0 for r in routers)


def test_a_single_experts_weight_lets_the_task_train_the_router(tmp_path):
    """It is V-MoE's own: normalised it would be 1, without a gradient. A block starts as the dense
    one times that weight."""
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    dense.mkdir(), moe.mkdir()
    run(DENSE, {}, dense)
    spec = UpcycleSpec(experts=4, top_k=1, layers=EveryNth(every=2), noise=0.0)
    run(spec, {"dense": dense}, moe)
    twin, plain = load(moe), load(dense)
    assert not twin.config.norm_topk_prob
    notes = ModelCard.read(moe).notes
    assert notes["logit_difference"] < 1e-5 < 1e-3 < notes["logit_difference_of_twin"]
    assert notes["logit_difference_measured"] == "as routed, before its weight was V-MoE's own"
    states = torch.randn(1, 5, twin.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for layer in (1, 3):
        block = twin.vit.layers[layer].mlp
        weights = (states[0] @ block.gate.weight.T).softmax(-1).amax(-1, keepdim=True)
        assert weights.min() < 0.9
        expected = weights * plain.vit.layers[layer].mlp(states)[0]
        torch.testing.assert_close(block(states)[0], expected)
    with torch.enable_grad():
        gates = [twin.vit.layers[layer].mlp.gate.weight.requires_grad_() for layer in (1, 3)]
        loss = torch.nn.functional.cross_entropy(twin(IMAGES).logits, torch.arange(len(IMAGES)) % 2)
        gradients = torch.autograd.grad(loss, gates)
    assert min(gradient.norm() for gradient in gradients) > 1e-2
    # What was made before is made again; twins of more experts per token are what they were.
    others = spec.model_copy(update={"top_k": 2}).identity()
    assert set(spec.identity()) - set(others) == {"weight_of_one"}


def test_grey_and_colour_images_are_resized(tmp_path):
    import io

    from PIL import Image

    def png(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    red = png(Image.new("RGB", (4, 2), (255, 0, 0)))
    colour = ImageProcessor(8, 3, (0.5,) * 3, (0.5,) * 3, ("a", "b"), 5)
    assert colour.decode([red]).shape == (1, 3, 8, 8)
    assert colour.decode([red])[0, :, 0, 0].tolist() == [1, 0, 0]
    assert colour.normalised(colour.decode([red]))[0, :, 3, 3].tolist() == [1, -1, -1]
    assert colour.label("b") == 1
    with pytest.raises(StageFailed, match="label 'c' is none of the model's"):
        colour.label("c")
    grey = ImageProcessor(2, 1, (0.5,), (0.5,), ("a", "b"), 5)
    # ITU-R 601: 0.299 of 255.
    torch.testing.assert_close(grey.decode([red]), torch.full((1, 1, 2, 2), 76 / 255))
