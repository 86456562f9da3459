"""Rows whose label stands for none are left out and counted, whatever the source."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import spec
from test_stage import prepare

from stages.data import sources
from stages.data.pack_readers import Rows
from stages.data.sets import KnownSet
from stages.data.spec import DataSpec
from stages.errors import BadInput

MARKS = ["-", "-1", "", " ", None]
GIVEN = ["neutral", *MARKS, "entailment"]


def pairs(labels):
    return [{"id": str(n), "document": str(n), "premise": f"P {n}", "hypothesis": f"H {n}",
             "label": label} for n, label in enumerate(labels)]  # fmt: skip


def write(path, rows):
    """Rows as a file of the kind that its name says; null is an empty cell in CSV and TSV."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    mark = {".csv": ",", ".tsv": "\t"}.get(path.suffix)
    lines = map(json.dumps, rows)
    if mark:
        cells = [list(rows[0]), *(row.values() for row in rows)]
        lines = (mark.join("" if cell is None else cell for cell in row) for row in cells)
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("source", ["jsonl", "csv", "tsv", "parquet", "hub", "pack"])
def test_marks_of_no_label_are_left_out_of_every_source(monkeypatch, tmp_path, source):
    import datasets

    rows, before = pairs(GIVEN), {}
    given = spec(tmp_path / f"a.{source}", "nli")
    if source == "hub":
        given = DataSpec(task="nli", source="hub:a/b@1#test")
        found = datasets.Dataset.from_list(rows)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    elif source == "pack":
        given = DataSpec(task="nli", source="pack:a/b")
        before = {"neutral": 2}  # what its reader left out
        known = KnownSet("nli", "", lambda: Rows(rows, before), "")
        monkeypatch.setitem(sources.SETS, "pack:a/b", known)
    else:
        write(tmp_path / f"a.{source}", rows)
        sources.check(given, "data.x")
    loaded = sources.load(given)
    assert loaded.table.to_pylist() == [rows[0], rows[-1]]
    assert loaded.dropped == before | {"no label": len(MARKS)}


def test_hidden_class_labels_of_the_hub(monkeypatch):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    found = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c", "d"], "label": [0, -1, 1, None]}, features=features
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    given = DataSpec(task="classification", source="hub:a/b@1#test")

    def read(**labels):
        loaded = sources.load(given.model_copy(update={"labels": labels}))
        return loaded.table["label"].to_pylist(), loaded.dropped

    assert read() == (["neg", "pos"], {"no label": 2})
    assert read(neg="0", pos="1") == (["0", "1"], {"no label": 2})
    assert read(neg="0", pos="1", **{"-1": "2"}) == (["0", "2", "1"], {"no label": 1})


# The labels of a file, those that are declared, and what is kept.
DECLARED = [
    ([0, 1, -1], {}, ["0", "1"]),
    ([0, 1, -1, None], {"0": "negative", "1": "positive"}, ["negative", "positive"]),
    (["e", "-", "n"], {"e": "entailment", "n": "neutral"}, ["entailment", "neutral"]),
    ([1, -1, None], {"1": "positive", "-1": "negative"}, ["positive", "negative"]),
    (["+", "-", "-1"], {"+": "positive", "-": "negative"}, ["positive", "negative"]),
    (["x", "", None, "-"], {"x": "toxic", "": "benign"}, ["toxic", "benign", "benign"]),
]


@pytest.mark.parametrize(("labels", "declared", "kept"), DECLARED)
def test_a_mark_that_is_declared_is_a_label(tmp_path, labels, declared, kept):
    path = tmp_path / "a.jsonl"
    write(path, [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)])
    loaded = sources.load(spec(path, labels=declared))
    assert loaded.table["label"].to_pylist() == kept
    assert loaded.dropped == {"no label": len(labels) - len(kept)}


def test_other_labels_that_are_not_declared_are_still_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [{"text": "fine", "label": "-"}, {"text": "bad", "label": "--"}])
    with pytest.raises(BadInput, match="label '--' is not among the declared ones"):
        sources.check(spec(path, labels={"x": "y"}), "data.x")


@pytest.mark.parametrize("labels", [["-", "-1"], [None, None]])
def test_a_source_without_any_label_is_refused(tmp_path, labels):
    path = tmp_path / "a.jsonl"
    write(path, pairs(labels))
    with pytest.raises(BadInput, match=r"^data\.x\.source: .*none of its 2 rows has a label; map"):
        sources.check(spec(path, "nli"), "data.x")


def test_every_labelled_task_and_no_other(tmp_path):
    def load(task, *rows):
        path = tmp_path / "a.parquet"
        write(path, list(rows))
        loaded = sources.load(spec(path, task))
        return loaded.table.num_rows, loaded.dropped

    two = {"sentence1": "A", "sentence2": "B"}
    image = {"image": b"\x89PNG"}
    for task, row in (("paraphrase", two), ("images", image), ("classification", {"text": "A"})):
        found = load(task, row | {"label": "7"}, row | {"label": "-1"}, row | {"label": "-"})
        assert found == (1, {"no label": 2})
    assert load("prompts", {"prompt": "-", "category": "-"}, {"prompt": "-1", "category": ""}) == (
        2, {})  # fmt: skip
    assert load("open_question", {"question": "2 - 3?", "answers": ["-1"], "category": "-"}) == (
        1, {})  # fmt: skip


def test_they_are_counted_in_the_card_and_their_ids_and_texts_are_free(tmp_path):
    rows = pairs(GIVEN)
    rows[1] |= {"id": "0", "premise": "P 0", "hypothesis": "H 0"}  # as the first row
    card, splits = prepare(tmp_path / "a", rows, task="nli")
    assert card.dropped == {"no label": len(MARKS), "empty": 0, "duplicates": 0, "overlap": 0}
    assert card.labels == {"test": {"entailment": 1, "neutral": 1}}
    clean, same = prepare(tmp_path / "b", [rows[0], rows[-1]], task="nli")
    assert clean.digest == card.digest and clean.dropped["no label"] == 0
    assert splits["test"].equals(same["test"])
