"""What of a plan is done, stale or to run, and what another sweep has done already."""

from dataclasses import dataclass, replace
from typing import Literal

from pipeline.plan import Node, Plan
from pipeline.store import UNJUDGED, Store
from stages.data.card import CARD_FILE
from stages.data.spec import TRAINED
from stages.evaluate.spec import JUDGE

Status = Literal["done", "stale", "to run"]


@dataclass(frozen=True)
class State:
    """Whether a node is done, and if it is stale, because of what."""

    status: Status
    because: str = ""


def adopt(plan: Plan, store: Store) -> None:
    """Let nodes stand for equal results that are finished under another name.

    The fingerprint says what a result is; the name is only how a sweep calls it.
    """
    for stage in dict.fromkeys(node.stage for node in plan.nodes.values()):
        if stage == "compare":
            continue  # its report lies under the sweep's name
        alike: dict[str, list[str]] = {}
        for folder in sorted(store.folders(stage)):
            alike.setdefault(folder.rpartition("@")[2], []).append(f"{stage}/{folder}")
        nodes = [n for n in plan.nodes.values() if n.stage == stage]
        done = store.finished(f for n in nodes for f in alike.get(n.fingerprint, ()))
        for node in nodes:
            others = [folder for folder in alike.get(node.fingerprint, ()) if folder in done]
            if others and node.folder not in others:
                plan.nodes[node.key] = replace(node, found=others[0])
        if stage == "data":
            settle(plan, store)


def settle(plan: Plan, store: Store) -> None:
    """Tell a plan which rows its finished data sets were made without, as they are trained on."""
    kept = [key for key, node in plan.nodes.items()
            if any(role.startswith(TRAINED) for role in node.inputs)]
    done = store.finished(plan.nodes[key].folder for key in kept)
    for key in kept:
        folder = plan.nodes[key].folder
        if folder in done:
            card = store.read_json(f"{store.attempt_of(folder)}/{CARD_FILE}")
            plan.settle(key, card["left_out"])


def survey(plan: Plan, store: Store) -> dict[str, State]:
    """What of a plan is done, stale (its name was finished under another fingerprint) or to run."""
    nodes = plan.nodes.values()
    folders = {
        stage: store.folders(stage) for stage in dict.fromkeys(node.stage for node in nodes)
    }
    candidates = [n.folder for n in nodes if n.folder.split("/", 1)[1] in folders[n.stage]]
    done = store.finished(candidates)
    older: dict[str, list[str]] = {}
    for stage, names in folders.items():
        for folder in names:
            older.setdefault(f"{stage}/{folder.rpartition('@')[0]}", []).append(
                f"{stage}/{folder}")
    states = {}
    for node in nodes:
        if node.folder in done:
            states[node.key] = State("done")
            continue
        others = [folder for folder in older.get(node.key, ()) if folder != node.folder]
        manifests = [m for m in map(store.manifest, others) if m is not None]
        if manifests:
            last = max(manifests, key=lambda manifest: manifest["finished"])
            states[node.key] = State("stale", _difference(last, node, plan))
        else:
            states[node.key] = State("to run")
    return states


def leave_out_missing(plan: Plan, store: Store) -> dict[str, str]:
    """Put in the place of each unfinished evaluation, and each unfinished data set, the one that
    does without what is not finished, and without judges that failed when they were asked.

    Returns the roles of these judges, with the reason.
    """
    failed: dict[str, str] = {}
    for stage in ("data", "evaluate"):
        states = survey(plan, store)
        for key, node in list(plan.nodes.items()):
            if node.stage != stage or states[key].status == "done":
                continue
            roles = [role for role, k in node.inputs.items() if states[k].status != "done"]
            if roles:
                plan.leave_out(key, roles)
            node = plan.nodes[key]
            if any(role.startswith(JUDGE) for role in node.inputs):
                lacks = store.read_json(f"{node.folder}/{UNJUDGED}") or {}
                if lacks and not store.finished([node.folder]):
                    plan.leave_out(key, lacks)
                    failed |= lacks
    return failed


def _difference(manifest: dict, node: Node, plan: Plan) -> str:
    """What changed between a finished node of the same name and this one."""
    changes = []
    if manifest["version"] != node.spec.VERSION:
        changes.append(f"stage version {manifest['version']} → {node.spec.VERSION}")
    before, after = _flat(manifest["identity"]), _flat(node.spec.identity())
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            changes.append(f"{name} {before.get(name, 'absent')} → {after.get(name, 'absent')}")
    for role in sorted(manifest["inputs"].keys() | node.inputs.keys()):
        key = node.inputs.get(role)
        now = plan.nodes[key].folder if key else "absent"
        if manifest["inputs"].get(role, "absent") != now:
            changes.append(f"input {role} changed")
    return "; ".join(changes)


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict) and value:
        return {k: v for name, child in value.items()
                for k, v in _flat(child, f"{prefix}.{name}" if prefix else name).items()}
    return {prefix: value}
