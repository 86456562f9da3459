"""Slopes of feed-forward blocks, alone and in models with and without experts."""

import pytest
import torch

from stages.models.routes import imposed, routed
from stages.models.routing import weighing
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.probe.block_slopes import (
    block_slopes,
    feed_forward,
    random_tokens,
    steepest_tokens,
)

MAP = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(5, 90, (1, 7), generator=torch.Generator().manual_seed(1))


def model_of(name):
    return tiny_model(name, tiny_tokenizer(), seed=3)


def draw(start, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(start))


def test_the_norm_of_a_linear_map_at_every_token():
    clean = draw(9, (2, 5, 4))
    norm = torch.linalg.matrix_norm(MAP, 2)
    found = steepest_tokens(lambda x: x @ MAP.T, clean, 0.3, draw, steps=60, restarts=3)
    assert found.shape == (2, 5)
    assert (found > 0.99 * norm).all() and (found <= norm * (1 + 1e-4)).all()


def test_slopes_at_random_directions_by_hand():
    """(x + d)² - x² over d is 2 x + d along an axis; a direction's own length does not matter."""
    clean = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    directions = [torch.tensor([[5.0, 0.0], [2.0, 0.0]]), torch.tensor([[-1.0, 0.0], [0.0, 9.0]])]
    radius = torch.tensor([[0.5], [0.25]])
    found = random_tokens(torch.square, clean, radius, directions)
    # 2 + 0.5 beside 2 - 0.5, and 0.25 beside 6 + 0.25.
    assert found.tolist() == pytest.approx([2.5, 6.25])
    assert random_tokens(torch.square, clean, 0.5, directions[1:]).tolist() == pytest.approx(
        [1.5, 6.5])


def test_each_token_has_its_own_slope_and_stays_in_its_ball():
    seen = []

    def squares(x):
        seen.append(x.detach().clone())
        return x.square()

    clean = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    found = steepest_tokens(squares, clean, 0.5, draw, steps=40, restarts=4)
    # ((x + d)² - x²) / d = 2 x + d, at most 2 |x| + 0.5 along the axis.
    assert found.tolist() == pytest.approx([2.5, 6.5], rel=1e-2)
    assert max((x - clean).norm(dim=-1).max() for x in seen) <= 0.5 + 1e-6


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "llama"])
def test_blocks_are_asked_with_what_they_are_given(name):
    model = model_of(name)
    blocks, moe = feed_forward(model), name != "llama"
    weigh = weighing(model) if moe else None
    assert len(blocks) == model.config.num_hidden_layers
    asked = {path: [] for path in blocks}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: asked[path].append(args[0]))
        for path, module in blocks.items()
    ]
    found = block_slopes(model, lambda: model(input_ids=TOKENS), draw, radius=0.2, steps=3,
                         restarts=2, samples=3, weigh=weigh)  # fmt: skip
    for hook in hooks:
        hook.remove()
    with routed(model) as routes:
        model(input_ids=TOKENS)
    sparse = {routing.layer for routing in routes}
    assert bool(sparse) == moe and sparse <= set(blocks)
    for path, block in blocks.items():
        clean = asked[path][0]
        # In the model, as it is for the differences, and two starts of four looks each; the same
        # again with each token kept at its experts; three random directions beside it as it is.
        assert len(asked[path]) == 1 + 9 * (1 + (path in sparse)) + 4
        ways = {"free", "random", "frozen"} if path in sparse else {"free", "random"}
        assert found[path].keys() == ways
        assert all(slopes.shape == (1, 7) for slopes in found[path].values())
        radius = 0.2 * clean.norm(dim=-1).median()
        assert all((x - clean).norm(dim=-1).max() <= radius * (1 + 1e-3) for x in asked[path])

        def slopes_of(inputs, block=block, clean=clean, path=path, frozen=False):
            with torch.no_grad(), routed(
                model, imposed(routes, weigh=weigh) if frozen else None
            ):
                rises = [block(x) - block(clean) for x in inputs]
            return torch.stack([r.norm(dim=-1) / (x - clean).norm(dim=-1)
                                for r, x in zip(rises, inputs, strict=True)]).amax(0)

        lengths = [(x - clean).norm(dim=-1) for x in asked[path][-3:]]
        assert all(torch.allclose(length, radius.expand(1, 7)) for length in lengths)
        for way, inputs in (("free", asked[path][2:10]), ("random", asked[path][-3:]),
                            ("frozen", asked[path][11:-4])):
            if way in found[path]:
                expected = slopes_of(inputs, frozen=way == "frozen")
                torch.testing.assert_close(found[path][way], expected, rtol=1e-3, atol=1e-4)


def test_a_jump_between_experts_is_seen_with_routes_free_alone():
    """Two experts whose outputs are of opposite sign: near a tie the block is steep."""
    model = model_of("mixtral")
    for experts in (m for n, m in model.named_modules() if n.endswith("mlp.experts")):
        with torch.no_grad():
            experts.down_proj[1:] = -experts.down_proj[:1]
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = 1
    found = block_slopes(model, lambda: model(input_ids=TOKENS), draw, radius=0.5, steps=10,
                         restarts=4, samples=1, weigh=weighing(model))  # fmt: skip
    ratio = torch.cat([f["free"] / f["frozen"] for f in found.values()])
    assert ratio.max() > 2 and ratio.median() > 0.9


def test_families_that_choose_inside_their_blocks_have_none():
    assert feed_forward(model_of("jetmoe")) == {}
