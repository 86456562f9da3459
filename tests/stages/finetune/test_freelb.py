"""The perturbation starts, climbs and is held as FreeLB's algorithm says, sequence by sequence."""

import pytest
import torch

from stages.finetune.batches import Example, micro_batch
from stages.finetune.freelb import added, climb, norms, start
from stages.finetune.recipe import FreeLB
from stages.models.tiny import tiny_model, tiny_tokenizer
from tests.stages.finetune.results import curve, measured, spec
from tests.stages.finetune.runs import Run, launch
from tests.stages.models.tiny_folders import dense_folder, save

SEQUENCES = torch.tensor([[0, 0, 1]])
PADDED = torch.tensor([[0, 0, -1], [1, -1, -1]])


def test_it_starts_within_the_bound_of_each_sequence():
    torch.manual_seed(0)
    delta = start(torch.zeros(1, 3, 50), SEQUENCES, FreeLB(initial=0.5))
    first, second = delta[0, :2], delta[0, 2]
    assert first.abs().max() <= 0.5 / 100**0.5 and second.abs().max() <= 0.5 / 50**0.5
    assert second.abs().max() > 0.5 / 100**0.5  # a shorter sequence has a wider bound
    assert delta.requires_grad and delta.is_leaf


def test_one_step_worked_by_hand():
    delta = torch.zeros(1, 3, 1, requires_grad=True)
    delta.grad = torch.tensor([[[3.0], [4.0], [-2.0]]])  # norms 5 and 2
    moved = climb(delta, SEQUENCES, FreeLB(learning_rate=1.0))
    assert moved.flatten().tolist() == pytest.approx([0.6, 0.8, -1.0])
    held = climb(delta, SEQUENCES, FreeLB(learning_rate=1.0, max_norm=0.5))
    assert held.flatten().tolist() == pytest.approx([0.3, 0.4, -0.5])
    assert norms(held, SEQUENCES).tolist() == pytest.approx([0.5, 0.5])


def test_a_sequence_without_a_gradient_stays():
    delta = torch.full((1, 3, 1), 0.25, requires_grad=True)
    delta.grad = torch.tensor([[[0.0], [0.0], [1.0]]])
    moved = climb(delta, SEQUENCES, FreeLB(learning_rate=0.5))
    assert moved.flatten().tolist() == pytest.approx([0.25, 0.25, 0.75])


def test_padding_is_never_moved_and_counts_in_no_norm():
    torch.manual_seed(0)
    real = (PADDED >= 0)[..., None].expand(2, 3, 50)
    delta = start(torch.zeros(2, 3, 50), PADDED, FreeLB(initial=0.5))
    assert (delta[~real] == 0).all() and (delta[real] != 0).all()
    assert delta[0].abs().max() <= 0.5 / 100**0.5 < delta[1].abs().max() <= 0.5 / 50**0.5
    delta = torch.zeros(2, 3, 1, requires_grad=True)
    # What padding would be worth is far more than the tokens are.
    delta.grad = torch.tensor([[[3.0], [4.0], [50.0]], [[-2.0], [50.0], [50.0]]])
    assert norms(delta.grad, PADDED).tolist() == [5, 2]
    moved = climb(delta, PADDED, FreeLB(learning_rate=1.0))
    assert moved.flatten().tolist() == pytest.approx([0.6, 0.8, 0, -1, 0, 0])
    held = climb(delta, PADDED, FreeLB(learning_rate=1.0, max_norm=0.5))
    assert held.flatten().tolist() == pytest.approx([0.3, 0.4, 0, -0.5, 0, 0])


@pytest.mark.parametrize(
    ("name", "label", "expected"),
    [
        ("mixtral", None, [[0, 0, 0, 1, 1]]),
        ("mixtral", 1, [[0, 0, 0], [1, 1, -1]]),
        ("moduleformer", None, [[0, 0, 0], [1, 1, -1]]),
        ("t5", None, [[0, 0], [1, -1]]),  # the prompts alone
    ],
)
def test_which_tokens_belong_together(name, label, expected):
    config = tiny_model(name, tiny_tokenizer(), seed=0).config
    examples = [Example((5, 6, 7), 1, label), Example((8, 9), 1, label)]
    part = micro_batch(examples, config, torch.device("cpu"))
    assert part.sequences.tolist() == expected
    assert part.sequences.shape == part.arguments["input_ids"].shape


def test_a_model_reads_the_perturbed_embeddings_of_its_tokens():
    model = tiny_model("llama", tiny_tokenizer(), seed=0)
    tokens, embed = torch.arange(3, 11)[None], model.get_input_embeddings()
    delta = torch.full((1, 8, 64), 0.01)
    with torch.no_grad():
        with added(embed, delta):
            moved = model(tokens).logits
        expected = model(inputs_embeds=embed(tokens) + delta).logits
        assert torch.equal(moved, expected) and not torch.equal(moved, model(tokens).logits)


CLIMB = {"adversarial": {"kind": "freelb", "initial": 0.0, "learning_rate": 0.5, "max_norm": 0.8}}
"""No chance in it, so that the size of the micro-batches changes rounding alone."""
HEAD = {"head": "classification"}
FAMILIES = {
    "moduleformer": {},
    "switch_transformers": {},
    "t5": {},
    "jamba": {},
    "opt": {},
    "mixtral-head": HEAD,
    "moduleformer-head": HEAD,
}


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    folder, planned, folders = tmp_path_factory.mktemp("padded"), [], dict(models)
    for name in ("moduleformer", "jamba"):
        model = tiny_model(name, tiny_tokenizer(), seed=3)
        folders[name] = save(model, tmp_path_factory.mktemp(name))
    folders["opt"] = dense_folder(tmp_path_factory.mktemp("opt"), "opt", dropout=0.0)
    for name, fields in FAMILIES.items():
        model = name.removesuffix("-head")
        variants = {"alone": {"micro_batch": 1}, "padded": {"micro_batch": 4},
                    "plain": {"adversarial": None}}  # fmt: skip
        if model not in ("t5", "opt", "jamba"):
            variants["ep2"] = {"micro_batch": 4, "expert_parallel": 2}
        for variant, changes in variants.items():
            output = folder / f"{name}-{variant}"
            output.mkdir()
            recipe = spec(**CLIMB | fields | changes)
            planned.append(Run(recipe, {"model": folders[model], **data}, output))
    launch(2, planned, folder / "store")
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_sequences_are_perturbed_as_each_would_be_alone(runs, name):
    alone, padded, plain = (curve(runs / f"{name}-{v}") for v in ("alone", "padded", "plain"))
    for column in ("loss", "gradient_norm"):
        assert padded[column].tolist() == pytest.approx(alone[column].tolist(), rel=1e-3), column
    assert padded["loss"][0] > plain["loss"][0] * 1.005
    seen = measured(runs / f"{name}-padded", "adversarial")
    losses = [seen[f"loss_share_in_ascent_{n}"] for n in (1, 2, 3)]
    assert losses[0] < losses[1] < losses[2]
    lengths = [seen[f"norm_in_ascent_{n}"] for n in (1, 2, 3)]
    assert lengths[:2] == pytest.approx([0, 0.5], abs=1e-4) and lengths[1] < lengths[2] <= 0.8001


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.split("-")[0] in
                                  ("moduleformer", "switch_transformers", "mixtral")])  # fmt: skip
def test_experts_may_be_spread_out(runs, name):
    one, spread = (curve(runs / f"{name}-{v}") for v in ("padded", "ep2"))
    assert spread["loss"].tolist() == pytest.approx(one["loss"].tolist(), rel=1e-4)
