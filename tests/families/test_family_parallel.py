"""Every Mixture-of-Experts family computes and trains the same with its experts spread out, and so
does the dense encoder-decoder over several workers.

Four families of different shape run always, the others under ``make test-families``.
"""

import json
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from deepspeed.moe.utils import is_moe_param

from stages.finetune import training
from stages.finetune.evidence import Evidence
from stages.finetune.knobs import Knobs
from stages.finetune.spec import FinetuneSpec, TrainSet
from stages.models.families import FAMILIES
from stages.models.size import measure
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY
from tests.stages.finetune.conftest import data  # noqa: F401
from tests.stages.finetune.reference import (
    assert_same_training,
    counts_otherwise,
    curve,
    plain,
    weights,
)
from tests.stages.finetune.runs import Run, in_ranks, launch, process_group

QUICK = ("mixtral", "deepseek_v3", "gpt_oss", "switch_transformers")
PARALLEL = [n for n in TINY if FAMILIES[n].is_moe and not FAMILIES[n].no_expert_parallel]
TRAINED = [*(n for n in PARALLEL if not FAMILIES[n].no_training), "t5"]
STEADIED = [n for n in TRAINED if "rms_norm_eps" in TINY[n]]
SPEC = FinetuneSpec(
    data=(TrainSet(dataset="reviews", template="sentiment"), TrainSet(dataset="refusals")),
    steps=10,
    batch_size=8,
    learning_rate=1e-3,
    warmup_steps=2,
    weight_decay=0.1,
    gradient_clipping=0.5,
    workers=2,
    expert_parallel=2,
    micro_batch=2,
    checkpoint_every=8,
    seed=5,
)


ZERO2 = {model: f"cpu_{model}_zero2.json" for model in ("dense", "moe_expert_parallel")}


def families(names: list[str]):
    return pytest.mark.parametrize(
        "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.families) for n in names]
    )


def spec(name: str) -> FinetuneSpec:
    if FAMILIES[name].is_moe:
        return SPEC.model_copy(update={"auxiliary_loss_weight": 0.05})
    return SPEC.model_copy(update={"expert_parallel": 1})


@pytest.fixture(scope="session")
def selected(request) -> list[str]:
    """The families that this run of the tests is about."""
    names = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == Path(__file__) and hasattr(item, "callspec")
    }
    return [name for name in TINY if name in names]


@pytest.fixture(scope="session")
def folders(selected, tmp_path_factory) -> dict[str, Path]:
    found, tokenizer = {}, tiny_tokenizer()
    for name in selected:
        found[name] = tmp_path_factory.mktemp(name)
        model = tiny_model(name, tokenizer, seed=3)
        tokenizer.save_pretrained(found[name])
        model.save_pretrained(found[name])
        measure(model, f"tiny:{name}").write(found[name])
    return found


@pytest.fixture(scope="session")
def compared(folders, tmp_path_factory) -> Path:
    """What each rank saw of each family: plain, whole as it is trained, and spread over two ranks.
    """
    output = tmp_path_factory.mktemp("compared")
    in_ranks(_compare, (folders, output, output / "store"), seconds=600)
    return output


def _compare(rank: int, folders: dict[str, Path], output: Path, store: Path) -> None:
    from stages.finetune.loop import start_distributed

    with process_group(rank, 2, store):
        start_distributed()
        for name, folder in folders.items():
            if name not in PARALLEL:
                continue
            try:
                result = _differences(name, folder, rank)
            except Exception:
                result = {"crashed": traceback.format_exc()}
            (output / f"{name}_{rank}.json").write_text(json.dumps(result))


def _differences(name: str, folder: Path, rank: int) -> dict[str, float]:
    from stages.models.expert_parallel import convert
    from stages.models.load import load
    from stages.models.roles import roles

    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(3, 259, (2, 24 + rank), generator=generator)  # ranks differ in length
    expected = _everything(name, plain(folder), tokens)
    found = {"logit_size": expected["logits"].abs().max().item()}

    def compare(layout: str, seen: dict[str, torch.Tensor]) -> None:
        for what, value in seen.items():
            difference = (value - expected[what]).abs().max() / expected[what].abs().max()
            found[f"{what}, {layout}"] = difference.item()

    whole = load(folder)
    compare("whole", _everything(name, whole, tokens, Knobs(whole, spec(name), Evidence())))
    for grouped in (True, False):
        model, entry, asked = load(folder), FAMILIES[name], set()
        before, paths = roles(model), list(entry.modules(model, "expert"))
        for path, module in entry.modules(model, "expert").items():
            module.register_forward_pre_hook(partial(_note, asked, path))
        convert(model, 2, grouped_mm=grouped)
        assert list(entry.modules(model, "expert")) == paths
        assert all(before[name] == role for name, role in roles(model).items())
        compare(f"grouped {grouped}", _everything(name, model, tokens))
        assert asked == set(paths)  # hooks of before still see the same arguments
        found[f"all to one expert, grouped {grouped}"] = _crowded(name, model, folder, tokens)
    return found


def _crowded(name: str, parallel, folder: Path, tokens: torch.Tensor) -> float:
    """How much the first experts' input gradient differs when every token goes to expert 0, so that
    one rank gets none."""
    from stages.models.load import load

    gradients = []
    if FAMILIES[name].chooses_largest:
        return 0.0  # JetMoE and MoLM sort their tokens themselves
    for model in (load(folder), parallel):
        paths = FAMILIES[name].modules(model, "expert")
        path = next(p for p in paths if p.endswith("experts"))
        module = model.get_submodule(path)
        generator = torch.Generator().manual_seed(tokens.shape[1])
        hidden = torch.randn(tokens.shape[1], 64, generator=generator).requires_grad_()
        chosen = torch.zeros(tokens.shape[1], 2, dtype=torch.long)
        weights = torch.full((tokens.shape[1], 2), 0.5)
        if FAMILIES[name].index is None:  # Switch takes a mask
            chosen = torch.nn.functional.one_hot(chosen[:, :1], module.num_experts)
            weights = weights[:, :1]
        module(hidden, chosen, weights).square().sum().backward()
        gradients.append(hidden.grad)
    return ((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item()


def _note(asked: set[str], path: str, *_) -> None:
    asked.add(path)


def _everything(
    name: str, model, tokens: torch.Tensor, knobs: Knobs | None = None
) -> dict[str, torch.Tensor]:
    """Logits, loss, auxiliary loss (this project's, where transformers has none that counts the
    chosen experts), and the gradient that each router gets of the latter. With ``knobs`` all of it
    as in training, which always takes its own auxiliary loss."""
    from stages.finetune.router_losses import balance_by_sequence, load_balancing_loss
    from stages.models.routes import routed

    entry = FAMILIES[name]
    ours, watching = counts_otherwise(entry), routed(model)
    balance = {} if ours else {"output_router_logits": True}
    if knobs is not None:
        knobs.attach()
        ours, watching = True, knobs.forward()
    with watching if ours else nullcontext() as routes:
        out = model(tokens, labels=tokens, use_cache=False, **balance)
    seen = {"logits": out.logits.detach(), "loss": out.loss.detach()}
    if not ours:
        parts = [out[part] for part in entry.auxiliary_loss]
    elif entry.balanced_by_sequence:
        apart = zip(*(routing.split(len(tokens)) for routing in routes), strict=True)
        parts = [balance_by_sequence(list(map(list, apart)), entry.scores)]
    else:
        parts = [load_balancing_loss(routes, entry.scores)]
    sum(parts).backward()
    seen["auxiliary loss"] = sum(parts).detach()
    for path, router in entry.modules(model, "router").items():
        weight = next(p for p in router.parameters() if p.requires_grad)
        assert weight.grad.abs().max() > 0
        seen[f"gradient of {path}"] = weight.grad
    if entry.scores == "sparsemixer":
        torch.manual_seed(7)
        drawn = model.train()(tokens, use_cache=False).logits.detach()
        assert (drawn - seen["logits"]).abs().max() > 1e-2
        seen["logits with drawn experts"] = drawn
        model.eval()
    return seen


@families(PARALLEL)
def test_whole_models_and_two_ranks_compute_what_plain_transformers_does(name, compared):
    for rank in (0, 1):
        result = json.loads((compared / f"{name}_{rank}.json").read_text())
        assert "crashed" not in result, result["crashed"]
        assert result.pop("logit_size") > 0.1
        assert max(result.values()) <= 1e-5, result


@pytest.fixture(scope="session")
def trained(folders, data, tmp_path_factory) -> Path:  # noqa: F811
    """Ten steps of each family over two ranks that share the experts, and the last two of them
    again from the checkpoint of the eighth: with whole experts, over four ranks, and with gradients
    and optimiser shared out (ZeRO-2), as on GPUs.
    """
    output = tmp_path_factory.mktemp("trained")
    two, four = [], []

    def plan(runs: list[Run], name: str, suffix: str = "", **layout: int | str) -> None:
        (output / (name + suffix)).mkdir()
        checkpoints = output / f"{name}-checkpoint"
        checkpoints.mkdir(exist_ok=True)
        planned = spec(name).model_copy(update=layout)
        inputs = {"model": folders[name], **data}
        runs.append(Run(planned, inputs, output / (name + suffix), None, checkpoints))

    for name in sorted(folders.keys() & set(TRAINED)):
        plan(two, name)
        plan(two, name, "-whole", expert_parallel=1)
        plan(two, name, "-zero2_whole", expert_parallel=1, deepspeed_config=ZERO2["dense"])
        if FAMILIES[name].is_moe:
            plan(two, name, "-zero2", deepspeed_config=ZERO2["moe_expert_parallel"])
        plan(four, name, "-four", expert_parallel=4 if FAMILIES[name].is_moe else 1, workers=4)
    launch(2, two, tmp_path_factory.mktemp("two") / "store", keep_going=True)
    launch(4, four, tmp_path_factory.mktemp("four") / "store", keep_going=True)
    return output


def finished(folder: Path) -> Path:
    for file in folder.glob("*ed_?.txt"):
        raise AssertionError(file.read_text())
    return folder


@families(TRAINED)
def test_ten_steps_of_two_ranks_equal_ten_of_one(name, trained, folders, data):  # noqa: F811
    # Rounding differences grow from step to step, in the norm of the gradient the most.
    assert_same_training(finished(trained / name), spec(name), folders[name], data, norm=1e-4)


@pytest.mark.parametrize("layout", ["whole", "four", "zero2_whole"])
@families(TRAINED)
def test_a_checkpoint_goes_on_with_other_ranks_and_experts(name, layout, trained):
    assert_goes_on(name, layout, trained)


@families([name for name in TRAINED if FAMILIES[name].is_moe])
def test_a_checkpoint_goes_on_with_spread_experts_under_zero2(name, trained):
    assert_goes_on(name, "zero2", trained)


def assert_goes_on(name: str, layout: str, trained: Path) -> None:
    got, expected = curve(finished(trained / f"{name}-{layout}")), curve(trained / name)
    # The first eight rows are those of the checkpoint, to the second.
    assert got["seconds"][:8].to_list() == expected["seconds"][:8].to_list()
    for column, rel in (("loss", 1e-5), ("gradient_norm", 1e-4), ("learning_rate", 1e-9)):
        assert got[column].to_numpy() == pytest.approx(expected[column].to_numpy(), rel=rel)
    state = weights(trained / name)
    for key, value in weights(trained / f"{name}-{layout}").items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=2e-4, msg=key)


def average_micro_batches() -> None:
    """Let each micro-batch count the same, however many answer tokens it has."""
    own = training.Training._micro_batch

    def _micro_batch(self, examples, **told):
        told["answers"] = told["parts"] * sum(example.answer for example in examples)
        return own(self, examples, **told)

    training.Training._micro_batch = _micro_batch


def drop_gradients() -> None:
    """Let each rank lose the gradient of one matrix of one of its experts."""
    own = training.reduce_and_clip

    def reduce_and_clip(model, largest):
        next(p for p in model.parameters() if is_moe_param(p)).grad[0] = 0
        return own(model, largest)

    training.reduce_and_clip = reduce_and_clip


@pytest.fixture(scope="session")
def mistaken(folders, data, tmp_path_factory) -> Path:  # noqa: F811
    """Five steps of the families whose shape is kept from amplifying rounding, with a mistake."""
    output = tmp_path_factory.mktemp("mistaken")
    for mistake in (average_micro_batches, drop_gradients):
        runs = []
        for name in sorted(folders.keys() & set(STEADIED)):
            folder = output / f"{name}-{mistake.__name__}"
            folder.mkdir()
            planned = spec(name).model_copy(update={"until": 5})
            runs.append(Run(planned, {"model": folders[name], **data}, folder, prepare=mistake))
        launch(2, runs, output / f"{mistake.__name__}-store")
    return output


@pytest.mark.parametrize("mistake", ["average_micro_batches", "drop_gradients"])
@families(STEADIED)
def test_a_mistake_still_shows_where_rounding_is_kept_small(name, mistake, mistaken, trained):
    wrong, right = curve(mistaken / f"{name}-{mistake}"), curve(finished(trained / name))[:5]
    for column, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-4)):
        assert (wrong[column] / right[column] - 1).abs().max() > 10 * tolerance
