"""A search that cannot work is refused before Ray starts, in one line: field, reason, remedy."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
from search_sweeps import SEARCH, searching
from smoke import ROOT, SMOKE

from pipeline.asked import recipe_models
from pipeline.cli import main
from pipeline.plan import Builder, build
from pipeline.search import run
from pipeline.search.checks import check_search
from pipeline.search.ledger import Ledger, Report, Trial
from pipeline.search.plan import final_sweep, members, segments_of, selecting, trial_plan
from pipeline.store import Store
from pipeline.sweep_file import load
from stages.errors import BadInput
from stages.finetune.spec import Recipe

SELECTS = {"objectives": [{"score": "questions/accuracy"}]}
TWO = {"objectives": [{"score": "questions/accuracy"}, {"score": "refusal/over_refusal_rate"}]}


def refusal(*overrides: str, **fields: object) -> str:
    with pytest.raises(BadInput) as caught:
        check_search(searching(*overrides, **fields), SMOKE)
    return str(caught.value)


WRONG = {
    "unknown base": ({"base": "sfd"}, "search.base: unknown recipe 'sfd'; did you mean 'sft'?"),
    "trial that contradicts itself": (
        {"space": {"router.learning_rate": {"uniform": [0.1, 0.2]},
                   "freeze": {"choice": [[], ["router"]]}}},
        "freeze=['router']) is refused: router.learning_rate: cannot act on a frozen router"),
    "base for one model": (
        {"set": ["recipes.sft.models=[tiny-moe]"]},
        "search.base: a search is for both models of each pair; remove models from recipes.sft"),
    "unknown field": (
        {"space": {"learning_rat": {"choice": [1.0]}}},
        "search.space.learning_rat: unknown field; did you mean 'learning_rate'?"),
    "bad value of a choice": (
        {"space": {"schedule": {"choice": ["linear", "cosinus"]}}},
        "search.space.schedule: 'cosinus' is refused: input tag 'cosinus' found using 'kind'"),
    "bad end of a range": (
        {"space": {"learning_rate": {"uniform": [0.0, 0.1]}}},
        "search.space.learning_rate: 0.0 is refused: input should be greater than 0"),
    "two distributions": (
        {"space": {"steps": {"choice": [1], "grid": [1]}}},
        "search.space.steps: needs exactly one of choice, grid, uniform, log_uniform, has choice"),
    "bounds the wrong way": (
        {"space": {"learning_rate": {"uniform": [0.1, 0.01]}}}, "runs from low to high; swap"),
    "log of zero": (
        {"space": {"learning_rate": {"log_uniform": [0, 0.01]}}}, "needs a lower bound above 0"),
    "unknown evaluation": (
        {"objectives": [{"score": "question/accuracy"}]},
        "search.objectives.0.score: 'question/accuracy' names no evaluation of the sweep; write "
        "evaluation/metric; did you mean 'questions'?"),
    "unknown metric": (
        {"objectives": [{"score": {"questions/accurac": 1.0}}]},
        "search.objectives.0.score: questions has no metric 'accurac'; did you mean 'accuracy'?"),
    "objective reported on what selects": (
        {"set": ["evaluations.edits.split=selection"]},
        "evaluations.edits.split: selection chooses the recipes, and a score on it flatters the "
        "winners; name the split that is reported (test)"),
    "other evaluation on what selects": (
        {"set": ["evaluations.domains.split=selection"]},
        "evaluations.domains.split: selection chooses the recipes"),
    "out of distribution": (
        {"objectives": [{"score": "domains/id_accuracy"}]},
        "search.objectives.0.score: hotels is out of distribution and never selects"),
    "out of domain": (
        {"objectives": [{"score": "texts/in_domain_bits_per_byte"}],
         "set": ["evaluations.texts={kind: perplexity, in_domain: [reviews], "
                 "out_of_domain: [news]}", "datasets.news={task: text, source: 'file:news.csv'}"]},
        "search.objectives.0.score: news is out of distribution and never selects"),
    "shifted images": (
        {"objectives": [{"score": "images/shifted_accuracy"}],
         "set": ["evaluations.images={kind: image_classification, dataset: reviews, "
                 "shifted: [noise]}", "datasets.noise={task: images, source: 'file:noise'}"]},
        "search.objectives.0.score: noise is out of distribution and never selects"),
    "out of domain elsewhere": (
        {"objectives": [{"score": "inside/in_domain_bits_per_byte"}],
         "set": ["evaluations.texts={kind: perplexity, out_of_domain: [news]}",
                 "evaluations.inside={kind: perplexity, in_domain: [news]}",
                 "datasets.news={task: text, source: 'file:news.csv'}"]},
        "search.objectives.0.score: news is out of distribution and never selects"),
    "unknown algorithm": (
        {"algorithm": {"kind": "tpa"}}, "search.algorithm.kind: unknown algorithm 'tpa'; "
        "did you mean 'tpe'?"),
    "stopping by two objectives": (
        {**TWO, "algorithm": {"kind": "asha", "rungs": 1}}, "search.algorithm: asha stops trials "
        "by one objective; name it as intermediate"),
    "population with two objectives": (
        {**TWO, "algorithm": {"kind": "pbt"}, "set": ["recipes.sft.schedule=constant"]},
        "search.algorithm: pbt compares trials by one"),
    "front of one objective": (
        {"algorithm": {"kind": "nsga2"}}, "search.algorithm: nsga2 is for several objectives"),
    "grid of ranges": (
        {"algorithm": {"kind": "grid"}}, "search.space.learning_rate: algorithm grid takes grids "
        "alone"),
    "trials of a grid": (
        {"algorithm": {"kind": "grid"}, "space": {"steps": {"grid": [6, 7, 8]}}},
        "search.trials: the grid has 3 combinations; write 3"),
    "grid under random": (
        {"space": {"steps": {"grid": [6, 7, 8]}}}, "search.trials: 4 trials cannot go through 3"),
    "grid under tpe": (
        {"algorithm": {"kind": "tpe"}, "space": {"steps": {"grid": [6, 7]}}},
        "search.space.steps: tpe chooses by itself; write choice for grid"),
    "rungs without steps": (
        {"algorithm": {"kind": "hyperband"}}, "search.algorithm: hyperband cuts the training into "
        "9 parts, a recipe has 6 steps; give it more steps or fewer rungs"),
    "population with a schedule": (
        {"algorithm": {"kind": "pbt"}}, "search.algorithm: pbt changes the learning rate as it "
        "goes and would run the linear schedule of sft anew in each segment; set "
        "recipes.sft.schedule to constant"),
    "warm-up over a segment": (
        {"algorithm": {"kind": "pbt", "segments": 3},
         "set": ["recipes.sft.schedule=constant", "recipes.sft.warmup_steps=3"]},
        "search.algorithm: the warm-up of 3 steps is longer than the first segment of 2; shorten"),
    "warm-up of a population": (
        {"algorithm": {"kind": "pbt", "segments": 3}, "set": ["recipes.sft.schedule=constant"],
         "space": {"warmup_steps": {"uniform": [0, 2]}}},
        "search.space.warmup_steps: is over before a population changes; remove it"),
    "seeds not fresh": (
        {"seeds": [101]}, "final_seeds names 101, which the trials use; choose others"),
    "a seed twice": ({"seeds": [3, 3]}, "search.seeds: names a seed twice; keep one"),
    "a seed twice on one side": (
        {"budget": {"moe": {"seeds": [3, 3]}}},
        "search.budget.moe.seeds: names a seed twice; keep one"),
    "a fresh seed twice": (
        {"final_seeds": [7, 8, 8]}, "search.final_seeds: names a seed twice; keep one"),
    "negative seed": ({"seeds": [-3]}, "search.seeds: names -3, and a seed is 0 or more; take"),
    "negative seed of the draws": (
        {"seed": -1}, "search.seed: input should be greater than or equal to 0; found -1"),
    "too few fresh seeds": ({"final_seeds": [8, 9]}, "search.final_seeds: tuple should have at "
                            "least 3 items"),
    "recipe that no plan takes": (
        {"space": {"warmup_steps": {"uniform": [0, 7]}}},
        "search.space.warmup_steps: 7 is refused: warmup_steps: 7 is more than the 6 steps"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusal(case):
    fields, expected = WRONG[case]
    found = refusal(*fields.get("set", []), **{k: v for k, v in fields.items() if k != "set"})
    assert expected in found and len(found.splitlines()) == 1


def test_a_trained_set_needs_a_selection_split_of_its_own():
    found = refusal("datasets.reviews.splits={train: 0.6, test: 0.3}")
    assert "reviews is trained on and has no split 'selection'" in found


def test_optuna_is_asked_for_where_it_is_needed(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == "optuna" else real(name))
    assert "pip install 'moe-reliability[search]'" in refusal(algorithm={"kind": "tpe"})


def test_a_sweep_without_a_search_is_told_so():
    with pytest.raises(BadInput, match="search: is missing"):
        check_search(load(SMOKE), SMOKE)


def test_objectives_are_measured_on_selection_splits_only():
    sweep = searching(**TWO, algorithm={"kind": "random"})
    sweep = sweep.model_copy(update={"search": searching(
        **{**TWO, "objectives": [*TWO["objectives"], SEARCH["objectives"][0]]}).search})
    trials = selecting(sweep)
    assert list(trials.evaluations) == ["questions", "refusal", "edits"]
    for evaluation in trials.evaluations.values():
        assert set(evaluation.datasets().values()) == {"selection"}
    # Said outright, so that trials and winners see the same rows.
    assert trials.trained_on == ("reviews", "refusals")
    # Sets that are only evaluated give a fifth away; one that has the split keeps its own.
    assert trials.datasets["questions"].splits == {"selection": 0.2, "test": 0.8}
    assert trials.datasets["reviews"].splits == sweep.datasets["reviews"].splits
    final, _ = final_sweep(sweep, {"tiny-moe": [(sweep.recipes["sft"],)]})
    assert final.datasets == trials.datasets
    assert set(final.evaluations["questions"].datasets().values()) == {"test"}
    assert final.seeds == (101, 102, 103) and list(final.recipes) == ["searched"]


def test_fields_that_change_nothing_in_a_model_are_left_out_of_its_search():
    idle = {"auxiliary_loss_weight": {"choice": [0.0, 0.1]},
            "freeze": {"choice": [[], ["router"]]},
            "router.learning_rate": {"log_uniform": [1e-4, 1e-2], "when": {"freeze": [[]]}},
            "experts.dropout": {"choice": [0.0, 0.1]}}
    space = {"learning_rate": {"choice": [0.1, 0.2]}, **idle}
    sweep = searching(space=space)
    trials = selecting(sweep)
    moe, dense = members(trials, check_search(sweep, SMOKE), SMOKE.parent)
    assert (moe.model, list(moe.space.dimensions), moe.idle) == ("tiny-moe", list(space), ())
    assert (dense.model, list(dense.space.dimensions), dense.idle) == (
        "tiny", ["learning_rate"], tuple(idle))


def test_winners_of_each_model_are_planned_with_their_own_recipe_and_fresh_seeds():
    sweep = searching()
    contents = check_search(sweep, SMOKE)
    base = sweep.recipes["sft"]
    fast, slow = (base.model_copy(update={"learning_rate": rate}) for rate in (0.5, 0.25))
    final, searched = final_sweep(sweep, {"tiny-moe": [(fast,)], "tiny": [(slow,)]})
    plan = build(final, contents, searched)
    rates = {key: node.spec.learning_rate for key, node in plan.nodes.items()
             if node.stage == "finetune"}
    assert rates == {f"finetune/{model}-searched-seed{seed}": rate
                     for model, rate in (("tiny-moe", 0.5), ("tiny", 0.25))
                     for seed in (101, 102, 103)}
    assert plan.compare.name == "smoke-search"


def test_a_winner_of_population_based_training_is_a_chain_of_its_segments():
    sweep = searching()
    base = sweep.recipes["sft"]
    parts = tuple(base.model_copy(update={"steps": steps, "learning_rate": rate})
                  for steps, rate in ((2, 0.1), (2, 0.2), (3, 0.3)))
    final, searched = final_sweep(sweep, {"tiny-moe": [parts], "tiny": [(base,)]})
    plan = build(final, {}, searched)
    chain, key = [], "finetune/tiny-moe-searched-seed101"
    while key != "model/tiny-moe":
        chain.append(plan.nodes[key])
        key = chain[-1].inputs["model"]
    assert [(n.spec.steps, n.spec.learning_rate) for n in chain] == [(3, 0.3), (2, 0.2), (2, 0.1)]
    # Each segment sees batches of its own, of rows and in turns that are those of the whole.
    assert chain[-1].spec.seed == 101 and len({n.spec.seed for n in chain}) == 3
    assert [n.spec.seed_of_rows for n in chain] == [101] * 3
    assert [n.spec.steps_before for n in chain] == [4, 2, 0]


def test_a_longer_chain_of_a_trial_finds_its_beginning():
    sweep = searching()
    base, trials = sweep.recipes["sft"], selecting(sweep)
    parts = [base.model_copy(update={"steps": 2, "learning_rate": rate}) for rate in (0.1, 0.2)]
    plans = [trial_plan(trials, {}, "tiny", parts[:end], [7], ["edits"])[0] for end in (1, 2)]
    short, long = ({n.folder for n in p.nodes.values() if n.stage == "finetune"} for p in plans)
    assert len(short) == 1 and len(long) == 2 and short < long


def test_each_member_of_a_front_is_trained_again_paired_as_far_as_both_fronts_reach(tmp_path):
    """Of the mixture's trials the second is dominated; the dense model's first is the best of its
    in both."""
    sweep, store = searching(**TWO), Store(str(tmp_path / "store"))
    contents = check_search(sweep, SMOKE)
    scores = {"tiny-moe": [(0.9, 0.5), (0.7, 0.4), (0.8, 0.2), (0.5, 0.1)],
              "tiny": [(0.9, 0.1), (0.8, 0.2)]}
    searches = run.model_searches(sweep, contents, SMOKE.parent)
    for each in searches:
        ledger = Ledger(store, each.folder)
        for number, objectives in enumerate(scores[each.member.model]):
            trial = ledger.begin(number, lambda n: Trial(n, {"learning_rate": 0.01 * (n + 1)}))
            trial.reports = [Report(1, list(objectives), 0.5, 6, 700, {}, trial.values)]
            ledger.end(trial, "finished")
    plan = run.final_plan(sweep, searches, contents, store)
    rates = {node.name: node.spec.learning_rate for node in plan.nodes.values()
             if node.stage == "finetune" and node.name.endswith("seed102")}
    assert rates == {
        "tiny-moe-searched-1-seed102": 0.01, "tiny-moe-searched-2-seed102": 0.03,
        "tiny-moe-searched-3-seed102": 0.04, "tiny-searched-1-seed102": 0.01}
    assert plan.compare.spec.models_of == {
        "searched-2": ("tiny-moe",), "searched-3": ("tiny-moe",)}
    found = plan.compare.spec.notes[0]
    assert found.startswith(
        "Recipes called searched-1, searched-2, searched-3 differ by model: each is a member of "
        "the Pareto front, in the order of questions/accuracy ↑, that a search (")
    assert plan.compare.spec.notes[1:3] == tuple(
        f"searched-{n} is trained for tiny-moe alone, whose front is longer; its scores are under "
        "What training changed." for n in (2, 3))
    # What the search's report calls trained again is what was.
    moe, dense = run.content_of(sweep, searches, store).models
    assert (moe.chosen, dense.chosen) == ((0, 2, 3), (0,))


def test_a_shorter_front_s_last_member_stands_in_for_an_attack_and_is_trained_once():
    sweep = searching()
    base = sweep.recipes["sft"]
    rates = [(base.model_copy(update={"learning_rate": rate}),) for rate in (0.1, 0.2, 0.3, 0.4)]
    final, searched = final_sweep(sweep, {"tiny-moe": rates[:3], "tiny": rates[3:]})
    builder = Builder(final, {}, searched)
    keys = [builder.checkpoint("tiny", f"searched-{n}", 101) for n in (1, 3)]
    assert keys == ["finetune/tiny-searched-1-seed101"] * 2
    assert builder.plan.nodes[keys[0]].spec.learning_rate == 0.4
    assert [recipe_models(final, f"searched-{n}") for n in (1, 2, 3)] == [
        ("tiny-moe", "tiny"), ("tiny-moe",), ("tiny-moe",)]


def test_a_rung_works_in_the_folder_of_the_whole_also_when_rows_are_left_out():
    """Of the validation set, because they are trained on; which they are is known once it is made.
    """
    validation = {"dataset": "hotels", "split": "held", "template": "sentiment"}
    sweep = selecting(searching('datasets.hotels.splits={"held":0.5,"test":0.5}',
                                f"recipes.sft.validation={json.dumps(validation)}"))
    nodes = []
    for until in (2, None):
        plan, (measured,) = trial_plan(
            sweep, {}, "tiny-moe", [sweep.recipes["sft"]], [0], ["edits"], until)
        before = plan.nodes[measured.finetune].folder
        plan.settle("data/hotels", "0badc0de")
        nodes.append(plan.nodes[measured.finetune])
        assert nodes[-1].folder != before
    rung, whole = nodes
    assert rung.work_folder == whole.work_folder == whole.folder != rung.folder


@pytest.mark.parametrize("done", [0, 1])
def test_gc_keeps_the_segment_that_a_member_of_a_population_is_at(tmp_path, done):
    sweep = searching("recipes.sft.schedule=constant", algorithm={"kind": "pbt", "segments": 3})
    contents, store = check_search(sweep, SMOKE), Store(str(tmp_path / "store"))
    moe, _ = searches = run.model_searches(sweep, contents, SMOKE.parent)
    ledger = Ledger(store, moe.folder)
    trial = ledger.begin(0, lambda n: Trial(n, {"learning_rate": 0.01}))
    trial.reports = [Report(1, [0.5], 0.5, 2, 200, {}, trial.values) for _ in range(done)]
    ledger.write(trial)
    parts = segments_of(sweep.search, [moe.member.space.recipe(trial.values)] * 3)
    plan, (measured,) = trial_plan(selecting(sweep), contents, "tiny-moe", parts[: done + 1],
                                   sweep.search.seeds_of("moe"), ["edits"])
    at = plan.nodes[measured.finetune]
    assert at.name.startswith("tiny-moe-") and len(parts) == 3
    kept = run.folders_of(sweep, searches, contents, store)
    assert at.folder in kept
    assert len([f for f in kept if f.startswith("finetune/tiny-moe")]) == done + 1


def entered(each: run.ModelSearch, store: Store, trials: int, failed: bool = False) -> None:
    enter(Ledger(store, each.folder), trials, failed)


def enter(ledger: Ledger, trials: int, failed: bool = False) -> None:
    """Trials of 700 tokens each in a search's ledger; the later, the better."""
    for number in range(trials):
        trial = ledger.begin(number, lambda n: Trial(n, {"learning_rate": 0.01 * (n + 1)}))
        if not failed:
            trial.reports = [Report(1, [0.5 + 0.25 * number], 0.5, 6, 700, {}, trial.values)]
        ledger.end(trial, *(["failed", "the loss is nan"] if failed else ["finished"]))


def test_the_winners_report_says_how_they_were_found_and_where_budgets_differed(tmp_path):
    sweep, store = searching(budget={"dense": {"trials": 1}}), Store(str(tmp_path / "store"))
    contents = check_search(sweep, SMOKE)
    moe, dense = searches = run.model_searches(sweep, contents, SMOKE.parent)
    entered(moe, store, 2)
    entered(dense, store, 1)
    plan = run.final_plan(sweep, searches, contents, store)
    assert plan.nodes["finetune/tiny-moe-searched-seed101"].spec.learning_rate == 0.02
    found, trials, tokens = plan.compare.spec.notes
    assert found.startswith("Recipes called searched differ by model: each is the best that a "
                            "search (random, from recipe sft) found for edits/clean_accuracy ↑, on")
    assert trials.startswith("tiny-moe had 2 trials, tiny 1: ")
    assert tokens.startswith("The trials of tiny-moe trained on 1,400 tokens, those of tiny on 700")


def test_as_many_trials_run_at_once_as_there_is_room_for(tmp_path, monkeypatch):
    sweep, store, told = searching(), Store(str(tmp_path / "store")), {}
    contents = check_search(sweep, SMOKE)
    moe, _ = run.model_searches(sweep, contents, SMOKE.parent)

    def run_trials(search, space, trials, ledger, measure, *, concurrent, **_):
        told["at once"] = concurrent
        enter(ledger, trials)

    monkeypatch.setattr("pipeline.search.tuning.run_trials", run_trials)
    monkeypatch.setattr(run, "at_once", lambda each: 5)
    run.run_search(moe, sweep, contents, store, SMOKE.parent, lambda line: None)
    assert told == {"at once": 5} and store.manifest(moe.folder) is not None


def test_a_search_that_found_nothing_is_reported_beside_one_that_did(tmp_path):
    sweep, store = searching(), Store(str(tmp_path / "store"))
    moe, dense = searches = run.model_searches(sweep, check_search(sweep, SMOKE), SMOKE.parent)
    entered(moe, store, 2)
    entered(dense, store, 2, failed=True)
    assert run.best_lines(sweep, searches, store) == [
        "best of tiny-moe: trial 1 at step 6: edits/clean_accuracy 0.75 · learning_rate 0.02"]
    text = Path(run.report(sweep, searches, store, f"sqlite:///{tmp_path}/m.db")).read_text()
    assert "tiny: 2 of 2 trials failed" in text and "<small>the loss is nan</small>" in text
    assert "The trials of tiny-moe trained on 1,400 tokens, those of tiny on 0" in text


def test_a_model_that_the_gpus_cannot_hold_is_refused(tmp_path, capsys):
    assert main(["search", str(ROOT / "sweeps/search_smollm2.yaml"), "--plan", "--store",
                 str(tmp_path), "--set=resources.evaluate.gpus=1",
                 "--set=resources.evaluate.gpu_memory_gb=0.3"]) == 2
    assert "has 182 M parameters, 0.7 GB in float32; 1 × 0.3 GB less a tenth cannot hold them" in (
        capsys.readouterr().err)


def test_the_example_sweeps_are_accepted():
    for path in (ROOT / "sweeps").glob("search*.yaml"):
        sweep = load(path)
        assert check_search(sweep, path)
        assert math.isfinite(sweep.search.trials) and isinstance(
            sweep.recipes[sweep.search.base], Recipe)
