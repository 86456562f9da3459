"""How the tests are shared out between two processes (`make test`)."""

import os

import pytest

# Each of two processes has a core of its own; tiny models gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers would give way to the other process, and theirs is the longest group.
os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_itemcollected(item):
    """One process has the Ray cluster, and a module stays whole for the sake of its fixtures."""
    group = "cluster" if "cluster" in item.fixturenames else item.path.stem
    item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(items):
    """The cluster's tests first: they are the longest group."""
    items.sort(key=lambda item: "cluster" not in item.fixturenames)
