"""One Ray cluster of two simulated machines, and one smoke sweep run on it as a job."""

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.cluster_utils import Cluster
from smoke import ROOT, SECRET, planned

from pipeline.store import Store

# A job's `python` is the one found first on the path of the cluster's processes.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="session")
def cluster():
    """Two machines of one CPU each, so that two workers never share one."""
    dashboard, *agents = _free_ports(3)
    # Agents take submitted jobs, and on their default port that of another cluster would be first.
    cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 1, "include_dashboard": True, "dashboard_port": dashboard,
        "dashboard_agent_listen_port": agents[0]})
    cluster.add_node(num_cpus=1, dashboard_agent_listen_port=agents[1])
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield SimpleNamespace(
        address=cluster.address, dashboard=f"http://{cluster.head_node.webui_url}")
    ray.shutdown()
    cluster.shutdown()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="session")
def job(cluster, tmp_path_factory):
    """The smoke sweep, submitted to the cluster as the README says; its store and what was
    printed."""
    store = tmp_path_factory.mktemp("smoke") / "store"
    block = re.search(r"^ray job submit (?:.*\\\n)*.*\n", (ROOT / "README.md").read_text(), re.M)
    told = block[0].replace("\\\n", " ")
    for words, here in (
        ("http://HEAD:8265", cluster.dashboard), ("…", SECRET), ("quickstart", "smoke"),
        ("s3://BUCKET/moe", str(store)), ("http://MLFLOW:5000", f"sqlite:///{store}/mlflow.db"),
    ):  # fmt: skip
        assert words in told
        told = told.replace(words, here)
    for _ in range(20):
        done = subprocess.run(shlex.split(told), cwd=ROOT, text=True, capture_output=True,
                              check=False, timeout=900)
        # Ray's job agents come up some seconds after the machines.
        if "No available agent" not in done.stderr:
            break
        time.sleep(3)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(output=done.stdout + done.stderr, store=Store(str(store)), folder=store,
                           plan=planned())
