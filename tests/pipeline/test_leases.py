"""Two commands on one store take turns at a node."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from pipeline.execute import execute
from pipeline.leases import PREFIX, STALE, Leases
from pipeline.store import Store
from tests.pipeline.test_run import SMOKE

PLACE = "finetune/a@1"


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def files(store: Store, place: str = PLACE) -> set[str]:
    return {name for name in store.files(place) if name.startswith(PREFIX)}


def left_by(store: Store, host: str, process: int, age: float = 0.0) -> None:
    """A lease that was last renewed ``age`` seconds ago."""
    path = f"{PLACE}/{PREFIX}0.json"
    store.write_json(path, {"host": host, "process": process})
    then = time.time() - age
    os.utime(f"{store.root}/{path}", (then, then))


def test_a_place_has_one_holder_until_it_is_released(store, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    first, second = Leases(store), Leases(store)
    assert first.take(PLACE) is None
    assert second.take(PLACE).startswith(f"process {os.getpid()} of ")
    assert second.take("finetune/b@1") is None
    assert len(files(store)) == 1, "who has to wait leaves no lease"
    first.release(PLACE)
    assert second.take(PLACE) is None
    second.close()
    assert files(store) | files(store, "finetune/b@1") == set()


def test_who_waits_looks_again_after_a_while_and_not_each_time(store):
    first, second = Leases(store), Leases(store)
    first.take(PLACE)
    other = second.take(PLACE)
    first.release(PLACE)
    assert second.take(PLACE) == other


def test_a_lease_of_a_process_that_is_gone_from_this_machine_does_not_count(store):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                           capture_output=True, text=True, check=True)
    left_by(store, os.uname().nodename, int(ended.stdout))
    assert Leases(store).take(PLACE) is None
    assert f"{PREFIX}0.json" not in files(store)


@pytest.mark.parametrize(("age", "taken"), [(STALE - 20, False), (STALE + 5, True)])
def test_a_lease_of_another_machine_counts_as_long_as_it_is_renewed(store, age, taken):
    left_by(store, "elsewhere", 1, age)
    other = Leases(store).take(PLACE)
    assert (other is None) == taken
    assert taken or other == "process 1 of elsewhere"


def test_a_held_lease_is_renewed(store, monkeypatch):
    leases = Leases(store)
    leases.take(PLACE)
    (name,) = files(store)
    path = f"{store.root}/{PLACE}/{name}"
    os.utime(path, (0, 0))
    leases.renew()
    assert os.stat(path).st_mtime == 0
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + 16)
    leases.renew()
    assert time.time() - os.stat(path).st_mtime < 5
    assert json.loads(store.read_bytes(f"{PLACE}/{name}"))["process"] == os.getpid()


@pytest.mark.parametrize("finished", [True, False])
def test_a_node_that_another_command_works_at_is_waited_for(cluster, job, store, finished):
    node = job.plan.nodes["data/reviews"]
    other = Leases(store)
    assert other.take(node.folder) is None
    told, outcomes = [], {}
    waited = threading.Event()

    def tell(event) -> None:
        told.append(event.kind)
        if event.kind == "waits":
            waited.set()

    thread = threading.Thread(target=lambda: outcomes.update(
        execute(job.plan, {node.key}, store, SMOKE.parent, tell)))
    thread.start()
    assert waited.wait(60)
    assert not store.folders(node.folder)
    if finished:
        shutil.copytree(f"{job.store.root}/{node.folder}", f"{store.root}/{node.folder}",
                        dirs_exist_ok=True)
    other.close()
    thread.join(120)
    assert outcomes[node.key].status == "done"
    assert told == ["waits", "done"] if finished else ["waits", "start", "done"]
    assert len(store.folders(node.folder)) == 1, "one attempt, by whoever made it"
    assert files(store, node.folder) == set()
