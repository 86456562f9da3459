"""The verb ``search``: a search for each model of the pairs, then the winners on the test split.

Each part can be stopped and goes on where it was: trials through the ledger and the store, the
winners as an ordinary sweep.
"""

import hashlib
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path

import pandas as pd

from pipeline.job import report_folder
from pipeline.plan import Plan, build
from pipeline.search.checks import maximized
from pipeline.search.ledger import Ledger, Report, Trial
from pipeline.search.plan import (
    Measured,
    Member,
    final_sweep,
    members,
    objective_evaluations,
    segments_of,
    selecting,
    trial_plan,
)
from pipeline.search.space import Space
from pipeline.search.spec import Grid, Search
from pipeline.search.tracking import record_trials
from pipeline.store import Store
from pipeline.survey import adopt, leave_out_missing, settle, survey
from pipeline.sweep import Sweep
from stages.compare.search_report import REPORT_FILE, TRIALS_FILE, fairness, write
from stages.compare.search_results import choose
from stages.compare.search_spec import Goal, Knob, SearchContent, SearchedModel
from stages.errors import StageFailed
from stages.finetune.spec import Recipe

STAGE = "search"
VERSION = 1
"""Of the trials' sequence; raised when the same search would draw others."""


@dataclass(frozen=True)
class ModelSearch:
    """The search for one model's recipe."""

    member: Member
    trials: int
    folder: str
    """Of its ledger and result in the store."""
    plan: Plan
    """What the base recipe alone would need; shows what a trial asks of the cluster."""
    measured: list[Measured]


def model_searches(sweep: Sweep, contents: dict[str, str], folder: Path) -> list[ModelSearch]:
    """One search per model of the pairs of a checked sweep, whose file lies in ``folder``."""
    search, trials = sweep.search, selecting(sweep)
    found = []
    for member in members(trials, contents, folder):
        number = search.trials_of(member.side)
        if isinstance(search.algorithm, Grid):
            number = len(member.space.combinations())
        names = objective_evaluations([*search.objectives, search.intermediate])
        plan, measured = trial_plan(trials, contents, member.model, [member.space.base],
                                    search.seeds_of(member.side), names)
        content = {
            "version": VERSION,
            "search": search.model_dump(mode="json", exclude={"final_seeds", "front", "budget"}),
            "space": {p: d.model_dump(mode="json") for p, d in member.space.dimensions.items()},
            "trials": number,
            # Data, model, base recipe and evaluations, and with them the seeds.
            "base": [plan.nodes[key].fingerprint for each in measured
                     for key in each.evaluations.values()],
            # Which rows of them are trained on is not known before they are made.
            "data": [node.fingerprint for node in plan.nodes.values() if node.stage == "data"],
        }
        text = json.dumps(content, sort_keys=True)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]
        folder = f"{STAGE}/{sweep.name}-{member.model}@{fingerprint}"
        found.append(ModelSearch(member, number, folder, plan, measured))
    return found


def search_lines(sweep: Sweep, searches: list[ModelSearch], store: Store) -> list[str]:
    """What is searched, with which budget, and how far it is."""
    search = sweep.search
    goals = ", ".join(f"{o.name} {'↑' if maximized(sweep, o) else '↓'}" for o in search.objectives)
    lines = [f"{sweep.name}: {search.algorithm.kind} search from recipe {search.base} for {goals}",
             f"on selection splits; winners again with seeds "
             f"{', '.join(map(str, search.final_seeds))} on the test splits", ""]
    for each in searches:
        seeds = search.seeds_of(each.member.side)
        counts = Counter(trial.status for trial in Ledger(store, each.folder).trials.values())
        state = ", ".join(f"{n} {status}" for status, n in counts.items()) or "not started"
        lines.append(f"{each.member.model}: {each.trials} trials × {len(seeds)} seed(s) of "
                     f"{', '.join(each.member.space.dimensions)} · {state}")
        if each.member.idle:
            lines.append(f"    left out, as it changes nothing here: {', '.join(each.member.idle)}")
    return lines


def unfinished(searches: list[ModelSearch], store: Store) -> list[ModelSearch]:
    """The searches that have no result yet."""
    done = store.finished(each.folder for each in searches)
    return [each for each in searches if each.folder not in done]


def run_search(
    each: ModelSearch,
    sweep: Sweep,
    contents: dict[str, str],
    store: Store,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Run what is missing of one search on the connected cluster and commit its result.

    Raises StageFailed when no trial finished.
    """
    from pipeline.search.trial import TrialWork
    from pipeline.search.tuning import run_trials

    search, started = sweep.search, time.time()
    ledger = Ledger(store, each.folder)
    goals = [maximized(sweep, objective) for objective in search.objectives]
    work = TrialWork(selecting(sweep), contents, each.member, store.uri, str(folder))
    store.delete(f"{each.folder}/tune")
    run_trials(
        search, each.member.space, each.trials, ledger, work,
        spent=work.spent,
        maximize=goals,
        upwards=maximized(sweep, search.intermediate),
        storage=store.path(each.folder),
        concurrent=at_once(each),
        tell=lambda trial: say(_line(trial, ledger, each, search)),
    )
    store.delete(f"{each.folder}/tune")
    table = trial_table(ledger, search)
    if not (table["status"] == "finished").any():
        reasons = Counter(table.loc[table["reason"] != "", "reason"]).most_common(1)
        raise StageFailed(f"search for {each.member.model}: none of {len(table)} trials finished"
                          + (f"; most often: {reasons[0][0]}" if reasons else ""))
    with store.attempt(each.folder) as (attempt, output):
        table.to_parquet(output / TRIALS_FILE, index=False)
    store.commit(each.folder, {"attempt": attempt, "started": started, "finished": time.time()})


def at_once(each: ModelSearch) -> int:
    """How many trials the cluster has room for at a time, whatever each is doing; at least 1."""
    from pipeline.machines import machines, placed

    room = machines(each.plan.sweep.resources.machines)
    kinds = {each.plan.nodes[key].resources for measured in each.measured
             for key in (measured.finetune, *measured.evaluations.values())}
    most = min(placed(room, [kind] * each.trials) // kind.workers for kind in kinds)

    def fit(trials: int) -> bool:
        return all(placed(room, loads) == sum(load.workers for load in loads)
                   for loads in combinations_with_replacement(kinds, trials))

    return next((trials for trials in range(most, 1, -1) if fit(trials)), 1)


def _line(trial: Trial, ledger: Ledger, each: ModelSearch, search: Search) -> str:
    """What just happened to a trial, for the terminal."""
    over = sum(t.over for t in ledger.trials.values())
    shown = f"[{over:>3}/{each.trials:>3}] {each.member.model} trial {trial.number}  "
    if not trial.over and trial.reports:
        return f"{shown}at {_scores_text(trial.reports[-1], search)}"
    shown += trial.status if trial.over else "started"
    if trial.reason:
        shown += f": {trial.reason}"
    elif trial.reports:
        shown += f" at {_scores_text(trial.reports[-1], search)}"
    return f"{shown} · {_values_text(trial)}"


def _scores_text(report: Report, search: Search) -> str:
    found = [(search.intermediate, report.signal)]
    if report.objectives:
        found = list(zip(search.objectives, report.objectives, strict=True))
    return f"step {report.steps}: " + ", ".join(
        f"{search.label(objective)} {value:.4g}" for objective, value in found)


def _values_text(trial: Trial) -> str:
    return ", ".join(f"{path} {value:.3g}" if isinstance(value, float) else f"{path} {value}"
                     for path, value in trial.trained.items())


def best_lines(sweep: Sweep, searches: list[ModelSearch], store: Store) -> list[str]:
    """The winners of each search."""
    lines = []
    for each in searches:
        for trial in winners(each, sweep, store):
            lines.append(f"best of {each.member.model}: trial {trial.number} at "
                         f"{_scores_text(trial.reports[-1], sweep.search)} · {_values_text(trial)}")
    return lines


def trial_table(ledger: Ledger, search: Search) -> pd.DataFrame:
    """One row per trial.

    Columns: number, status, reason, steps, tokens (over all seeds, up to the failure of one that
    failed), seconds (from start to end,
    interruptions included), ``value:<field>`` as trained with last, ``objective:<name>`` (NaN
    unless the trial finished) and signal, what its last evaluation gave the scheduler.
    """
    rows = []
    for trial in sorted(ledger.trials.values(), key=lambda trial: trial.number):
        last = trial.reports[-1] if trial.reports else None
        finished = trial.status == "finished"
        row = {
            "number": trial.number,
            "status": trial.status,
            "reason": trial.reason,
            "steps": max(trial.steps, last.steps if last else 0),
            "tokens": max(trial.tokens, last.tokens if last else 0),
            "seconds": (trial.ended or trial.started) - trial.started,
            "signal": last.signal if last else math.nan,
        }
        for path, value in trial.trained.items():
            plain = isinstance(value, int | float | str | bool)
            row[f"value:{path}"] = value if plain else json.dumps(value)
        for index, objective in enumerate(search.objectives):
            row[f"objective:{objective.name}"] = last.objectives[index] if finished else math.nan
        rows.append(row)
    table = pd.DataFrame(rows)
    for column in table.columns:
        if table[column].dtype == object and column.startswith("value:"):
            table[column] = table[column].map(lambda v: v if pd.isna(v) else str(v))
    return table


def winners(each: ModelSearch, sweep: Sweep, store: Store) -> list[Trial]:
    """The best finished trial, or the members of the Pareto front that are trained again.

    Both in the order of the first objective, best first.
    """
    search = sweep.search
    ledger = Ledger(store, each.folder)
    finished = [t for _, t in sorted(ledger.trials.items()) if t.status == "finished"]
    goals = [maximized(sweep, objective) for objective in search.objectives]
    chosen = choose([t.reports[-1].objectives for t in finished], goals,
                    search.front if len(goals) > 1 else 1)
    return [finished[i] for i in chosen]


def recipes_of(trial: Trial, member: Member, search: Search) -> tuple[Recipe, ...]:
    """What is trained in turn to repeat a trial, or to go on with one that is not over."""
    parts = [report.values for report in trial.reports]
    if not trial.over:
        parts.append(trial.trained)
    wanted = parts if search.algorithm.kind == "pbt" else [trial.values]
    return segments_of(search, [member.space.recipe(values) for values in wanted])


def final_plan(
    sweep: Sweep, searches: list[ModelSearch], contents: dict[str, str], store: Store
) -> Plan:
    """The graph of the winners' training and comparison."""
    found = {
        each.member.model: [recipes_of(t, each.member, sweep.search)
                            for t in winners(each, sweep, store)]
        for each in searches
    }
    final, searched = final_sweep(sweep, found)
    content = content_of(sweep, searches, store)
    goals = ", ".join(goal.definition for goal in content.goals)
    what = "the best"
    if len(final.recipes) > 1:
        what = f"a member of the Pareto front, in the order of {content.goals[0].definition},"
    notes = [
        f"Recipes called {', '.join(final.recipes)} differ by model: each is {what} that a search "
        f"({content.algorithm}, from recipe {content.base}) found for {goals}, on examples that "
        f"are not in this report. {report_folder(f'{sweep.name}-trials')}/{REPORT_FILE} shows them."
    ]
    alone = {name: recipe.models for name, recipe in final.recipes.items() if recipe.models}
    where = "under What training changed" if sweep.untuned else "in MLflow's runs, in no table here"
    notes += [f"{name} is trained for {', '.join(models)} alone, whose front is longer; its scores "
              f"are {where}." for name, models in alone.items()]
    plan = build(final, contents, searched, [*notes, *fairness(content)])
    adopt(plan, store)
    return plan


def content_of(sweep: Sweep, searches: list[ModelSearch], store: Store) -> SearchContent:
    """What the report of a search is made from."""
    search, space = sweep.search, Space(sweep.recipes[sweep.search.base], sweep.search.space)
    return SearchContent(
        title=sweep.description or sweep.name,
        algorithm=search.algorithm.kind,
        base=search.base,
        goals=tuple(Goal(o.name, search.label(o), maximized(sweep, o)) for o in search.objectives),
        knobs=tuple(Knob(path, dimension.log_uniform is not None, space.base_value(path))
                    for path, dimension in search.space.items()),
        models=tuple(
            SearchedModel(
                each.member.model, each.member.side,
                trial_table(Ledger(store, each.folder), search),
                len(search.seeds_of(each.member.side)), each.member.idle,
                tuple(trial.number for trial in winners(each, sweep, store)),
            )
            for each in searches
        ),
        pairs=tuple((pair.moe, pair.dense) for pair in sweep.pairs),
        final_seeds=search.final_seeds,
        winners_report=f"{report_folder(f'{sweep.name}-search')}/report.html",
    )


def report(sweep: Sweep, searches: list[ModelSearch], store: Store, uri: str) -> str:
    """Write the search's report into the store and bring MLflow up to date; where it lies."""
    search, name = sweep.search, f"{sweep.name}-trials"
    place, content = report_folder(name), content_of(sweep, searches, store)
    with tempfile.TemporaryDirectory(prefix="search-report-") as folder:
        write(content, Path(folder))
        store.publish(Path(folder), place)
    trials = [(each.member.model, each.member.side, trial) for each in searches
              for _, trial in sorted(Ledger(store, each.folder).trials.items())]
    record_trials(name, search, trials, store, place, uri)
    return f"{store.path(place)}/{REPORT_FILE}"


def prepare(searches: list[ModelSearch], store: Store) -> tuple[Plan, set[str]]:
    """The data and model nodes that trials share, in one plan, and those that are missing."""
    shared = Plan(searches[0].plan.sweep)
    for each in searches:
        for key in each.plan.needs(k for m in each.measured for k in m.evaluations.values()):
            node = each.plan.nodes[key]
            if node.stage in ("data", "model"):
                shared.nodes.setdefault(key, node)
    states = survey(shared, store)
    return shared, {key for key, state in states.items() if state.status != "done"}


def folders_of(
    sweep: Sweep, searches: list[ModelSearch], contents: dict[str, str], store: Store
) -> set[str]:
    """The store folders that searches need: what their trials left or work on, and the winners.

    The training state of trials that were stopped early is not needed: their result is that.
    """
    search, found = sweep.search, set()
    for each in searches:
        found.add(each.folder)
        found |= {n.folder for n in each.plan.nodes.values() if n.stage in ("data", "model")}
        for trial in Ledger(store, each.folder).trials.values():
            found |= {folder for report in trial.reports for folder in report.nodes}
            if not trial.over:
                plan, _ = trial_plan(
                    selecting(sweep), contents, each.member.model,
                    recipes_of(trial, each.member, search), search.seeds_of(each.member.side),
                    objective_evaluations(search.objectives))
                settle(plan, store)
                found |= {node.folder for node in plan.nodes.values()}
    if not unfinished(searches, store):
        final = final_plan(sweep, searches, contents, store)
        rest = Plan(sweep, dict(final.nodes))
        leave_out_missing(rest, store)
        found |= {node.folder for each in (final, rest) for node in each.nodes.values()}
    return found
