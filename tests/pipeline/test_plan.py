"""The graph of a sweep, fingerprints, and what is done, stale or to run."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from pipeline.checks import check
from pipeline.plan import build, build_evaluations, survey
from pipeline.single import single_model
from pipeline.store import Store
from pipeline.sweep import load
from stages.compare.spec import CompareSpec
from stages.data.spec import DataSpec
from stages.errors import BadInput
from stages.evaluate.spec import EvaluateSpec
from stages.finetune.spec import FinetuneSpec
from stages.models.spec import SourceSpec, UpcycleSpec, WidenSpec

SMOKE = Path(__file__).parents[2] / "sweeps" / "smoke.yaml"

FIELDS = {
    DataSpec: (
        {"task", "source", "content", "columns", "labels", "splits", "rows", "seed"}, set()),
    SourceSpec: ({"source", "content", "trust_remote_code", "seed"}, set()),
    UpcycleSpec: ({"experts", "top_k", "layers", "noise", "seed"}, set()),
    WidenSpec: ({"top_k", "layers", "noise", "seed"}, set()),
    FinetuneSpec: (
        {"train", "steps", "batch_size", "max_length", "learning_rate", "schedule", "warmup_steps",
         "weight_decay", "gradient_clipping", "auxiliary_loss_weight", "precision", "seed"},
        {"workers", "expert_parallel", "micro_batch", "checkpoint_every", "deepspeed_config",
         "threads"}),
    EvaluateSpec: (
        {"evaluation", "dtype"}, {"workers", "cpus", "gpus", "shard_size"}),
    CompareSpec: (
        {"title", "pairs", "recipes", "seeds", "evaluations", "resamples", "seed"}, set()),
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


def test_plan_of_ten_thousand_nodes_is_summarised(tmp_path):
    command = [sys.executable, "-m", "pipeline", "plan", str(SMOKE), "--store", str(tmp_path),
               "--set", f"seeds={list(range(1000))}"]
    done = subprocess.run(command, cwd=SMOKE.parents[1], text=True, capture_output=True, check=True)
    assert "smoke: 10017 nodes (10017 to run)" in done.stdout


def test_evaluate_plans_only_what_the_model_and_its_evaluations_need():
    options = Namespace(sweep=SMOKE, set=[], model="tiny:mixtral", evaluations="questions")
    sweep, name = single_model(options)
    plan = build_evaluations(sweep, name, check(sweep, SMOKE))
    assert list(plan.nodes) == [
        "model/tiny-mixtral", "data/questions", "evaluate/tiny-mixtral-none-questions"]
    assert plan.nodes["model/tiny-mixtral"].spec.source == "tiny:mixtral"
    # The same data set as in the sweep: its result is shared.
    shared = plan.nodes["data/questions"].fingerprint
    assert shared == plan_of().nodes["data/questions"].fingerprint


@pytest.mark.parametrize(
    "given, reason",
    [({"evaluations": "question"}, "--evaluations question: .*did you mean 'questions'"),
     ({"model": "no such folder"}, "neither a folder here nor OWNER/NAME")])
def test_evaluate_refuses_unknown_names(given, reason):
    known = {"sweep": SMOKE, "set": [], "model": "tiny:llama", "evaluations": "all"}
    with pytest.raises(BadInput, match=reason):
        single_model(Namespace(**(known | given)))
