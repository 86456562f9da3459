"""What a recipe does unasked has evidence, and weight decay acts on all that is trained."""

from types import SimpleNamespace

import pytest
import torch

from stages.finetune.training import Training
from tests.stages.finetune.results import curve, evidence, spec, weights
from tests.stages.finetune.runs import Run, launch

DECAY = 10.0


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    folder, planned = tmp_path_factory.mktemp("defaults"), []
    for name, fields in (("plain", {}), ("decay", {"weight_decay": DECAY})):
        (folder / name).mkdir()
        inputs = {"model": models["llama"], **data}
        planned.append(Run(spec(workers=1, **fields), inputs, folder / name))
    (folder / "wrong").mkdir()
    planned.append(Run(spec(workers=1), inputs, folder / "wrong", prepare=_export_otherwise))
    launch(1, planned, folder / "store")
    return folder


def _export_otherwise() -> None:
    """Let what is exported be other weights than those that were trained."""
    from stages.finetune import loop

    own = loop.gather_state_dict
    loop.gather_state_dict = lambda model: {n: 1.1 * value for n, value in own(model).items()}


def test_an_export_that_computes_otherwise_ends_the_run(runs):
    message = (runs / "wrong" / "failed_0.txt").read_text()
    assert "the exported model's logits differ from the training engine's by" in message
    assert "(allowed 1.00e-04)" in message


def test_what_acts_by_default_has_evidence(runs):
    found, rows = evidence(runs / "plain")["knobs"], curve(runs / "plain")
    assert list(found) == ["learning_rate", "batch_size", "steps", "optimizer", "schedule",
                           "gradient_clipping", "precision"]
    assert found["learning_rate"]["measured"] == {"learning_rates": {"all": 3e-3}}
    assert found["batch_size"] == {"asked": 8, "measured": {
        "sequences_in_a_step": 8, "micro_batches_per_worker": 4}}
    assert found["steps"] == {"asked": 3, "measured": {
        "steps": 3, "passes_over_the_rows": 3 * 8 / 21}}
    assert found["gradient_clipping"]["asked"] == 1.0
    assert found["gradient_clipping"]["measured"] == {
        "largest_norm": rows["gradient_norm"].max(),
        "steps_clipped": (rows["gradient_norm"] > 1).sum(),
    }
    assert found["schedule"]["asked"] == "linear"
    rates = {"first": 3e-3, "at_1_of_4": 3e-3, "at_2_of_4": 2e-3, "at_3_of_4": 2e-3,
             "largest": 3e-3, "last": 1e-3}
    assert found["schedule"]["measured"] == pytest.approx(rates)
    assert found["optimizer"]["asked"] == "adamw"
    assert found["optimizer"]["measured"]["betas"] == [0.9, 0.999]
    both = {"weights": ["torch.float32"], "optimizer": ["torch.float32"]}
    assert found["precision"] == {"asked": "fp32", "measured": both}


def test_precision_is_told_of_all_weights_and_not_of_the_first():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16()])
    groups = [{"params": list(layer.parameters())} for layer in model]
    optimizer = SimpleNamespace(param_groups=groups)
    engine = SimpleNamespace(module=model, basic_optimizer=optimizer,
                             zero_optimization_partition_weights=lambda: False)  # fmt: skip
    both = ["torch.bfloat16", "torch.float32"]
    assert Training.dtypes(SimpleNamespace(engine=engine)) == {"weights": both, "optimizer": both}


def test_weight_decay_acts_on_norms_too(runs):
    """Two norms in each of four layers, and the last one."""
    knobs = evidence(runs / "decay")["knobs"]
    assert knobs["weight_decay"]["measured"]["parameters_of_norms_and_biases"] == 9 * 64
    decayed, plain = weights(runs / "decay"), weights(runs / "plain")
    norms = [name for name, value in plain.items() if value.ndim == 1]
    assert len(norms) == 9
    rates = torch.tensor(curve(runs / "decay")["learning_rate"])
    kept = (1 - DECAY * rates).prod().item()
    for name in norms:
        # The steps themselves move a norm by less than 0.006.
        share = (decayed[name] / plain[name]).mean().item()
        assert share == pytest.approx(kept, abs=0.02) and kept < 0.95
