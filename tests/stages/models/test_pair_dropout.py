"""Dropout inside experts: its masks, and that expert parallelism draws the same."""

import json

import pytest
import torch
from torch import nn

from stages.models.families import FAMILIES
from stages.models.pair_dropout import PairDropout, follow_pairs, uniform
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY
from tests.stages.finetune.conftest import data  # noqa: F401
from tests.stages.finetune.results import curve, measured, spec, weights
from tests.stages.finetune.runs import Run, in_ranks, launch, process_group
from tests.stages.models.tiny_folders import save

WITH_DROPOUT = {
    "switch_transformers": {"dropout_rate": 0.2},
    "nllb-moe": {"activation_dropout": 0.2, "dropout": 0.1, "moe_token_dropout": 0.2},
}


def model_with_dropout(name):
    """The tiny model of a family in training, with dropout where it can have some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, name, TINY[name] | WITH_DROPOUT.get(name, {}))
        return tiny_model(name, tiny_tokenizer(), seed=3).train()


def test_masks_are_uniform_and_those_of_different_keys_independent():
    keys = torch.randint(2**63 - 1, (400,), generator=torch.Generator().manual_seed(0))
    numbers = uniform(torch.cat([keys, keys[:1] + 1]), 500)
    assert 0 <= numbers.min() and numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.003)
    tenths = torch.histc(numbers, 10, 0, 1) / numbers.numel()
    assert tenths.tolist() == pytest.approx([0.1] * 10, abs=0.003)
    between = torch.corrcoef(numbers).fill_diagonal_(0)
    along = torch.corrcoef(numbers.T).fill_diagonal_(0)
    assert between.abs().max() < 0.25 and along.abs().max() < 0.27  # 5 standard errors
    # The published generator, from seed 0: its first number, without the lowest 40 bits.
    assert uniform(torch.zeros(1, dtype=torch.long), 1).item() == (
        0xE220A8397B1DCDAF & 0xFFFFFF
    ) / 2**24


def test_dropout_keeps_its_share_and_its_mean_and_follows_the_keys():
    dropout = PairDropout(0.3)
    dropout.keys = torch.arange(200)
    once = dropout(torch.ones(200, 300))
    assert (once == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert once.max().item() == pytest.approx(1 / 0.7)
    turned = torch.randperm(200)
    dropout.keys = dropout.keys[turned]
    assert torch.equal(dropout(torch.ones(200, 300)), once[turned])
    assert torch.equal(dropout.eval()(once), once)


@pytest.mark.parametrize("name", [name for name in TINY if FAMILIES[name].is_moe])
def test_no_dropout_inside_experts_is_left_to_the_order_of_their_tokens(name):
    model = model_with_dropout(name)
    follow_pairs(model)
    found = [
        module
        for experts in FAMILIES[name].modules(model, "expert").values()
        for path, module in experts.named_modules()
        if isinstance(module, nn.Dropout) and module.p and path != "token_dropout"
    ]
    assert all(isinstance(module, PairDropout) for module in found)
    assert bool(found) == (name in WITH_DROPOUT)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """What each rank saw of each family in training, whole and spread over two ranks."""
    output = tmp_path_factory.mktemp("compared")
    in_ranks(_compare, (output, output / "store"))
    return {
        (name, rank): json.loads((output / f"{name}_{rank}.json").read_text())
        for name in WITH_DROPOUT
        for rank in (0, 1)
    }


def _compare(rank, output, store):
    from stages.finetune.loop import start_distributed
    from stages.models.expert_parallel import convert

    with process_group(rank, 2, store):
        start_distributed()
        for name in WITH_DROPOUT:
            # Ranks have other tokens, and other numbers of them.
            generator = torch.Generator().manual_seed(rank)
            tokens = torch.randint(3, 259, (2, 20 + rank), generator=generator)
            found = {}
            for layout in ("whole", "spread"):
                model = model_with_dropout(name)
                follow_pairs(model)
                if layout == "spread":
                    convert(model, 2, grouped_mm=False)
                router = next(iter(FAMILIES[name].modules(model, "router").values()))
                for seed in (1, 2):
                    torch.manual_seed(10 * seed + rank)
                    model.zero_grad()
                    out = model(input_ids=tokens, labels=tokens, use_cache=False)
                    out.loss.backward()
                    found[f"{layout} {seed}"] = [
                        out.loss.item(),
                        router.classifier.weight.grad.norm().item(),
                        torch.rand(1).item(),  # what is drawn next
                    ]
            (output / f"{name}_{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_two_ranks_that_share_experts_draw_what_whole_experts_do(name, rank, compared):
    found = compared[name, rank]
    for seed in (1, 2):
        assert found[f"spread {seed}"] == pytest.approx(found[f"whole {seed}"], rel=1e-5)
    assert found["whole 1"][0] != pytest.approx(found["whole 2"][0], rel=1e-3)  # it acts


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):  # noqa: F811
    """Three steps of Switch with dropout and jitter as transformers has them by default, on one
    worker, on two, and on two that share the experts."""
    folder = tmp_path_factory.mktemp("trained")
    model = tiny_model("switch_transformers", tiny_tokenizer(), seed=3)
    model.config.dropout_rate, model.config.router_jitter_noise = 0.1, 0.01
    save(model, folder / "model")
    for workers, layouts in ((1, ("one",)), (2, ("two", "shared"))):
        runs = []
        for name in layouts:
            (folder / name).mkdir()
            given = spec(workers=workers, expert_parallel=2 if name == "shared" else 1)
            runs.append(Run(given, {"model": folder / "model", **data}, folder / name))
        launch(workers, runs, folder / f"store-{workers}")
    return folder


@pytest.mark.parametrize("layout", ["two", "shared"])
def test_a_training_is_the_same_in_every_layout(layout, trained):
    got, expected = curve(trained / layout), curve(trained / "one")
    for column in ("loss", "gradient_norm", "router_entropy"):
        assert got[column].to_numpy() == pytest.approx(expected[column].to_numpy(), rel=2e-5)
    state = weights(trained / "one")
    for key, value in weights(trained / layout).items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=2e-4, msg=key)
    told = measured(trained / layout, "router.jitter")
    assert told == {"of_the_model_itself": 0.01}
