"""`evaluate`: one model on a sweep's evaluations, planned without a network."""

import socket
from argparse import Namespace
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.checks import check
from pipeline.job import Outcome
from pipeline.plan import build, build_evaluations
from pipeline.single import single_model
from pipeline.sweep_file import load
from stages.errors import BadInput

SWEEPS = Path(__file__).parents[2] / "sweeps"
SMOKE = SWEEPS / "smoke.yaml"
OLMOE, OLMO = "allenai/OLMoE-1B-7B-0924", "hub:allenai/OLMo-1B-hf@main"
SWITCH = "google/switch-base-32"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("planning went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def single(file, model, evaluations="all", *overrides):
    return single_model(
        Namespace(sweep=file, set=list(overrides), model=model, evaluations=evaluations))


def planned(file, *arguments):
    sweep = single(file, *arguments).sweep
    return build_evaluations(sweep, check(sweep, file))


def test_only_what_the_model_and_its_evaluations_need_is_planned():
    plan = planned(SMOKE, "tiny:mixtral", "questions")
    assert list(plan.nodes) == [  # what the sweep trains on, for it is kept out of the questions
        "model/tiny-mixtral", "data/reviews", "data/refusals", "data/questions",
        "evaluate/tiny-mixtral-none-questions"]
    assert plan.nodes["model/tiny-mixtral"].spec.source == "tiny:mixtral"
    # The same data set as in the sweep: its result is shared.
    sweep = load(SMOKE)
    whole = build(sweep, check(sweep, SMOKE))
    shared = plan.nodes["data/questions"].fingerprint
    assert shared == whole.nodes["data/questions"].fingerprint


@pytest.mark.parametrize(
    "model, expected",
    [("owner/moe@refs/pr/2", "moe-refs-pr-2"), ("hub:owner/moe@refs/pr/2", "moe-refs-pr-2"),
     ("owner/moe@main", "moe-main"), ("owner/moe", "moe"), ("pack:smollm2", "pack-smollm2")])
def test_a_model_is_named_after_its_source(model, expected):
    sweep = single(SMOKE, model, "questions").sweep
    assert sweep.name == expected and list(sweep.models) == [expected]


@pytest.mark.parametrize(
    "given, reason",
    [(("tiny:llama", "question"), "--evaluations question: .*did you mean 'questions'"),
     (("no such folder", "all"), "neither a folder here nor OWNER/NAME")])
def test_unknown_names_are_refused(given, reason):
    with pytest.raises(BadInput, match=reason):
        single(SMOKE, *given)


HEADS = dict.fromkeys(
    ("anli_head", "snli_hard_head", "mnli_adversarial_head", "mnli_mismatched_adversarial_head",
     "snli_counterfactual_head", "sst2_adversarial_head", "boss_nli_head", "boss_sa_head",
     "boss_td_head", "adv_civil_head", "style_head"),
    "method: head needs a recipe with `head: classification`, and there is none that is scored "
    "on it")
COUNTS = {"paper": ("truthfulqa_one_expert", "truthfulqa_four_experts"),
          "modern": ("truthfulqa_one_expert", "truthfulqa_three_experts"),
          "cpu": ("sciq_one_expert", "sciq_all_experts")}
DENSE = "technique.top_k: OLMo-1B-hf-main is dense and has no experts"
INSIDE = ("technique.kind: switch-base-32: switch_transformers chooses its experts inside its "
          "blocks, so their number per token cannot be set")


def for_decoders(**what):
    return {name: f"{'' if kind == name else 'technique.kind: '}{kind} is for decoders, "
                  "switch-base-32 is an encoder-decoder" for name, kind in what.items()}


def amateur(model):
    return {"truthfulqa_contrastive": "technique.amateur: comes from pack:smollm2, whose tokenizer "
                                      f"may be another than that of hub:{model}"}


ANSWERED = for_decoders(
    truthfulqa_dola="dola", nq_open_self_consistency="self_consistency", perplexity="perplexity")
WRITTEN = for_decoders(truthfulqa_generation_dola="dola")
LEFT_OUT = {
    ("paper", OLMOE): HEADS,
    ("modern", OLMOE): {},
    ("cpu", OLMOE): amateur(OLMOE),
    ("paper", OLMO): HEADS | dict.fromkeys(COUNTS["paper"], DENSE),
    ("modern", OLMO): dict.fromkeys(COUNTS["modern"], DENSE),
    ("cpu", OLMO): dict.fromkeys(COUNTS["cpu"], DENSE) | amateur("allenai/OLMo-1B-hf"),
    ("paper", SWITCH): HEADS | dict.fromkeys(COUNTS["paper"], INSIDE) | ANSWERED | WRITTEN,
    ("modern", SWITCH): dict.fromkeys(COUNTS["modern"], INSIDE) | ANSWERED | WRITTEN,
    ("cpu", SWITCH): dict.fromkeys(COUNTS["cpu"], INSIDE) | ANSWERED | for_decoders(
        truthfulqa_contrastive="contrastive"),
}


@pytest.mark.parametrize(("name", "model"), LEFT_OUT, ids=lambda value: value.split("/")[-1])
def test_of_all_evaluations_those_are_left_out_that_the_model_cannot_do(name, model):
    file = SWEEPS / "moe_rbench" / f"{name}.yaml"
    found = single(file, model)
    assert found.left_out == LEFT_OUT[name, model]
    assert found.lines() == [f"left out  {key}: {reason}"
                             for key, reason in found.left_out.items()]
    plan = build_evaluations(found.sweep, check(found.sweep, file))
    asked = {node.name for node in plan.nodes.values() if node.stage == "evaluate"}
    whole = load(file).evaluations
    assert asked == {f"{found.sweep.name}-none-{key}" for key in whole.keys() - found.left_out}
    assert len(whole) == {"paper": 42, "modern": 28, "cpu": 20}[name]


@pytest.mark.parametrize(
    ("model", "evaluation", "told"),
    [(OLMOE, "anli_head", "anli_head.method: head needs a recipe with `head: classification`"),
     (OLMO, "truthfulqa,truthfulqa_one_expert", "OLMo-1B-hf-main is dense and has no experts; "
                                                "remove technique"),
     (SWITCH, "perplexity", "perplexity is for decoders, switch-base-32 is an encoder-decoder"),
     ("google/vit-base-patch32-384", "anli", "anli: snli_validation is of task nli, "
                                             "vit-base-patch32-384 reads images; name others")])
def test_what_is_named_and_cannot_be_done_is_refused(model, evaluation, told):
    file = SWEEPS / "moe_rbench" / "paper.yaml"
    with pytest.raises(BadInput, match=f"{file}: evaluations.*{told}"):
        planned(file, model, evaluation)


def test_more_experts_than_the_model_has_are_left_out():
    file = SWEEPS / "moe_rbench" / "modern.yaml"
    found = single(
        file, OLMOE, "all", "evaluations.truthfulqa_three_experts.technique.top_k=65")
    assert found.left_out == {
        "truthfulqa_three_experts": "technique.top_k: 65 is more than the 64 experts of "
                                    "OLMoE-1B-7B-0924"}


def test_an_amateur_of_the_models_own_source_is_asked():
    """The sweep's other models are only what it is made of: none of them is scored."""
    plan = planned(SWEEPS / "moe_rbench" / "cpu.yaml", "pack:smollm2")
    node = plan.nodes["evaluate/pack-smollm2-none-truthfulqa_contrastive"]
    assert node.inputs["amateur/smollm2-narrow"] == "model/smollm2-narrow"
    named = planned(SWEEPS / "moe_rbench" / "cpu.yaml", OLMOE, "truthfulqa_contrastive,sciq_"
                    "one_expert").nodes
    assert [key for key in named if key.startswith("evaluate")] == [
        f"evaluate/OLMoE-1B-7B-0924-none-{name}"
        for name in ("truthfulqa_contrastive", "sciq_one_expert")]


def test_a_model_named_like_an_amateur_does_not_take_its_place():
    file, asked = SWEEPS / "moe_rbench" / "cpu.yaml", "truthfulqa_contrastive"
    amateur = load(file).models["smollm2-narrow"]
    sweep = single(file, "owner/smollm2-narrow", asked).sweep
    assert sweep.name == "smollm2-narrow-evaluated"
    assert sweep.models[sweep.name].source == "hub:owner/smollm2-narrow@main"
    assert sweep.models["smollm2-narrow"] == amateur
    # Without an amateur no other model is held.
    assert list(single(file, "owner/smollm2-narrow", "sciq").sweep.models) == ["smollm2-narrow"]


def test_what_is_wrong_with_the_sweep_is_no_gap():
    file = SWEEPS / "moe_rbench" / "cpu.yaml"
    for override, told in (
        ("evaluations.truthfulqa_contrastive.technique.amateur=smollm", "unknown model 'smollm'"),
        ("evaluations.sciq.dataset=sciqq", "evaluations.sciq: unknown data set 'sciqq'"),
        ("models.smollm2-split.upcycle.from=nobody", "unknown model 'nobody'"),
    ):
        with pytest.raises(BadInput, match=told):
            planned(file, "pack:smollm2", "all", override)


def test_images_are_for_models_of_images():
    study = SWEEPS / "adversarial_moe" / "vision_cpu.yaml"
    with pytest.raises(BadInput, match="can do none of those of .*vision_cpu.yaml; name another"
                                       "(.|\n)*left out  images: mnist is of task images, OLMoE"):
        single(study, OLMOE)
    # Verdicts are about its pairs, and its models are drawn: neither is in the way of another.
    found = single(study, "google/vit-base-patch32-384")
    dense = "vit-base-patch32-384 is dense and has no experts"
    assert found.left_out == {
        "attacks": "attacks: transfer to vit-base-patch32-384 has no other model to attack",
        **dict.fromkeys(
            ("interventions", "interventions_attacked", "geometry", "specialisation"), dense)}
    plan = build_evaluations(found.sweep, check(found.sweep, study))
    assert {n.spec.evaluation.kind for n in plan.nodes.values() if n.stage == "evaluate"} == {
        "image_classification", "image_lipschitz"}


def test_what_is_left_out_is_told_before_the_work_and_with_its_result(
    tmp_path, monkeypatch, capsys
):
    def failed(plan, *_):
        print("work")
        return {key: Outcome("failed", "no time") for key in plan.nodes}

    monkeypatch.setattr(cli, "_execute", failed)
    command = ["evaluate", OLMO, "--sweep", str(SWEEPS / "moe_rbench" / "modern.yaml"),
               "--store", str(tmp_path), "--evaluations"]
    assert cli.main([*command, "all"]) == 1
    before, after = capsys.readouterr().out.split("work\n")
    lines = [f"left out  {name}: {DENSE}" for name in COUNTS["modern"]]
    assert before.splitlines() == lines
    assert after.splitlines()[-2:] == lines
    assert after.count("failed: no time") == 26 == len(after.splitlines()) - 2
