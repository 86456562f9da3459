"""Brings MLflow up to date with what a sweep has finished.

What was logged last is remembered in the store, so that a command that changed nothing does not
start MLflow at all.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

from pipeline.children import Child, DataInput, content_fingerprint
from pipeline.job import report_folder
from pipeline.plan import Node, Plan
from pipeline.store import Store
from pipeline.sweep import UNTUNED
from pipeline.tracking import Tracker
from stages.compare.table import VERDICTS_FILE, render_text, render_verdicts
from stages.data.card import DataCard
from stages.finetune.spec import CURVE_FILE, EVIDENCE_FILE, ROUTING_FIGURE
from stages.models.card import ModelCard

_CUT = "\n… the whole table is in report.md"
_LONGEST = MAX_TAG_VAL_LENGTH - len(_CUT) - len("\n\n```\n\n```")
"""Characters of a description that MLflow keeps, without those around the table."""


def record(plan: Plan, store: Store, uri: str) -> list[str]:
    """Log the sweep's finished checkpoints and its report; lines that say where to look."""
    sweep = plan.sweep
    children = list(_children(plan, store))
    if not children:
        return []
    report = store.download(report_folder(sweep.name))
    fingerprint = content_fingerprint(sweep.name, children, report)
    memory = f"tracking/{sweep.name}.json"
    known = store.read_json(memory) or {}
    if known.get("fingerprint") != fingerprint or known.get("uri") != uri:
        description = sweep.description
        if report is not None:
            description += f"\n\n```\n{_table(report, _LONGEST - len(description))}\n```"
        logged = Tracker(uri).log_sweep(
            sweep.name, children, report,
            description=description,
            texts={"sweep.json": sweep.model_dump_json(indent=1, by_alias=True)},
        )
        known = {"fingerprint": fingerprint, "uri": uri, "path": logged.path,
                 "comparison_path": logged.comparison_path}
        store.write_json(memory, known)
    if uri.startswith("http"):
        return [f"MLflow  {uri.rstrip('/')}{known['comparison_path']}"]
    installed = shutil.which("moe-reliability") is not None  # not so in a .venv that is not active
    command = "moe-reliability" if installed else f"{os.path.relpath(sys.executable)} -m pipeline"
    return [f"MLflow  `{command} ui --tracking-uri {uri}`, then compare the runs at",
            f"        http://127.0.0.1:5000{known['comparison_path']}"]


def _table(report: Path, most: int) -> str:
    """The tables of the terminal, cut at a line where they are longer than so many characters."""
    table = render_text(pd.read_parquet(report / "comparison.parquet"))
    if (report / VERDICTS_FILE).exists():
        table += f"\n\n{render_verdicts(pd.read_parquet(report / VERDICTS_FILE))}"
    if len(table) <= most:
        return table
    return table[: table.rindex("\n", 0, most)] + _CUT


def _children(plan: Plan, store: Store) -> Iterator[Child]:
    """One child for each model × recipe × seed whose checkpoint and some scores are finished."""
    roles = plan.compare.inputs
    done = store.finished(plan.nodes[key].folder for key in roles.values())
    for role, key in roles.items():
        if not role.startswith("checkpoint/") or plan.nodes[key].folder not in done:
            continue
        place = role.removeprefix("checkpoint/")
        prefix = f"scores/{place}/"
        scores = {other.removeprefix(prefix): plan.nodes[roles[other]] for other in roles
                  if other.startswith(prefix) and plan.nodes[roles[other]].folder in done}
        if scores:
            yield _child(plan, store, place, plan.nodes[key], scores)


def _child(plan: Plan, store: Store, place: str, node: Node, scores: dict[str, Node]) -> Child:
    model, recipe, seed = place.split("/")
    tuned = recipe != UNTUNED
    folder = store.fetch(node.folder)
    manifests = [store.manifest(n.folder) for n in (*scores.values(), *([node] if tuned else ()))]
    summaries = {
        name: json.loads((store.fetch(n.folder) / "summary.json").read_text())
        for name, n in scores.items()
    }
    params = {key: value for key, value in node.spec.identity().items()
              if key not in ("data", "seed")} if tuned else {}
    return Child(
        model=model,
        recipe=recipe,
        seed=int(seed),
        pairs=tuple(p.name for p in plan.sweep.pairs if model in (p.moe, p.dense)),
        card=ModelCard.read(folder),
        metrics=summaries,
        scores_digest="-".join(n.fingerprint for n in scores.values()),
        checkpoint_uri=store.path(f"{node.folder}/{store.manifest(node.folder)['attempt']}"),
        started=min(manifest["started"] for manifest in manifests),
        finished=max(manifest["finished"] for manifest in manifests),
        params=params,
        curve=pd.read_parquet(folder / CURVE_FILE) if tuned else None,
        data=tuple(_data(plan, store, node, scores)),
        artifacts=tuple(path for name in ("card.json", CURVE_FILE, EVIDENCE_FILE, ROUTING_FIGURE)
                        if (path := folder / name).exists()),
    )


def _data(plan: Plan, store: Store, node: Node, scores: dict[str, Node]) -> Iterator[DataInput]:
    """The splits that a checkpoint was trained and scored on, each once."""
    uses = {(t.dataset, t.split): "training" for t in getattr(node.spec, "data", ())}
    for scored in scores.values():
        for dataset, split in scored.spec.evaluation.datasets().items():
            uses.setdefault((dataset, split), "evaluation")
    for (dataset, split), use in uses.items():
        card = DataCard.read(store.fetch(plan.nodes[f"data/{dataset}"].folder))
        yield DataInput(f"{dataset}/{split}", card.digest[split], card.source, card.rows[split],
                        use)
