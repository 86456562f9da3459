"""The graph of a sweep, fingerprints, and what is done, stale or to run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.checks import check
from pipeline.plan import build
from pipeline.store import Store
from pipeline.survey import survey
from pipeline.sweep import model_spec
from pipeline.sweep_file import load
from stages.compare.spec import CompareSpec
from stages.data.spec import DataSpec
from stages.errors import BadInput
from stages.evaluate.spec import EvaluateSpec, JudgeSpec
from stages.finetune.spec import FinetuneSpec
from stages.models.spec import EveryNth, SourceSpec, UpcycleSpec, WidenSpec
from stages.models.vision_spec import VisionSpec

SMOKE = Path(__file__).parents[2] / "sweeps" / "smoke.yaml"

FIELDS = {
    DataSpec: (
        {"task", "source", "format", "content", "columns", "labels", "splits", "rows", "seed",
         "corruption", "rows_per_label", "shared_documents"},
        set()),
    SourceSpec: ({"source", "content", "seed", "labels"}, set()),
    UpcycleSpec: (
        {"experts", "top_k", "layers", "experts_from", "drop", "noise", "rescale", "router",
         "seed"}, set()),
    VisionSpec: (
        {"size", "hidden", "depth", "neurons", "heads", "patch", "image_size", "channels",
         "labels", "experts", "top_k", "layers", "capacity_factor", "eval_capacity_factor",
         "group_size", "batch_prioritized", "shared_start", "head", "head_neurons", "head_experts",
         "head_top_k", "ensemble", "ensemble_of", "seed"}, set()),
    WidenSpec: ({"top_k", "parts", "layers", "drop", "noise", "seed"}, set()),
    FinetuneSpec: (
        {"data", "steps", "batch_size", "max_length", "learning_rate", "schedule", "warmup_steps",
         "weight_decay", "gradient_clipping", "auxiliary_loss_weight", "precision", "seed",
         "epochs", "warmup_ratio", "optimizer", "max_nonfinite_steps", "train", "freeze", "lora",
         "alternate", "z_loss_weight", "router", "experts", "dropout", "adversarial", "until",
         "head", "importance_loss_weight", "load_loss_weight", "gshard_loss_weight", "validation",
         "rows_seed", "steps_before"},
        {"workers", "expert_parallel", "micro_batch", "checkpoint_every", "deepspeed_config",
         "threads", "dropped", "out_of_memory_at"}),
    EvaluateSpec: (
        {"evaluation", "dtype", "engine"},
        {"workers", "cpus", "gpus", "expert_parallel", "shard_size"}),
    JudgeSpec: ({"kind", "source", "content"}, set()),
    CompareSpec: (
        {"title", "pairs", "recipes", "models_of", "evaluations_of", "seeds", "evaluations",
         "resamples", "seed", "notes", "hypotheses", "upcycled", "may_share"},
        set()),
}


@pytest.mark.parametrize("spec", FIELDS, ids=lambda spec: spec.__name__)
def test_every_field_is_classed_as_identity_or_run_time(spec):
    """A new field must be added to FIELDS, in the set that says whether it changes results."""
    identity, run_time = FIELDS[spec]
    assert spec.run_time_fields() == run_time
    assert set(spec.model_fields) - run_time == identity


def plan_of(*overrides: str):
    sweep = load(SMOKE, list(overrides))
    return build(sweep, check(sweep, SMOKE))


def test_graph_has_one_node_for_each_stage_of_each_member():
    plan = plan_of()
    counts = {}
    for node in plan.nodes.values():
        counts[node.stage] = counts.get(node.stage, 0) + 1
    # 6 data sets; dense and MoE; one fine-tune each; (untuned + tuned) × 2 models × 4 evaluations.
    assert counts == {"data": 6, "model": 2, "finetune": 2, "evaluate": 16, "compare": 1}
    assert plan.nodes["finetune/tiny-moe-sft-seed0"].inputs == {
        "model": "model/tiny-moe", "data/reviews": "data/reviews", "data/refusals": "data/refusals"}
    keys = list(plan.nodes)
    for node in plan.nodes.values():
        assert all(keys.index(key) < keys.index(node.key) for key in node.inputs.values())


def changed(*overrides: str, base: tuple[str, ...] = ()) -> set[str]:
    before, after = plan_of(*base), plan_of(*base, *overrides)
    return {key for key, node in after.nodes.items()
            if before.nodes[key].fingerprint != node.fingerprint}


def test_a_field_changes_the_fingerprints_downstream_of_it_and_no_others():
    everything_tuned = {key for key in plan_of().nodes
                        if "-sft-" in key or key.startswith("compare/")}
    assert changed("recipes.sft.learning_rate=2e-3") == everything_tuned
    assert changed("evaluations.edits.edits=2") == {
        f"evaluate/{label}-edits" for label in
        ("tiny-none", "tiny-moe-none", "tiny-sft-seed0", "tiny-moe-sft-seed0")} | {"compare/smoke"}
    # The load-balancing loss does not exist for the dense partner.
    assert not any(key.startswith("finetune/tiny-sft")
                   for key in changed("recipes.sft.auxiliary_loss_weight=0"))


@pytest.mark.parametrize(
    "override",
    ["resources.finetune.workers=4", "resources.finetune.expert_parallel=1",
     "resources.finetune.micro_batch=1", "resources.evaluate.shard_size=3",
     "resources.finetune.cpus=4"])
def test_run_time_fields_change_no_fingerprint(override):
    assert changed(override, base=("recipes.sft.auxiliary_loss_weight=0",)) == set()


ROUTER = "recipes.sft.router={noise: 0.1, learning_rate: 1e-4}"


def test_what_only_a_router_has_is_dropped_for_the_dense_partner():
    changed_nodes = changed("recipes.sft.router={noise: 0.1}", "recipes.sft.freeze=[router]")
    assert "finetune/tiny-moe-sft-seed0" in changed_nodes
    assert "finetune/tiny-sft-seed0" not in changed_nodes
    nodes = plan_of(ROUTER).nodes
    dense, moe = (nodes[f"finetune/{model}-sft-seed0"].spec for model in ("tiny", "tiny-moe"))
    assert dense.dropped == {
        "auxiliary_loss_weight": 0.01, "router.noise": 0.1, "router.learning_rate": 1e-4}
    assert dense.router.noise == 0 and moe.router.noise == 0.1 and moe.dropped == {}
    mixed = "recipes.sft.train=[router, backbone]"
    assert plan_of(mixed).nodes["finetune/tiny-sft-seed0"].spec.train == ("backbone",)


def test_a_recipe_for_some_models_makes_nodes_and_rows_for_them_alone():
    plan = plan_of("recipes.sft.models=[tiny-moe]")
    assert "finetune/tiny-moe-sft-seed0" in plan.nodes
    assert "finetune/tiny-sft-seed0" not in plan.nodes
    spec = plan.compare.spec
    assert spec.has("sft", "edits", "tiny-moe")
    assert not spec.has("sft", "edits", "tiny-moe", "tiny")
    assert spec.has("none", "edits", "tiny-moe", "tiny")


def test_a_recipe_may_name_the_evaluations_of_what_it_trains():
    plan = plan_of("recipes.sft.evaluations=[edits]")
    scored = [key for key in plan.nodes if key.startswith("evaluate/") and "-sft-" in key]
    assert scored == ["evaluate/tiny-moe-sft-seed0-edits", "evaluate/tiny-sft-seed0-edits"]
    spec = plan.compare.spec
    assert spec.has("sft", "edits", "tiny") and not spec.has("sft", "refusal", "tiny")
    assert spec.has("none", "refusal", "tiny")
    # What is trained is the same.
    trained = "finetune/tiny-sft-seed0"
    assert plan.nodes[trained].fingerprint == plan_of().nodes[trained].fingerprint
    with pytest.raises(BadInput, match="sft.evaluations: unknown evaluation 'edit'.*edits"):
        plan_of("recipes.sft.evaluations=[edit]")


def test_the_micro_batch_is_identity_where_random_numbers_depend_on_it():
    noisy = ("recipes.sft.auxiliary_loss_weight=0", "recipes.sft.dropout={residual: 0.1}")
    assert {"finetune/tiny-moe-sft-seed0", "finetune/tiny-sft-seed0"} <= changed(
        "resources.finetune.micro_batch=1", base=noisy)


def test_the_micro_batch_is_identity_where_the_load_balancing_loss_depends_on_it():
    keys = changed("resources.finetune.micro_batch=1")
    assert "finetune/tiny-moe-sft-seed0" in keys and "finetune/tiny-sft-seed0" not in keys
    # Two workers or one: both see parts of four sequences.
    assert changed("resources.finetune.workers=1", "resources.finetune.expert_parallel=1") == set()


def test_a_file_is_known_by_its_content(tmp_path):
    import shutil

    shutil.copytree(SMOKE.parent / "smoke", tmp_path / "smoke")
    path = tmp_path / "sweep.yaml"
    path.write_text(SMOKE.read_text())

    def fingerprint() -> str:
        sweep = load(path)
        return build(sweep, check(sweep, path)).nodes["data/reviews"].fingerprint

    before = fingerprint()
    assert before == plan_of().nodes["data/reviews"].fingerprint  # its place does not count
    with (tmp_path / "smoke/reviews.csv").open("a") as file:
        file.write("new,new,The lamp is bright.,positive\n")
    assert fingerprint() != before


def _finish(plan, store: Store, key: str) -> None:
    node = plan.nodes[key]
    store.commit(node.folder, {
        "version": node.spec.VERSION, "identity": node.spec.identity(), "attempt": "attempt-1",
        "inputs": {r: plan.nodes[k].folder for r, k in node.inputs.items()}, "finished": 1.0})


def test_stale_nodes_say_because_of_what(tmp_path):
    store, before = Store(str(tmp_path)), plan_of()
    for key in ("data/reviews", "model/tiny", "finetune/tiny-sft-seed0"):
        _finish(before, store, key)
    after = plan_of("recipes.sft.learning_rate=2e-3", "datasets.reviews.seed=1")
    states = survey(after, store)
    assert states["model/tiny"].status == "done"
    assert states["data/reviews"].because == "seed 0 → 1"
    assert states["finetune/tiny-sft-seed0"].because == (
        "learning_rate 0.001 → 0.002; input data/reviews changed")
    assert states["finetune/tiny-moe-sft-seed0"].status == "to run"


def test_an_added_evaluation_is_all_that_is_to_run(tmp_path):
    store, before = Store(str(tmp_path)), plan_of()
    for key in before.nodes:
        _finish(before, store, key)
    after = plan_of(
        "evaluations.again={kind: refusal, harmful: [harmful], benign: [benign], technique: "
        "{kind: self_consistency, samples: 2}}")
    to_run = {key for key, state in survey(after, store).items() if state.status != "done"}
    labels = ("tiny-none", "tiny-moe-none", "tiny-sft-seed0", "tiny-moe-sft-seed0")
    assert to_run == {f"evaluate/{label}-again" for label in labels} | {"compare/smoke"}


def test_plan_of_ten_thousand_nodes_is_summarised(tmp_path):
    command = [sys.executable, "-m", "pipeline", "plan", str(SMOKE), "--store", str(tmp_path),
               "--set", f"seeds={list(range(1000))}"]
    done = subprocess.run(command, cwd=SMOKE.parents[1], text=True, capture_output=True, check=True)
    assert "smoke: 10017 nodes (10017 to run)" in done.stdout


def test_the_dense_partner_follows_the_upcycled_model():
    def partner(**upcycle):
        changes = [f"models.tiny-moe.upcycle.{key}={json.dumps(v)}" for key, v in upcycle.items()]
        return model_spec(load(SMOKE, changes), "tiny-wide")

    rule = EveryNth(every=2)
    copies = partner(top_k=3, layers={"every": 2}, drop=0.25, noise=0.125, seed=4)
    assert copies == (WidenSpec(top_k=3, layers=rule, drop=0.25, noise=0.125, seed=4), "tiny")
    split = partner(layers={"every": 2}, experts=8, experts_from="random_split", noise=0.5, seed=4)
    assert split == (WidenSpec(top_k=2, parts=8, layers=rule, noise=0, seed=4), "tiny")
    assert split[0].added(neurons=128, count=4) == -48  # of 128, 32 are left in two layers of four


CATALOGUE_FILES = SMOKE.parent.parent / "tests/stages/data/originals"


def published(*overrides: str):
    return plan_of(
        f"datasets.boss={{source: 'file:{CATALOGUE_FILES}/boss_sentiment.tsv', format: amazon}}",
        "datasets.sst2={source: 'catalogue:sst2'}",
        "evaluations.boss={kind: out_of_distribution, in_distribution: reviews, "
        "out_of_distribution: [boss, sst2], template: sentiment}", *overrides)


def test_a_data_set_is_kept_from_what_recipes_train_on_and_a_published_one_needs_no_task():
    plan = published()
    boss, sst2 = plan.nodes["data/boss"], plan.nodes["data/sst2"]
    assert (boss.spec.task, sst2.spec.task) == ("classification", "classification")
    trained = {"trained/reviews": "data/reviews", "trained/refusals": "data/refusals"}
    assert boss.inputs == sst2.inputs == plan.nodes["data/harmful"].inputs == trained
    assert plan.nodes["data/reviews"].inputs == {}  # trained on itself
    kept = published("datasets.sst2.disjoint_from=[]")
    assert kept.nodes["data/sst2"].inputs == {}
    # Those that are asked for come on top; elsewhere may be trained as well.
    asked = published("datasets.sst2.disjoint_from=[boss]", "trained_on=[hotels]")
    assert asked.nodes["data/sst2"].inputs == {
        "disjoint/boss": "data/boss", **trained, "trained/hotels": "data/hotels"}
    assert asked.nodes["data/hotels"].inputs == {"disjoint/reviews": "data/reviews"}
    # Reviews wait for refusals, and these for what is only scored: no circle.
    circle = published(
        "datasets.refusals.disjoint_from=[boss]", "datasets.reviews.disjoint_from=[refusals]")
    assert circle.nodes["data/boss"].inputs == {}
    circle = published("datasets.refusals.disjoint_from=[boss]")
    assert circle.nodes["data/boss"].inputs == {"trained/reviews": "data/reviews"}


def test_scores_depend_on_the_rows_that_are_left_out_and_not_on_where_they_were_looked_for():
    extra = ("datasets.extra={task: instructions, source: 'file:smoke/refusals.jsonl', "
             "splits: {train: 0.5, test: 0.5}}")
    alone, both = plan_of(extra), plan_of(
        extra, "recipes.other={data: [{dataset: extra}], epochs: 1, batch_size: 4, "
               "learning_rate: 0.001}")
    questions, scores, base = "data/questions", "evaluate/tiny-none-questions", "model/tiny"
    assert set(both.nodes[questions].inputs) - set(alone.nodes[questions].inputs) == {
        "trained/extra"}
    assert both.nodes[questions].fingerprint != alone.nodes[questions].fingerprint
    assert both.nodes[scores].fingerprint == alone.nodes[scores].fingerprint
    before = dict(both.nodes)
    both.settle(questions, "")
    assert both.nodes == before
    both.settle(questions, "a digest")
    changed = {key for key, node in both.nodes.items() if node != before[key]}
    assert both.nodes[questions].folder == before[questions].folder
    assert both.nodes[scores].folder != before[scores].folder and base not in changed
    assert changed == {questions, both.compare.key} | {
        key for key, node in both.nodes.items() if questions in node.inputs.values()}
    alone.settle(questions, "a digest")
    assert both.nodes[scores].fingerprint == alone.nodes[scores].fingerprint
    both.settle(questions, "another")
    assert both.nodes[scores].fingerprint != alone.nodes[scores].fingerprint


def test_scored_sets_that_nothing_keeps_from_the_trained_ones_are_looked_through():
    both = ("reviews/train", "refusals/train")
    shared = published(
        "datasets.harmful.disjoint_from=[]",
        "datasets.benign={task: prompts, source: 'file:smoke/refusals.jsonl'}",
    ).compare.spec.may_share
    assert shared == {
        "harmful/test": both,  # the rows are to be kept
        "benign/test": ("refusals/train",),  # the same file
        "reviews/test": ("refusals/train",),  # its own splits share no text
    }  # the others are kept from both
    kept = published("datasets.sst2.disjoint_from=[]", "datasets.refusals.disjoint_from=[hotels]")
    shared = kept.compare.spec.may_share
    assert shared["sst2/test"] == both and "hotels/test" not in shared
    images = SMOKE.parent / "adversarial_moe" / "vision_cpu.yaml"
    sweep = load(images, ["datasets.digits={source: builtin:digits}", "evaluations.more={kind: "
                          "image_classification, dataset: digits}"])
    assert sweep.recipes and sweep.may_share == {}


def test_a_changed_file_or_split_of_a_published_data_set_is_another_node():
    first = published().nodes["data/sst2"].fingerprint
    assert first != published("datasets.sst2.source=catalogue:sst2#train").nodes[
        "data/sst2"].fingerprint
    assert len(published().nodes["data/boss"].spec.content) == 64


def test_a_technique_changes_its_own_evaluation_and_never_the_dense_partners_plain_one():
    # The dense partner has no experts to count.
    assert changed("evaluations.questions.technique={kind: expert_count, top_k: 1}") == {
        "evaluate/tiny-moe-none-questions", "evaluate/tiny-moe-sft-seed0-questions",
        "compare/smoke"}
    plan = plan_of("evaluations.questions.technique={kind: contrastive, amateur: tiny-wide}")
    node = plan.nodes["evaluate/tiny-none-questions"]
    assert node.inputs["amateur/tiny-wide"] == "model/tiny-wide"


def test_a_judge_that_is_a_model_is_one_node_for_all_that_ask_it():
    judge = "{kind: regressor, name: harm, source: 'hub:a/b@1'}"
    plan = plan_of(f"evaluations.refusal.judges=[{judge}, {{kind: keywords}}]")
    assert [k for k, n in plan.nodes.items() if n.stage == "judge"] == ["judge/harm"]
    asking = {k for k, n in plan.nodes.items() if n.inputs.get("judge/harm") == "judge/harm"}
    assert asking == {f"evaluate/{label}-refusal" for label in (
        "tiny-none", "tiny-moe-none", "tiny-sft-seed0", "tiny-moe-sft-seed0")} | {
            plan.compare.key}  # it tells why one is missing


def test_probes_of_experts_are_planned_for_models_that_have_them():
    path = SMOKE.parent / "adversarial_moe" / "text_cpu.yaml"
    sweep = load(path, [])
    plan = build(sweep, check(sweep, path))
    scored = {key.removeprefix("evaluate/") for key in plan.nodes if key.startswith("evaluate/")}
    for checkpoint in ("none", "sft-seed0"):
        for name in ("interventions", "geometry", "experts"):
            assert f"smollm2-moe-{checkpoint}-{name}" in scored
            assert f"smollm2-{checkpoint}-{name}" not in scored
        for name in ("attacks", "suffixes", "slopes"):
            assert f"smollm2-{checkpoint}-{name}" in scored
