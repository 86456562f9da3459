"""Which Ray cluster a command joins."""

import pytest
import ray

from pipeline.execute import connect


@pytest.mark.parametrize(
    "given, environment, joined",
    [(None, None, "local"), (None, "ray://head:10001", "ray://head:10001"),
     ("10.0.0.1:6379", "ray://head:10001", "10.0.0.1:6379")],
)
def test_without_an_address_a_local_cluster_is_started(monkeypatch, given, environment, joined):
    asked = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    connect(given)
    assert asked["address"] == joined
    # A cluster elsewhere gets the working directory, a local one has it.
    assert ("runtime_env" in asked) == (joined != "local")
