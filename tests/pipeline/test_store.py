"""The artifact store, on a local folder and on a file system that is not local."""

import json

import pytest

from pipeline.store import Store
from stages.errors import BadInput


@pytest.fixture(params=["local", "remote"])
def store(request, tmp_path, monkeypatch):
    """A store; the remote one goes through copies, as a bucket does."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return Store(str(tmp_path / "store") if request.param == "local" else "mock:///store")


def test_an_attempt_counts_only_once_its_manifest_is_written(store):
    with store.attempt("data/a@1") as (attempt, output):
        (output / "rows.txt").write_text("x")
    assert store.finished(["data/a@1"]) == set()
    with pytest.raises(FileNotFoundError):
        store.fetch("data/a@1")
    store.commit("data/a@1", {"attempt": attempt})
    assert store.finished(["data/a@1", "data/b@1"]) == {"data/a@1"}
    assert (store.fetch("data/a@1") / "rows.txt").read_text() == "x"
    assert store.folders("data") == {"a@1"}


def test_two_writers_of_a_node_do_not_mix(store):
    attempts = {}
    with store.attempt("data/a@1") as (first, one), store.attempt("data/a@1") as (second, two):
        (one / "rows.txt").write_text("first")
        (two / "rows.txt").write_text("second")
        attempts = {first: "first", second: "second"}
    for attempt, text in attempts.items():
        store.commit("data/a@1", {"attempt": attempt})
        assert (store.fetch("data/a@1") / "rows.txt").read_text() == text


def test_a_model_can_be_fetched_without_its_weights(store):
    with store.attempt("model/a@1") as (attempt, output):
        for name in ("config.json", "model-1.safetensors", "more/tokens.json"):
            (output / name).parent.mkdir(exist_ok=True)
            (output / name).write_text(name)
    store.commit("model/a@1", {"attempt": attempt})
    folder = store.fetch("model/a@1", weights=False)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names - {"model-1.safetensors"} == {"config.json", "more/tokens.json"}
    assert store.local or "model-1.safetensors" not in names
    assert (store.fetch("model/a@1") / "model-1.safetensors").read_text() == "model-1.safetensors"
    assert store.attempt_of("model/a@1") == f"model/a@1/{attempt}"


def test_a_failed_attempt_leaves_nothing(store):
    with pytest.raises(RuntimeError), store.attempt("data/a@1") as (_, output):
        (output / "rows.txt").write_text("x")
        raise RuntimeError
    assert store.folders("data/a@1") == set()


def test_json_is_read_back_and_absent_is_none(store):
    store.write_json("data/a@1/progress.json", {"done": 1})
    assert store.read_json("data/a@1/progress.json") == {"done": 1}
    assert store.read_json("data/a@1/other.json") is None
    assert store.files("data/a@1") == {"progress.json"}
    assert store.size("data/a@1") == len(json.dumps({"done": 1}, indent=1))
    store.delete("data/a@1")
    assert store.folders("data") == set()


def test_unknown_scheme_is_refused_with_a_remedy():
    with pytest.raises(BadInput, match=r"--store ftp://x/y: .*; name a folder, s3:// or gs://"):
        Store("ftp://x/y")
