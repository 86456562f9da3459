"""What a person reads in the terminal: plans, progress, results."""

import json
import sys
import time
from collections import Counter
from pathlib import Path

from pipeline.estimate import Estimator
from pipeline.estimate_text import counted, summary_lines, work_text
from pipeline.job import Event, Outcome, report_folder
from pipeline.plan import Node, Plan
from pipeline.store import PROGRESS, Store
from pipeline.survey import State

_MARKS = {"done": "✓", "stale": "~", "to run": "·"}
_SHOWN = 60
"""Nodes printed of a plan before it is summarised."""


def plan_lines(
    plan: Plan,
    states: dict[str, State],
    store: Store,
    folder: Path,
    everything: bool = False,
) -> list[str]:
    """The stage graph: a line per node, with what it waits for, asks of the cluster and will take.

    ``folder`` is that of the sweep file.
    """
    estimator = Estimator(plan, store, folder)
    works = {key: estimator.work(node) for key, node in plan.nodes.items()}
    counts = Counter(state.status for state in states.values())
    summary = ", ".join(f"{counts[s]} {s}" for s in ("done", "stale", "to run") if counts[s])
    total = counted(len(plan.nodes))
    lines = [f"{plan.sweep.name}: {total} ({summary}) · store {store.uri}", ""]
    nodes = list(plan.nodes.values())
    shown = nodes if everything or len(nodes) <= _SHOWN else [
        node for node in nodes if states[node.key].status == "stale"][:_SHOWN]
    width = max((len(node.key) for node in shown), default=0)
    for node in shown:
        state = states[node.key]
        text = f"{_MARKS[state.status]} {node.key:<{width}}  {state.status:<7}{_resources(node)}"
        lines.append(text)
        if node.inputs and len(node.inputs) <= 6:
            lines.append(f"    needs {', '.join(dict.fromkeys(node.inputs.values()))}")
        if state.because:
            lines.append(f"    because {state.because}")
        if state.status != "done" and (text := work_text(works[node.key])):
            lines.append(f"    {text}")
    if len(shown) < len(nodes):
        for stage, total in Counter(node.stage for node in nodes).items():
            lines.append(f"  {stage:<10} {counted(total)}")
        lines.append("`--all` prints every node")
    return [*lines, *summary_lines(plan, states, estimator, works)]


def _resources(node: Node) -> str:
    r = node.resources
    parts = [f"{r.workers} × {r.cpus:g} CPU" if r.workers > 1 else f"{r.cpus:g} CPU"]
    if r.gpus:
        parts.append(f"{r.gpus:g} GPU each")
    if getattr(node.spec, "expert_parallel", 1) > 1:
        parts.append(f"expert parallel {node.spec.expert_parallel}")
    return "  " + ", ".join(parts)


class Watcher:
    """A line when a node starts, moves or ends; on a terminal, progress keeps to one line."""

    def __init__(self, plan: Plan, todo: set[str], store: Store):
        self.total, self.ended = len(todo), 0
        self.live = sys.stdout.isatty()
        self.width = max(len(key) for key in todo)
        self.begun: dict[str, float] = {}
        self.last: dict[str, float] = {}
        done = len(plan.nodes) - len(todo)
        print(f"{plan.sweep.name}: {len(plan.nodes)} nodes, {done} done, {len(todo)} to run "
              f"· store {store.uri}", flush=True)

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            print("\r\033[K", end="")

    def tell(self, event: Event) -> None:
        """Show one event."""
        key = event.node.key
        now = time.time()
        if event.kind == "start":
            self.begun[key] = now
            if event.node.stage == "finetune":
                self._line(f"{'':>9} {key:<{self.width}}  started")
        elif event.kind == "waits":
            self._line(f"{'':>9} {key:<{self.width}}  waits: {event.progress['text']}")
        elif event.kind == "progress":
            progress = event.progress
            text = f"{progress['done']}/{progress['total']} {progress['text']}"
            line = f"{'':>9} {key:<{self.width}}  {text}"
            if self.live:
                print(f"\r\033[K{line}", end="", flush=True)
            elif now - self.last.get(key, 0) >= 10:
                self.last[key] = now
                print(line, flush=True)
        else:
            self.ended += 1
            seconds = now - self.begun.get(key, now)
            detail = {"done": f"{seconds:.0f} s"}.get(event.kind, event.kind)
            message = event.outcome.message
            if event.kind == "blocked":  # what failed was told in full above
                message = message.split(":")[0]
            self._line(f"[{self.ended:>3}/{self.total:>3}] {key:<{self.width}}  {detail}"
                       + (f": {message}" if message else ""))

    def _line(self, text: str) -> None:
        print(("\r\033[K" if self.live else "") + text, flush=True)


def finish_lines(plan: Plan, outcomes: dict[str, Outcome], store: Store) -> list[str]:
    """The comparison table, what failed, and where the report lies."""
    from stages.compare.table import VERDICTS_FILE, render_text, render_verdicts

    lines = []
    folder = report_folder(plan.sweep.name)
    if "comparison.parquet" in store.files(folder):
        import pandas as pd

        with store.fs.open_input_file(f"{store.root}/{folder}/comparison.parquet") as file:
            lines += ["", render_text(pd.read_parquet(file)), ""]
        if VERDICTS_FILE in store.files(folder):
            with store.fs.open_input_file(f"{store.root}/{folder}/{VERDICTS_FILE}") as file:
                lines += [render_verdicts(pd.read_parquet(file)), ""]
        lines.append(f"report  {store.path(folder)}/report.html")
    failed = {key: o for key, o in outcomes.items() if o.status == "failed" or o.lacks}
    blocked = sum(o.status == "blocked" for o in outcomes.values())
    for key, outcome in failed.items():
        lines.append(f"failed  {key}: {outcome.message}")
    if blocked:
        lines.append(f"blocked {blocked} node(s) that need what failed; mend it and run again")
    return lines


def score_lines(plan: Plan, outcomes: dict[str, Outcome], store: Store) -> list[str]:
    """The metrics of each evaluation of one model."""
    from stages.evaluate.partial import left_out, unasked

    lines = []
    for node in plan.nodes.values():
        if node.stage != "evaluate":
            continue
        outcome = outcomes.get(node.key)
        if outcome is not None and outcome.status != "done":
            lines.append(f"{node.key}: {outcome.status}: {outcome.message}")
            continue
        folder = store.fetch(node.folder)
        summary = json.loads((folder / "summary.json").read_text())
        lines += ["", f"{node.spec.evaluation.axis} · {node.key}"]
        evaluation = node.spec.evaluation
        if missing := (*left_out(evaluation), *unasked(evaluation)):
            lines.append(f"  without {', '.join(missing)}")
        width = max(map(len, summary), default=0)
        for name, found in summary.items():
            lines.append(f"  {name:<{width}}  {found['value']:8.3f}  "
                         f"[{found['ci_low']:.3f}, {found['ci_high']:.3f}]  n={found['n']}")
        lines.append(f"  scores {folder / 'scores.parquet'}")
    return lines


def status_lines(plan: Plan, states: dict[str, State], store: Store) -> list[str]:
    """How far each stage is, and what runs now."""
    lines = [f"{plan.sweep.name} · store {store.uri}", ""]
    stages = dict.fromkeys(node.stage for node in plan.nodes.values())
    for stage in stages:
        keys = [key for key, node in plan.nodes.items() if node.stage == stage]
        done = sum(states[key].status == "done" for key in keys)
        bar = "█" * round(20 * done / len(keys)) + "░" * (20 - round(20 * done / len(keys)))
        lines.append(f"{stage:<9} {bar} {done}/{len(keys)}")
    for key, node in plan.nodes.items():
        if states[key].status == "done":
            continue
        progress = store.read_json(f"{node.folder}/{PROGRESS}")
        if progress:
            age = time.time() - progress["time"]
            lines.append(f"  {key}: {progress['done']}/{progress['total']} {progress['text']} "
                         f"({age:.0f} s ago)")
    if states[plan.compare.key].status == "done":
        lines.append(f"report    {store.path(report_folder(plan.sweep.name))}/report.html")
    return lines
