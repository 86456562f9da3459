"""Every original format is read to exact rows, from small files of our own in that format."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from original_rows import FILES

from stages.data import sources
from stages.data.catalogue import CATALOGUE, find
from stages.data.spec import LABELLED, DataSpec
from stages.errors import BadInput, StageFailed

ORIGINALS = Path(__file__).with_name("originals")


def spec(name, path):
    return DataSpec(task=find(name, "x")[0].task, source=f"file:{path}", format=name)


@pytest.mark.parametrize(("name", "file", "rows", "dropped"), FILES, ids=lambda v: str(v)[:30])
def test_original_files_are_read_to_exact_rows(name, file, rows, dropped):
    loaded = sources.load(spec(name, ORIGINALS / file))
    found = [{k: row[k] for k in sorted(row)} for row in loaded.table.to_pylist()]
    assert found == [{k: row[k] for k in sorted(row)} for row in rows]
    assert loaded.dropped == dropped
    digest = hashlib.sha256((ORIGINALS / file).read_bytes()).hexdigest()
    assert loaded.files == {file: digest}
    published, _ = find(name, "x")
    assert sources.check(spec(name, ORIGINALS / file), "datasets.x") == published.pin_of(
        digest, next(iter(published.splits)))


def test_every_format_has_a_file():
    """A form or reader without a fixture would be untested."""
    assert {file for _, file, *_ in FILES} | {"sciq.jsonl"} == {p.name for p in ORIGINALS.iterdir()}
    styles = {name for name in CATALOGUE if name.startswith(("sst2_", "pile_"))}
    same = {"q_harm", "cona", "controversial", "physical_safety_safe", "physical_safety_unsafe",
            "anli_r2", "anli_r3", "dynasent", "dynasent_r2", "counterfactual_snli_original",
            "counterfactual_imdb_original", "sciq"}
    same |= {"cifar10", "cifar100", "imagenet"}  # test_images.py: their files are binary
    assert {name for name, *_ in FILES} | styles | same == set(CATALOGUE)


def test_sciq_choices_keep_the_right_answer_and_their_place():
    row, = sources.load(spec("sciq", ORIGINALS / "sciq.jsonl")).table.to_pylist()
    assert row["choices"][row["answer"]] == "water"
    assert sorted(row["choices"]) == ["iron", "oil", "salt", "water"]
    order = sorted(range(4), key=lambda i: hashlib.sha256(f"What is ice?/{i}".encode()).digest())
    assert row["answer"] == order.index(0)


def test_declarations_are_whole():
    for name, published in CATALOGUE.items():
        assert re.fullmatch(r"[a-z0-9_]+", name)
        assert published.citation and published.licence and published.files and published.title
        for form in published.forms:
            needed = {"classification": {"text", "label"}, "text": {"text"}, "prompts": {"prompt"},
                      "instructions": {"prompt", "response"},
                      "images": {"image", "label"},
                      "nli": {"premise", "hypothesis", "label"},
                      "paraphrase": {"sentence1", "sentence2", "label"}}.get(
                          published.task, {"question"})
            assert needed <= set(form.columns), name
            if form.labels:
                assert set(form.labels.values()) <= set(published.labels), name
        assert bool(published.labels) == (published.task in LABELLED), name
        for split, part in published.splits.items():
            assert not (part.files and part.web), name
            assert not part.files or published.hub is not None, name
            assert published.pin(split) and published.where(split)
    loose = {name for name, published in CATALOGUE.items()
             if published.pinned(next(iter(published.splits))) is False}
    # Whoever confirms a commit or a checksum for one of these takes it off the list.
    assert loose == {"alpaca", "do_not_answer", "snli_hard", "dynasent", "dynasent_r1",
                     "dynasent_r2", "hate_speech", "cifar10", "cifar100", "imagenet"}


def test_a_pin_changes_with_what_is_read():
    anli = CATALOGUE["anli_r1"]
    pins = {anli.pin(split) for split in anli.splits} | {CATALOGUE["anli_r2"].pin("test")}
    assert len(pins) == 4


def test_a_users_file_is_read_anew_where_its_declaration_has_changed(monkeypatch):
    brought = spec("anli_r1#test", ORIGINALS / "anli_test.jsonl")
    before = sources.check(brought, "data.x")
    assert sources.load(brought.model_copy(update={"content": before})).table.num_rows == 2
    anli = CATALOGUE["anli_r1"]
    swapped = {"e": "neutral", "n": "entailment", "c": "contradiction"}
    changed = tuple(replace(form, labels=form.labels | {
        name: swapped[name] for name in form.labels if name in swapped}) for form in anli.forms)
    monkeypatch.setitem(CATALOGUE, "anli_r1", replace(anli, forms=changed))
    assert sources.check(brought, "data.x") != before
    monkeypatch.setitem(CATALOGUE, "anli_r1", replace(anli, forms=tuple(
        replace(form, quoted=True) for form in anli.forms)))
    assert sources.check(brought, "data.x") != before


def test_published_counts_are_compared_and_a_difference_is_told():
    loaded = sources.load(spec("anli_r1#test", ORIGINALS / "anli_test.jsonl"))
    assert loaded.note == "2 rows, published are 1,000"
    assert loaded.citation.startswith("Nie et al. 2020")
    hard = ORIGINALS / "snli_1.0_test_hard.jsonl"
    assert "published are 3,261" in sources.load(spec("snli_hard", hard)).note
    # A sheet that changes weekly has no published number.
    sheet = ORIGINALS / "freshqa.csv"
    for premises in ("false", "true"):
        loaded = sources.load(spec(f"freshqa_{premises}_premises", sheet))
        assert "published are" not in loaded.note


def test_parquet_of_the_hub_is_read_with_its_numbered_labels(tmp_path):
    table = pa.table({"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, -1]})
    pq.write_table(table, tmp_path / "test.parquet")
    loaded = sources.load(spec("snli#test", tmp_path / "test.parquet"))
    assert loaded.table["label"].to_pylist() == ["contradiction"]
    assert loaded.dropped == {"no label": 1}
    # GLUE hides the labels of its test splits behind -1 and numbers its others.
    asked = {"question1": ["a", "b"], "question2": ["c", "d"], "label": [1, 0]}
    pq.write_table(pa.table(asked), tmp_path / "qqp.parquet")
    loaded = sources.load(spec("qqp", tmp_path / "qqp.parquet"))
    assert loaded.table["label"].to_pylist() == ["paraphrase", "not_paraphrase"]
    ratings = pa.table({"text": ["a", "b"], "toxicity": pa.array([0.5, 0.4], pa.float32())})
    pq.write_table(ratings, tmp_path / "civil.parquet")
    loaded = sources.load(spec("civil_comments", tmp_path / "civil.parquet"))
    assert loaded.table["label"].to_pylist() == ["toxic", "benign"]


def test_sst2_and_its_styles_share_the_validation_sentences(tmp_path):
    """GLUE's index of a sentence is its id in the file of the styles; the training split's indices
    are other sentences."""
    base = pa.table({"sentence": ["ill", "it is a good film"], "label": [0, 1], "idx": [0, 1]})
    pq.write_table(base, tmp_path / "sst2.parquet")

    def documents(name, path):
        table = sources.load(spec(name, path)).table
        return table["document"].to_pylist() if "document" in table.column_names else None

    shared = ["=sst2_validation/0", "=sst2_validation/1"]
    assert documents("sst2", tmp_path / "sst2.parquet") == shared
    assert documents("sst2_shakespeare_words", ORIGINALS / "style.jsonl") == shared[1:]
    assert documents("sst2#train", tmp_path / "sst2.parquet") is None
    assert documents("sst2", ORIGINALS / "sst2_dev.tsv") is None  # has no indices
    names = {name for name, found in CATALOGUE.items() for part in found.splits.values()
             if part.shared_documents == "sst2_validation"}
    assert len(names) == 11 and "sst2" in names
    sst2 = CATALOGUE["sst2"]
    for split in sst2.splits:
        alone = replace(sst2, splits=sst2.splits | {
            split: replace(sst2.splits[split], shared_documents="")})
        assert (alone.pin(split) != sst2.pin(split)) == (split == "validation")
        assert (alone.pin_of("", split) != sst2.pin_of("", split)) == (split == "validation")


def test_a_revised_review_shares_its_pair_with_the_original(tmp_path):
    path = tmp_path / "test_paired.tsv"
    path.write_text("Sentiment\tText\tbatch_id\n"
                    "Negative\tA \"\"great\"\" waste.\t13\nPositive\tA great time.\t13\n"
                    "Positive\tIt is fine\t4\nNegative\tIt is poor\t4\n")
    first, second = (f"=counterfactual_imdb/{batch}" for batch in (13, 4))
    tables = [sources.load(spec(f"counterfactual_imdb{name}", path)).table
              for name in ("", "_original")]
    assert [list(row.values()) for table in tables for row in table.to_pylist()] == [
        [first, "A great time.", "positive"], [second, "It is poor", "negative"],
        [first, 'A ""great"" waste.', "negative"], [second, "It is fine", "positive"]]


def test_a_revised_pair_is_one_document_with_its_original(tmp_path):
    """Of each pair come four rows, the premise revised in two of them; digests are of the premise
    that was revised, which SNLI has too."""
    rows = [("P", "H1"), ("Q1", "H"), ("P", "H2"), ("Q2", "H"),
            ("S1", "G"), ("S2", "G"), ("S", "G1"), ("S", "G2"), ("lone", "end")]
    path = tmp_path / "test.tsv"
    path.write_text("sentence1\tsentence2\tgold_label\n"
                    + "".join(f"{p}\t{h}\tneutral\n" for p, h in rows))

    def digests(*premises):
        return [f"=snli_premises/{hashlib.sha256(premise.encode()).hexdigest()[:16]}"
                for premise in premises]

    revised = sources.load(spec("counterfactual_snli", path)).table
    assert revised["document"].to_pylist() == digests(*"PPPPSSSS", "lone")
    original = sources.load(spec("counterfactual_snli_original", path)).table
    assert original["document"].to_pylist() == digests(*(premise for premise, _ in rows))


def test_a_long_premise_is_named_by_its_digest(tmp_path):
    long = "word " * 20
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"premise": "{long}", "hypothesis": "h", "label": 0}}\n')
    table = sources.load(spec("snli", path)).table
    digest = hashlib.sha256(long.encode()).hexdigest()[:16]
    assert table["document"].to_pylist() == [f"=snli_premises/{digest}"]
    # The hard pairs are of the same premises; MNLI's are others.
    for name, group in (("snli_hard", "=snli_premises/"), ("mnli", "")):
        hard = tmp_path / f"{name}.jsonl"
        hard.write_text(f'{{"sentence1": "{long}", "sentence2": "h", "gold_label": "neutral"}}\n')
        found = sources.load(spec(name, hard)).table["document"].to_pylist()
        assert found == [group + digest]


WRONG = [
    ("a.jsonl", b'{"sentence": "x"}\n', "sentence1, sentence2, gold_label"),
    (
        "a.jsonl",
        b'{"sentence1": "a", "sentence2": "b", "gold_label": "maybe"}\n',
        "label 'maybe' is none of entailment, neutral, contradiction",
    ),
    ("a.txt", b"gold_label\tsentence1\tsentence2\nneutral\ta\n", "line 2 has 2 cells, not 3"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_files_in_another_format_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    for at in ("snli", "snli_hard") if name.endswith("jsonl") else ("snli",):
        with pytest.raises(BadInput) as caught:
            sources.check(spec(at, path), "datasets.x")
        told = str(caught.value)
        assert message in told and "\n" not in told and told.startswith("datasets.x.source: ")


def test_original_files_of_another_encoding_keep_their_marks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"gold_label\tsentence1\tsentence2\nneutral\tcaf\xe9\t\x93b\x94\n")
    loaded = sources.load(spec("snli", path))
    (row,) = loaded.table.to_pylist()
    assert (row["premise"], row["hypothesis"]) == ("caf\u00e9", "\u201cb\u201d")
    assert loaded.note == (
        "lines that are not UTF-8, read as Windows-1252: 1; 1 rows, published are 10,000")


def test_the_readers_of_odd_files_name_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1\tpositive\n")
    with pytest.raises(BadInput, match="line 1 has 2 cells, not 3"):
        sources.check(spec("semeval", path), "datasets.x")
    path = tmp_path / "a.json"
    path.write_text('{"mnli": []}')
    with pytest.raises(BadInput, match="there is no task 'sst2' .there are mnli"):
        sources.check(spec("adv_glue_sst2", path), "datasets.x")
    path.write_text('{"documents": []}')
    with pytest.raises(BadInput, match="cannot be read as json: 'labels'"):
        sources.check(spec("contract_nli", path), "datasets.x")


NAMES = [
    ({"source": "catalogue:anli_r4"}, "no data set 'anli_r4'; did you mean anli_r"),
    ({"source": "catalogue:anli_r1#dev"}, "anli_r1 has no split 'dev'; name one of test, valid"),
    ({"source": "catalogue:anli_r1", "task": "prompts"}, "set task: nli"),
    ({"source": "catalogue:anli_r1", "labels": {"neutral": "x"}}, "add contradiction or remove"),
    ({"source": "catalogue:anli_r1", "columns": {"premise": "x"}}, "remove this field"),
    ({"source": "catalogue:anli_r1", "format": "snli"}, "`format` cannot act"),
    ({"source": "file:a.jsonl", "format": "snly"}, "datasets.x.format: the catalogue has no data"),
]


@pytest.mark.parametrize(("fields", "message"), NAMES)
def test_what_cannot_act_is_refused(fields, message):
    with pytest.raises(BadInput) as caught:
        sources.check(DataSpec(**{"task": "nli", **fields}), "datasets.x")
    assert message in str(caught.value)


def test_labels_of_a_published_set_can_be_renamed():
    renamed = {"entailment": "yes", "neutral": "no", "contradiction": "no"}
    given = spec("anli_r1", ORIGINALS / "anli_test.jsonl").model_copy(update={"labels": renamed})
    assert sources.load(given).table["label"].to_pylist() == ["no", "yes"]


def test_a_file_that_is_not_there_yet_is_a_failure_of_its_node_alone(tmp_path):
    missing = spec("implicit_hate", tmp_path / "absent.tsv")
    assert sources.check(missing, "datasets.x") is None
    with pytest.raises(StageFailed, match="no such file; put implicit_hate_v1_stg1_posts.tsv there"
                                          "; access: request form"):
        sources.load(missing)
    with pytest.raises(StageFailed, match="adv_civil: cannot be downloaded; get BOSS"):
        sources.load(DataSpec(task="classification", source="catalogue:adv_civil"))
