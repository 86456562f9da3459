"""Lists and deletes node folders that no given sweep needs."""

from pipeline.plan import Plan
from pipeline.store import Store

STAGES = ("data", "model", "judge", "finetune", "evaluate", "compare", "search")


def collect(
    plans: list[Plan], store: Store, delete: bool, searched: set[str] = frozenset()
) -> list[str]:
    """One line per folder that none of the plans needs, and the bytes in all.

    ``searched`` are the folders that the sweeps' searches need.

    Attempts beside a finished node's own (left by killed runs) count too.
    """
    needed = {node.folder for plan in plans for node in plan.nodes.values()} | searched
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
