"""What a recipe asks of forward passes leaves evidence in every family that is not refused it, and
a run in which it leaves none stops."""

import pytest

from stages.errors import StageFailed
from stages.finetune.evidence import MEASURED_IN_STEPS, Evidence, asked, require
from stages.finetune.refusals import inapplicable
from stages.models.families import FAMILIES
from stages.models.sources import Facts
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY
from tests.stages.finetune.passes import recipe, run
from tests.stages.finetune.results import curve, measured, spec
from tests.stages.finetune.runs import Run, launch

OF_PASSES = {
    "router.noise": {"router": {"noise": 0.3}},
    "router.jitter": {"router": {"jitter": 0.2}},
    "router.top_k": {"router": {"top_k": 3}},
    "router.assignment": {"router": {"assignment": "random"}},
    "experts.dropout": {"experts": {"dropout": 0.2}},
    "experts.drop": {"experts": {"drop": 0.4}},
    "dropout.residual": {"dropout": {"residual": 0.2}},
    "dropout.attention": {"dropout": {"attention": 0.1}},
}
MOE = [n for n in TINY if FAMILIES[n].is_moe and FAMILIES[n].modality == "text"]


@pytest.mark.parametrize("name", [*MOE, "llama"])
def test_what_is_not_refused_leaves_evidence_of_each_knob_together(name):
    model, entry = tiny_model(name, tiny_tokenizer(), seed=3), FAMILIES[name]
    experts, top_k = entry.experts_of(model.config.to_dict())
    facts = Facts("moe" if entry.is_moe else "dense", name, experts=experts, top_k=top_k)
    together = {}
    for fields in OF_PASSES.values():
        if not list(inapplicable(recipe(**fields), facts)):
            together |= {k: together.get(k, {}) | v for k, v in fields.items()}
    if "router" in together:  # the capacity's evidence is the training step's
        assert {"noise", "jitter"} <= set(together["router"])
    _, _, evidence = run(model, **together)
    require(evidence, recipe(**together))
    found = [knob for knob in asked(recipe(**together)) if knob in MEASURED_IN_STEPS]
    assert found and all(evidence.measured(knob) for knob in found)
    with pytest.raises(StageFailed, match=f"^{', '.join(found)}: the first step left no evidence"):
        require(Evidence(), recipe(**together))


def test_knobs_of_the_whole_run_are_not_asked_for_in_its_first_step():
    require(Evidence(), recipe(weight_decay=0.1, train=["router"], router={"learning_rate": 0.1}))


def _admit_all() -> None:
    from stages.finetune import loop

    loop.inapplicable = lambda *_: ()


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    """Of three steps, with nothing refused."""
    folder, planned = tmp_path_factory.mktemp("idle"), []
    for name in ("switch_transformers", "mixtral"):
        given = spec(train=("router",), experts={"drop": 0.5}, workers=1)
        inputs = {"model": models[name], **data}
        (folder / name).mkdir()
        planned.append(Run(given, inputs, folder / name, prepare=_admit_all))
    launch(1, planned, folder / "store")
    return folder


def test_a_run_stops_where_a_knob_met_nothing_in_its_first_step(runs):
    message = (runs / "switch_transformers" / "failed_0.txt").read_text()
    assert message.startswith("experts.drop: the first step left no evidence") and (
        message.endswith("remove it from the recipe") and "\n" not in message)
    assert not (runs / "switch_transformers" / "training_curve.parquet").exists()
    assert len(curve(runs / "mixtral")) == 3
    assert 0 < measured(runs / "mixtral", "experts.drop")["share_of_experts_dropped"] < 1
