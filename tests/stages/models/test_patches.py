"""Patch embeddings as products against transformers' convolution."""

import copy

import pytest
import torch

from stages.models.patches import PatchProduct, with_patch_products
from stages.models.vision import from_scratch
from stages.models.vision_spec import VisionSpec


@pytest.mark.parametrize("patch, channels, experts", [(7, 1, 0), (4, 3, 4)])
def test_logits_and_gradients_are_those_of_the_convolution(patch, channels, experts):
    spec = VisionSpec(size="tiny", patch=patch, image_size=28, channels=channels, labels=10,
                      experts=experts)
    model, _ = from_scratch(spec)
    ours = with_patch_products(copy.deepcopy(model))
    assert isinstance(ours.vit.embeddings.patch_embeddings.projection, PatchProduct)
    assert list(ours.state_dict()) == list(model.state_dict())
    pixels = torch.rand(3, channels, 28, 28, generator=torch.Generator().manual_seed(0))

    def found(of):
        images = pixels.clone().requires_grad_()
        logits = of(images).logits
        weight = of.get_parameter("vit.embeddings.patch_embeddings.projection.weight")
        return logits, *torch.autograd.grad(logits.square().sum(), [images, weight])

    for mine, theirs in zip(found(ours), found(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
