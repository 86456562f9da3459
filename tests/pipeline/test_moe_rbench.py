"""The 44 released MoE-RBench scripts are recipes that plan without a network."""

import re
import socket
from pathlib import Path

import pytest
import torch

from pipeline.checks import check, check_plan
from pipeline.plan import build
from pipeline.sweep_file import load
from stages.finetune.evidence import Evidence
from stages.finetune.head import with_head
from stages.finetune.knobs import Knobs
from stages.finetune.recipe import AdamW, Cosine, Dropout, Experts, FreeLB, Linear, Recipe, Step
from stages.finetune.refusals import inapplicable
from stages.models.families import FAMILIES
from stages.models.sources import Facts
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY
from tests.stages.models.tiny_folders import dense_model

FOLDER = Path(__file__).parents[2] / "sweeps" / "moe_rbench"
SCRIPT_FILES = ("adv_nli", "boss_nli", "boss_sa", "boss_td", "snli_hard", "style_ood")
# Script, model, learning rate, global batch, epochs, schedule, expert dropout, weight of the
# balance and z-loss, router frozen (Y), precision, dropout, round of ANLI that it begins with,
# steps between two evaluations: as released, `2e-1:` read as 0.2.
SCRIPTS = """
adv_nli/llama_moe_2_16 llama-moe-2-16 2e-5 128 3 step 0 0 Y bf16 0.1 1 10
adv_nli/llama_moe_2_8 llama-moe-2-8 2e-5 128 3 step 0 0 Y bf16 0.1 1 10
adv_nli/llama_moe_4_16 llama-moe-4-16 2e-5 128 3 step 0.1 1e-3 - bf16 0.1 3 10
adv_nli/molm_350m_4B molm-350m-4b 1e-4 128 3 step 0.2 0 Y bf16 0.1 1 20
adv_nli/molm_700m_4b molm-700m-4b 1e-4 256 4 step 0.1 0 Y bf16 0.1 1 10
adv_nli/molm_700m_8b molm-700m-8b 1e-4 128 3 cosine 0.2 0 Y bf16 0.1 2 10
adv_nli/open_llama open-llama-3b 2e-5 128 3 step 0 0 Y bf16 0.1 2 10
adv_nli/pythia_1_4B pythia-1.4b 3e-5 128 4 step 0 0 Y bf16 0.1 2 10
adv_nli/pythia_410m pythia-410m 2e-5 64 3 step 0 0 Y bf16 0.1 2 20
adv_nli/switch switch-base-32 1e-4 256 3 step 0.2 0 Y fp32 0.1 1 20
adv_nli/t5 t5-base 1e-4 128 3 step 0.1 0 - fp32 0.1 1 10
boss_nli/molm_nli molm-350m-4b 1e-4 256 3 step 0.3 0 Y bf16 0.1 - 10
boss_nli/pythia_nli pythia-410m 5e-5 256 3 step 0.1 0 - bf16 0.1 - 10
boss_nli/switch_nli switch-base-32 1e-4 256 3 step 0.1 0 Y fp32 0.1 - 10
boss_nli/t5_nli t5-base 1e-4 256 3 step 0.1 0 - bf16 0.1 - 10
boss_sa/molm_sa molm-350m-4b 1e-4 256 6 linear 0.1 0 - bf16 0.1 - 10
boss_sa/pythia_sa pythia-410m 5e-5 128 6 linear 0.1 0 - bf16 0.1 - 10
boss_sa/switch_sa switch-base-32 1e-4 128 6 linear 0.1 0 Y fp32 0.1 - 10
boss_sa/t5_sa t5-base 1e-4 256 5 step 0.1 0 - bf16 0.1 - 10
boss_td/molm_td molm-350m-4b 1e-4 256 4 linear 0.1 0 Y bf16 0.1 - 10
boss_td/pythia_td pythia-410m 5e-5 256 4 linear 0.1 0 - bf16 0.1 - 10
boss_td/switch_td switch-base-32 1e-4 256 4 step 0.1 0 Y fp32 0.1 - 10
boss_td/t5_td t5-base 1e-4 256 4 step 0.1 0 - bf16 0.1 - 10
snli_hard/llama_moe_2_16 llama-moe-2-16 2e-5 128 2 step 0.2 1e-3 Y bf16 0.1 - 40
snli_hard/llama_moe_2_8 llama-moe-2-8 2e-5 128 2 step 0.2 1e-3 Y bf16 0.1 - 40
snli_hard/llama_moe_4_16 llama-moe-4-16 2e-5 128 2 step 0.2 1e-3 Y bf16 0.1 - 40
snli_hard/molm_350m_4b molm-350m-4b 1e-4 256 2 step 0.1 0 Y bf16 0.1 - 10
snli_hard/molm_700m_4b molm-700m-4b 1e-4 128 2 step 0.2 1e-3 Y bf16 0.1 - 10
snli_hard/open_llama open-llama-3b 2e-5 128 2 step 0.2 1e-3 Y bf16 0.1 - 40
snli_hard/pythia_410m pythia-410m 5e-5 256 2 step 0.1 0 Y bf16 0.1 - 10
snli_hard/switch switch-base-32 5e-5 128 3 step 0.1 0 Y fp32 0.1 - 10
snli_hard/t5 t5-base 1e-4 256 3 step 0.1 0 Y fp32 0.1 - 10
style_ood/llama_moe_2_16 llama-moe-2-16 2e-5 64 4 step 0 1e-3 - bf16 0 - 10
style_ood/llama_moe_2_8 llama-moe-2-8 5e-5 64 2 step 0 1e-3 - bf16 0 - 10
style_ood/llama_moe_4_16 llama-moe-4-16 2e-5 64 2 step 0 1e-3 - bf16 0 - 10
style_ood/molm_350m_4B molm-350m-4b 1e-4 128 4 step 0.2 0 Y bf16 0.1 - 20
style_ood/molm_700m_4B molm-700m-4b 1e-4 128 4 step 0.2 0 Y bf16 0.1 - 10
style_ood/molm_700m_8B molm-700m-8b 1e-4 128 4 step 0.1 0 - bf16 0.1 - 10
style_ood/open-llama-7b open-llama-7b 5e-5 256 3 step 0 1e-3 - bf16 0 - 50
style_ood/open_llama open-llama-3b 2e-5 256 2 step 0 1e-3 - bf16 0 - 10
style_ood/pythia_1.4b pythia-1.4b 2e-5 128 4 cosine 0.1 0 - bf16 0.1 - 10
style_ood/pythia_410m pythia-410m 5e-5 128 4 step 0.1 0 - bf16 0.1 - 20
style_ood/switch switch-base-32 1e-4 256 4 step 0.2 1e-3 Y fp32 0.1 - 20
style_ood/t5 t5-base 1e-4 128 4 step 0.1 0 - bf16 0.1 - 50
"""

MAX_LENGTH = {"adv_nli": 256, "snli_hard": 512, "style_ood": 256, "boss_nli": 512, "boss_sa": 512,
              "boss_td": 512}  # fmt: skip
"""Tokens; of the styles the released code is not on record, and 256 is this project's."""
AXES = {"anli": "adv_nli", "snli-hard": "snli_hard", "boss-nli": "boss_nli", "boss-sa": "boss_sa",
        "boss-td": "boss_td", "style": "style_ood"}  # fmt: skip
"""How paper.yaml's recipes begin, and the file of the scripts."""
SCHEDULES = {"step": Step(gamma=0.85, every="epoch"), "linear": Linear(),
             "cosine": Cosine(cycles=3)}  # fmt: skip


@pytest.fixture(scope="module")
def planned():
    """The fine-tune nodes of each file by script and model."""
    connect, socket.socket.connect = socket.socket.connect, _refuse
    try:
        found = {}
        for file in (FOLDER / f"{name}.yaml" for name in SCRIPT_FILES):
            sweep = load(file)
            plan = build(sweep, check(sweep, file))
            check_plan(plan, file)
            for name, recipe in sweep.recipes.items():
                for model in recipe.models:
                    node = plan.nodes[f"finetune/{model}-{name}-seed42"]
                    found[f"{file.stem}/{name}", model] = node
        return found
    finally:
        socket.socket.connect = connect


def _refuse(*_):
    raise AssertionError("planning went to the network")


def test_every_script_is_there_and_no_other(planned):
    scripts = [line.split()[0] for line in SCRIPTS.split("\n") if line]
    # Earlier rounds of a script that trains in rounds are recipes of their own.
    found = {script for script, _ in planned if not script.endswith(("_r1", "_r2"))}
    assert len(scripts) == 44 and set(scripts) == found


@pytest.mark.parametrize("line", [line for line in SCRIPTS.split("\n") if line])
def test_a_recipe_has_the_settings_of_its_script(planned, line):
    """So has every earlier round of a script, and the dense partner that shares the recipe."""
    fields = line.split()
    script, model, rate, batch, epochs, schedule, dropout, weight, frozen, precision = fields[:10]
    added, begin, _ = fields[10:]
    rounds = range(int(begin), 4) if begin != "-" else ()
    names = {f"{script}_r{number}" for number in rounds if number < 3} | {script}
    found = {key: node.spec for key, node in planned.items() if key[0] in names}
    assert {name for name, _ in found} == names
    assert {name for name, trained in found if trained == model} == names
    for (_, trained), spec in found.items():
        assert spec.learning_rate == float(rate)
        sizes = (spec.batch_size, spec.epochs, spec.steps, spec.precision)
        assert sizes == (int(batch), int(epochs), None, precision)
        assert spec.max_length == MAX_LENGTH[script.partition("/")[0]]
        assert spec.schedule == SCHEDULES[schedule]
        warmup = 0.1 if schedule == "cosine" else 0.0
        assert (spec.warmup_ratio, spec.warmup_steps) == (warmup, 0)
        assert spec.weight_decay == 1e-3 and spec.optimizer == AdamW()
        assert spec.gradient_clipping is None and spec.seed == 42
        moe = "moe" in trained or "molm" in trained or "switch" in trained
        assert spec.experts == Experts(dropout=float(dropout) if moe else 0.0)
        assert spec.auxiliary_loss_weight == spec.z_loss_weight == (float(weight) if moe else 0.0)
        assert spec.freeze == (("router",) if moe and frozen == "Y" else ())
        decoder = not trained.startswith(("t5", "switch"))
        # The others have the 0.1 of their configuration.
        assert spec.dropout == Dropout(residual=float(added) if decoder else 0.0)
        assert decoder or float(added) == 0.1
        assert spec.head == ("classification" if decoder else "language_model")
        # And nothing else that a recipe can do.
        others = ("router", "train", "lora", "alternate", "adversarial", "validation",
                  "importance_loss_weight", "load_loss_weight", "gshard_loss_weight")  # fmt: skip
        for name in others:
            assert getattr(spec, name) == Recipe.model_fields[name].default, name


def test_a_recipes_comment_has_the_arguments_of_its_script():
    """Those that are left out are named, in the head of the file and in README."""
    told = {}
    for file in SCRIPT_FILES:
        text = (FOLDER / f"{file}.yaml").read_text()
        assert "\n# - ev is left out: " in text
        # Remarks may stand between the arguments and the recipe's name.
        pattern = r"^  # lr (\S+), .*dr (\S+), .* ev (\d+)\.\n(?:  # .*\n)*  (\S+):$"
        for rate, added, every, name in re.findall(pattern, text, re.M):
            told.setdefault(f"{file}/{name.removesuffix(_tail(name))}", set()).add(
                (rate, added, every))
    lines = [line.split() for line in SCRIPTS.split("\n") if line]
    assert told == {line[0]: {(line[2], line[10], line[12])} for line in lines}
    assert "| `ev` | left out. " in (FOLDER / "README.md").read_text()


def test_the_sweep_of_all_axes_trains_as_the_scripts_do(planned):
    sweep = load(FOLDER / "paper.yaml")
    plan = build(sweep, check(sweep, FOLDER / "paper.yaml"))
    robust, safe = 0, 0
    for key, node in plan.nodes.items():
        if node.stage != "finetune":
            continue
        spec, end = node.spec, f"-seed{node.spec.seed}"
        recipe = next(name for name in sweep.recipes if key.endswith(f"-{name}{end}"))
        if not recipe.startswith("safety"):
            # The script of the same round that trains this recipe's Mixture-of-Experts model.
            file = next(file for axis, file in AXES.items() if recipe.startswith(axis))
            moe = sweep.recipes[recipe].models[0]
            (script,) = {script for script, model in planned
                         if model == moe and script.startswith(f"{file}/")
                         and _tail(script)[1:] == _tail(recipe)[1:]}  # fmt: skip
            same = {model == moe: _settings(other) for (name, model), other in planned.items()
                    if name == script}  # fmt: skip
            assert _settings(node) == same[f"/{moe}-" in key], key
            robust += 1
            continue
        sizes = (spec.learning_rate, spec.batch_size, spec.epochs, spec.max_length, spec.precision)
        assert sizes == (2e-5, 128, 1, 512, "bf16") and spec.schedule == SCHEDULES["step"]
        assert (spec.weight_decay, spec.gradient_clipping, spec.head) == (0, None, "language_model")
        assert (spec.dropout, spec.experts, spec.freeze) == (Dropout(), Experts(), ())
        more = {"safety-0": [], "safety-500": [500], "safety-1000": [1000]}[recipe]
        assert [train.limit for train in spec.data] == [None, *more]
        safe += 1
    recipes = [name for name in sweep.recipes if not name.startswith("safety")]
    assert (len(recipes), robust, safe) == (37, 75, 27)


def _tail(name):
    """Of the name of a recipe for an earlier round of ANLI; empty for others."""
    return name[-3:] if name.endswith(("_r1", "_r2", "-r1", "-r2")) else ""


def _settings(node):
    """All that a recipe says, but for the names of its data sets."""
    settings = node.spec.identity()
    data = [(train["template"], train["limit"], train["repeat"]) for train in settings.pop("data")]
    return settings, data


@pytest.mark.parametrize("file", SCRIPT_FILES)
def test_every_script_can_be_trained_against_an_adversary(file):
    names = [name for name in load(FOLDER / f"{file}.yaml").recipes if "." not in name]
    sweep = load(FOLDER / f"{file}.yaml", [f"recipes.{name}.adversarial={{}}" for name in names])
    plan = build(sweep, check(sweep, FOLDER / f"{file}.yaml"))
    trained = [node.spec for node in plan.nodes.values() if node.stage == "finetune"]
    assert sum(spec.adversarial == FreeLB() for spec in trained) >= len(names)
    facts = [Facts("moe" if FAMILIES[name].is_moe else "dense", name) for name in FAMILY.values()]
    for of in facts:
        recipe = trained[0].model_copy(update={"adversarial": FreeLB(), "head": "language_model"})
        assert "adversarial" not in dict(inapplicable(recipe, of)), of.family


def test_the_rounds_of_anli_are_trained_one_after_the_other(planned):
    first, second, third = (planned[f"adv_nli/llama_moe_2_16{end}", "llama-moe-2-16"]
                            for end in ("_r1", "_r2", ""))  # fmt: skip
    assert first.inputs["model"] == "model/llama-moe-2-16"
    assert second.inputs["model"] == first.key and third.inputs["model"] == second.key
    for number, node in enumerate((first, second, third), start=1):
        sets = [(train.dataset, train.split) for train in node.spec.data]
        assert sets == [(f"anli_r{number}", "train"), ("snli", f"r{number}")]
        assert node.spec.epochs == 3
    # A script that begins with a later round leaves the earlier ones out.
    assert planned["adv_nli/llama_moe_4_16", "llama-moe-4-16"].inputs["model"].startswith("model/")


def test_each_round_of_anli_is_trained_by_itself_too(planned):
    file = FOLDER / "adv_nli_rounds.yaml"
    sweep = load(file)
    plan = build(sweep, check(sweep, file))
    rounds = {key: node for key, node in plan.nodes.items() if node.stage == "finetune"}
    assert len(rounds) == 7 * 3 * 2
    for key, node in rounds.items():
        number = key.removesuffix("-seed42")[-1]
        sets = [(train.dataset, train.split) for train in node.spec.data]
        assert sets == [(f"anli_r{number}", "train"), ("snli", f"r{number}")]
        assert node.inputs["model"].startswith("model/")
    first, settings = 0, 0
    for (script, model), node in planned.items():
        name = script.removeprefix("adv_nli/")
        if mine := rounds.get(f"finetune/{model}-{name}-seed42"):
            if name.endswith("_r1"):  # the same fine-tune, whichever sweep makes it
                assert mine.fingerprint == node.fingerprint
                first += 1
            continue
        for number in (1, 2, 3):
            if mine := rounds.get(f"finetune/{model}-{name}_r{number}-seed42"):
                assert _settings(mine) == _settings(node)
                settings += 1
    assert (first, settings) == (5 * 2, 3 * 7 * 2)


def test_the_dense_partner_has_the_same_recipe(planned):
    moe = planned["snli_hard/llama_moe_2_16", "llama-moe-2-16"].spec
    dense = planned["snli_hard/llama_moe_2_16", "open-llama-3b"].spec
    assert dense.dropped == {"auxiliary_loss_weight": 1e-3, "z_loss_weight": 1e-3,
                             "experts.dropout": 0.2, "freeze": ["router"]}  # fmt: skip
    for field in ("data", "epochs", "batch_size", "learning_rate", "schedule", "precision"):
        assert getattr(moe, field) == getattr(dense, field)


FAMILY = {
    "switch": "switch_transformers", "t5": "t5", "molm": "moduleformer", "pythia": "gpt_neox",
    "llama-moe": "llama_moe", "open-llama": "llama", "olmoe": "olmoe", "olmo-1b": "olmo",
    "qwen1.5-moe": "qwen2_moe", "qwen1.5-1.8b": "qwen2", "qwen3-30b": "qwen3_moe",
    "qwen3-4b": "qwen3", "mixtral": "mixtral", "mistral": "mistral",
    "deepseek-v2-lite": "deepseek_v2", "deepseek-7b": "llama",
}  # fmt: skip
"""The architecture of each model of the sweeps, by the beginning of its name; transformers has none
for DeepSeek-MoE-16B."""


@pytest.mark.parametrize("file", (*SCRIPT_FILES, "adv_nli_rounds", "paper", "modern"))
def test_every_knob_of_a_recipe_can_be_installed_in_a_model_of_its_family(file):
    """A plan that is accepted does not fail when its training starts."""
    sweep = load(FOLDER / f"{file}.yaml")
    plan = build(sweep, check(sweep, FOLDER / f"{file}.yaml"))
    installed = {}
    for key, node in plan.nodes.items():
        name = next((f for n, f in FAMILY.items() if key.startswith(f"finetune/{n}")), None)
        if node.stage != "finetune" or name is None:
            continue
        spec, entry = node.spec, FAMILIES[name]
        knobs = (name, spec.labels, spec.router, spec.experts, spec.dropout)
        if knobs in installed:
            continue
        facts = Facts("moe" if entry.is_moe else "dense", name, experts=4, top_k=2)
        assert not list(inapplicable(spec, facts)), key
        model = tiny_model(name, tiny_tokenizer(), 0) if name in TINY else dense_model(name)
        model.eval()
        if spec.labels:
            model = with_head(model, spec.labels, model.config.pad_token_id, spec.seed)
        evidence = Evidence()
        hooks = Knobs(model, spec, evidence)
        hooks.attach()
        tokens = torch.arange(3, 67)[None]
        given = {"decoder_input_ids": tokens} if entry.encoder_decoder else {}
        with hooks.forward(), torch.no_grad():
            model(input_ids=tokens, **given, use_cache=False)
        routed, added = spec.experts.dropout, spec.dropout.residual
        # A block may add nothing but what its experts do, whose zeros are counted again then.
        both = 1 - (1 - routed) * (1 - added)
        for knob, p, most in (("experts.dropout", routed, routed),
                              ("dropout.residual", added, both if added else 0)):  # fmt: skip
            share = evidence.measured(knob).get("share_of_outputs_dropped", 0.0)
            # Tokens beyond a capacity are 0 as well.
            assert p - 0.03 < share < (1 if entry.capacity else most + 0.03), f"{key}: {knob}"
        installed[knobs] = key
    assert installed
