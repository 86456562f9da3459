"""Lists and deletes node folders that no given sweep needs."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.checks import check
from pipeline.plan import Plan, build
from pipeline.search.checks import check_search
from pipeline.search.run import folders_of, model_searches
from pipeline.store import Store
from pipeline.survey import adopt, leave_out_missing
from pipeline.sweep_file import load

STAGES = ("data", "model", "judge", "finetune", "evaluate", "compare", "search")


def needed_by(sweeps: Iterable[Path], store: Store) -> set[str]:
    """The node folders that sweep files need, their searches' included; raises ``BadInput``."""
    needed = set()
    for path in sweeps:
        sweep = load(path)
        plan = build(sweep, check(sweep, path))
        adopt(plan, store)
        rest = Plan(sweep, dict(plan.nodes))
        leave_out_missing(rest, store)
        needed |= {node.folder for each in (plan, rest) for node in each.nodes.values()}
        if sweep.search is not None:
            contents = check_search(sweep, path)
            searches = model_searches(sweep, contents, path.resolve().parent)
            needed |= folders_of(sweep, searches, contents, store)
    return needed


def collect(needed: set[str], store: Store, delete: bool) -> list[str]:
    """One line per folder that is not needed, and the bytes in all.

    Attempts beside a finished node's own (left by killed runs) count too.
    """
    lines, total = [], 0
    for stage in STAGES:
        for name in sorted(store.folders(stage)):
            folder = f"{stage}/{name}"
            for path in [folder] if folder not in needed else _left_over(folder, store):
                size = store.size(path)
                total += size
                lines.append(f"{'deleted' if delete else 'unused '} {size / 1e6:10.1f} MB  {path}")
                if delete:
                    store.delete(path)
    verb = "freed" if delete else "could be freed; --yes deletes them"
    return [*lines, f"{len(lines)} folder(s), {total / 1e6:.1f} MB {verb}"]


def _left_over(folder: str, store: Store) -> list[str]:
    manifest = store.manifest(folder)
    if manifest is None:
        return []
    return [f"{folder}/{name}" for name in sorted(store.folders(folder))
            if name.startswith("attempt-") and name != manifest["attempt"]]
