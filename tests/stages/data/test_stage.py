import hashlib
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data import stage
from stages.data.card import DataCard
from stages.data.schema import SCHEMAS, normalise
from stages.data.spec import DataSpec
from stages.errors import StageFailed

SPLITS = {"train": 0.6, "select": 0.1, "test": 0.3}


def prepare(folder, rows, inputs=None, /, task="classification", **fields):
    """Run the stage on rows written as JSONL; the card and the splits as lists of rows."""
    folder.mkdir()
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = folder / "output"
    output.mkdir()
    stage.run(DataSpec(task=task, source=f"file:{source}", **fields), inputs or {}, output)
    card = DataCard.read(output)
    return card, {split: pq.read_table(output / f"{split}.parquet") for split in card.rows}


def documents(count=50, each=4):
    return [
        {"id": f"{d}_{i}", "document": str(d), "text": f"text {i} of {d}", "label": "ab"[i % 2]}
        for d in range(count)
        for i in range(each)
    ]


def test_splits_share_no_document_and_hold_the_given_shares(tmp_path):
    card, splits = prepare(tmp_path / "a", documents(), splits=SPLITS)
    found = {split: set(table["document"].to_pylist()) for split, table in splits.items()}
    assert {split: len(names) for split, names in found.items()} == {
        "train": 30,
        "select": 5,
        "test": 15,
    }
    assert len(set.union(*found.values())) == 50
    assert card.documents == {"train": 30, "select": 5, "test": 15}
    assert card.rows == {"train": 120, "select": 20, "test": 60}
    assert card.labels["train"] == {"a": 60, "b": 60}
    assert all(table.schema.equals(SCHEMAS["classification"]) for table in splits.values())


def test_the_seed_alone_decides_whatever_the_order_of_rows_and_splits(tmp_path):
    rows = [{key: row[key] for key in ("document", "text", "label")} for row in documents()]
    # Duplicates: of which one stays must not depend on the order either.
    rows.append({"document": "0", "text": "TEXT  0 of 0", "label": "a"})
    rows.extend({**row, "document": "49"} for row in rows[:40])
    fields = {"splits": SPLITS, "rows": {"train": 40}}
    first, tables = prepare(tmp_path / "a", rows, **fields)
    random.Random(1).shuffle(rows)
    fields["splits"] = dict(reversed(SPLITS.items()))
    second, same = prepare(tmp_path / "b", rows, **fields)
    assert first.digest == second.digest and len(set(first.digest.values())) == 3
    assert all(tables[split].equals(same[split]) for split in SPLITS)
    other, _ = prepare(tmp_path / "c", rows, seed=1, **fields)
    assert not set(first.digest.values()) & set(other.digest.values())


def test_no_split_tells_shared_documents_apart_in_any_set(tmp_path):
    """Another set that lacks some of the documents has the others in the same splits."""
    rows = documents(count=200, each=2)
    some = [row | {"id": f"new {row['id']}", "text": f"new {row['text']}"}
            for row in rows if int(row["document"]) % 7]

    def cut(name, rows, **fields):
        _, splits = prepare(tmp_path / name, rows, splits=SPLITS, **fields)
        return {name.rpartition("/")[2]: split for split, table in splits.items()
                for name in table["document"].to_pylist()}

    whole, part = cut("a", rows, shared_documents="g"), cut("b", some, shared_documents="g")
    assert len(part) == 171 and part == {name: whole[name] for name in part}
    shares = [list(whole.values()).count(split) / 200 for split in SPLITS]
    assert shares == pytest.approx(list(SPLITS.values()), abs=0.1)
    # Where nothing is shared each set has its shares exactly, and the boundaries move.
    whole, part = cut("c", rows), cut("d", some)
    assert [list(whole.values()).count(split) for split in SPLITS] == [120, 20, 60]
    assert part != {name: whole[name] for name in part}


def test_rows_of_each_label_are_limited_before_all_are(tmp_path):
    """200 rows: 120 of label a and 40 each of b and c."""
    rows = [row | {"label": "aaabc"[n % 5]} for n, row in enumerate(documents())]
    _, everything = prepare(tmp_path / "a", rows)
    capped, cut = prepare(tmp_path / "b", rows, rows_per_label={"test": 50})
    assert capped.labels["test"] == {"a": 50, "b": 40, "c": 40}
    assert all(row in everything["test"].to_pylist() for row in cut["test"].to_pylist())
    # From all documents, and those that a larger cap keeps are kept with it.
    chosen = [row for row in cut["test"].to_pylist() if row["label"] == "a"]
    assert 15 <= sum(int(row["document"]) < 25 for row in chosen) <= 35
    _, larger = prepare(tmp_path / "c", rows, rows_per_label={"test": 60})
    assert {r["id"] for r in cut["test"].to_pylist()} < {
        r["id"] for r in larger["test"].to_pylist()}
    both, _ = prepare(tmp_path / "d", rows, rows_per_label={"test": 10}, rows={"test": 25})
    assert both.rows == {"test": 25} and max(both.labels["test"].values()) <= 10
    spec = DataSpec(task="classification", source="file:x")
    assert "rows_per_label" not in spec.identity()
    capped = spec.model_copy(update={"rows_per_label": {"test": 1}})
    assert capped.identity()["rows_per_label"] == {"test": 1}


def test_rows_are_a_sample_of_the_split_and_the_digest_is_of_the_rows(tmp_path):
    whole, everything = prepare(tmp_path / "a", documents())
    card, cut = prepare(tmp_path / "b", documents(), rows={"test": 30})
    assert (whole.rows, card.rows) == ({"test": 200}, {"test": 30})
    kept = cut["test"].to_pylist()
    assert all(row in everything["test"].to_pylist() for row in kept)
    # Drawn over the rows, not from one end: about as many from each half of the documents.
    assert 8 <= sum(int(row["document"]) < 25 for row in kept) <= 22
    lines = [json.dumps(row, sort_keys=True, ensure_ascii=False) for row in kept]
    assert card.digest["test"] == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_duplicates_across_documents_never_reach_two_splits(tmp_path):
    rows = documents(each=2)
    for row in rows[1::2]:
        # The same text everywhere, but for case, white space and full-width letters.
        row["text"] = random.Random(row["id"]).choice(
            ["Good  PHONE", "good phone", "ｇｏｏｄ phone\n"]
        )
    card, splits = prepare(tmp_path / "a", rows, splits=SPLITS)
    texts = [normalise(text) for table in splits.values() for text in table["text"].to_pylist()]
    assert sorted(texts) == sorted({*texts}) and texts.count("good phone") == 1
    assert card.dropped == {"no label": 0, "empty": 0, "duplicates": 49, "overlap": 0}
    assert sum(card.rows.values()) == 51


def test_rows_of_disjoint_data_sets_are_left_out(tmp_path):
    other, _ = prepare(
        tmp_path / "other",
        [{"prompt": f"Ask {i}", "response": "No"} for i in range(10)],
        task="instructions",
        splits={"train": 0.5, "test": 0.5},
    )
    rows = [{"prompt": f"ask  {i}"} for i in range(8, 20)]
    alone, _ = prepare(tmp_path / "alone", rows, task="prompts")
    card, splits = prepare(
        tmp_path / "mine",
        rows,
        {"disjoint/other": tmp_path / "other" / "output"},
        task="prompts",
    )
    assert (alone.rows, alone.dropped["overlap"]) == ({"test": 12}, 0)
    assert (card.rows, card.dropped["overlap"]) == ({"test": 10}, 2)
    assert "ask  8" not in splits["test"]["prompt"].to_pylist()
    assert set(other.rows.values()) == {5}


def test_texts_that_are_trained_on_are_left_out_and_told_apart(tmp_path):
    folders, sets = {}, {"asked": range(9), "trained": range(8, 12), "more": range(11, 12)}
    for name, numbers in sets.items():
        prepare(tmp_path / name, [{"prompt": f"Ask {i}"} for i in numbers], task="prompts")
        folders[name] = tmp_path / name / "output"
    rows = [{"prompt": f"ask  {i}"} for i in range(8, 20)]

    def made(inputs, rows=rows):
        folder = tmp_path / "-".join([str(len(rows)), *(r.replace("/", "-") for r in inputs)])
        found = {role: folders[role.partition("/")[2]] for role in inputs}
        return prepare(folder, rows, found, task="prompts")[0]

    both = made(["disjoint/asked", "trained/trained"])
    assert (both.rows, both.dropped["overlap"]) == ({"test": 8}, 4)
    assert made(["disjoint/asked"]).left_out == ""
    # Those of 9 to 11, for 8 is asked for; in whichever sets they stand.
    texts = "\n".join(f"ask {i}" for i in sorted([9, 10, 11], key=str))
    assert both.left_out == hashlib.sha256(texts.encode()).hexdigest()
    again = made(["disjoint/asked", "trained/trained", "trained/more"])
    assert again.left_out == both.left_out != made(["trained/more"]).left_out
    with pytest.raises(StageFailed, match="each of the 1 distinct rows has a text of more; give"):
        made(["trained/more"], rows[3:4])


def test_a_question_is_the_same_only_with_its_passage(tmp_path):
    base = {"question": "What happened next?", "choices": ["a", "b"], "answer": 0}
    rows = [{**base, "context": "One."}, {**base, "context": "Two."}, {**base, "context": "ONE."}]
    card, splits = prepare(tmp_path / "a", rows, task="multiple_choice")
    assert card.rows == {"test": 2} and card.dropped["duplicates"] == 1
    assert splits["test"]["choices"].to_pylist() == [["a", "b"]] * 2


def test_rows_without_text_are_left_out_and_literal_words_are_kept(tmp_path):
    words = ["NA", "null", " ", None, 'a "b"\tc', ""]
    rows = [{"text": text, "label": "x"} for text in words]
    card, splits = prepare(tmp_path / "a", rows)
    assert sorted(splits["test"]["text"].to_pylist()) == sorted(["NA", "null", 'a "b"\tc'])
    assert card.dropped == {"no label": 0, "empty": 3, "duplicates": 0, "overlap": 0}
    table = splits["test"]
    assert table["document"].equals(table["id"])


def test_a_set_by_name_counts_what_its_reader_left_out(tmp_path):
    stage.run(DataSpec(task="prompts", source="builtin:lookalikes"), {}, tmp_path)
    card = DataCard.read(tmp_path)
    assert card.rows == {"test": 42} and card.labels == {}
    assert card.licence == "that of this project"


def test_failures_are_one_line_and_name_the_source(tmp_path):
    rows = documents(count=3)
    with pytest.raises(StageFailed, match="split 'select' gets none of the 12 distinct rows"):
        prepare(tmp_path / "a", rows, splits={"train": 0.9, "select": 0.1})
    with pytest.raises(StageFailed, match=r"file:.*id '0_0' stands on several rows") as caught:
        prepare(tmp_path / "b", [*rows, rows[0]])
    assert "\n" not in str(caught.value)
    source = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a"]}), source)
    source.write_bytes(source.read_bytes()[:-8])
    with pytest.raises(StageFailed, match="cannot be read as parquet"):
        stage.run(DataSpec(task="prompts", source=f"file:{source}"), {}, tmp_path)
