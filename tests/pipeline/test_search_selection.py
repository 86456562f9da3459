"""The documents that choose recipes are in no split that the winners are reported on."""

import json
from pathlib import Path

import pandas as pd
import pytest
from search_sweeps import searching
from smoke import SMOKE

from pipeline.search.checks import check_search
from pipeline.search.plan import reserve, sharing
from pipeline.sweep import Sweep
from stages.data.spec import DataSpec
from stages.data.stage import run as prepare
from stages.errors import BadInput

SELECTS = {"objectives": [{"score": "questions/accuracy"}]}


def test_the_fifth_is_put_aside_by_document_and_never_reported(tmp_path):
    """Of 400 documents with 3 rows each, 80 select and 320 report."""
    rows = pd.DataFrame({"id": [f"r{i}" for i in range(1200)],
                         "document": [f"d{i // 3}" for i in range(1200)],
                         "prompt": [f"prompt {i}" for i in range(1200)]})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    sweep = searching(**{**SELECTS, "objectives": [{"score": "refusal/harmful_refusal_rate"}]})
    reserved = reserve(sweep).datasets["harmful"]
    spec = DataSpec(**{f: getattr(reserved, f) for f in DataSpec.model_fields if f != "content"})
    spec = spec.model_copy(update={"source": f"file:{tmp_path / 'rows.csv'}"})
    (tmp_path / "out").mkdir()
    prepare(spec, {}, tmp_path / "out")
    parts = {p.stem: pd.read_parquet(p) for p in (tmp_path / "out").glob("*.parquet")}
    documents = {name: set(part["document"]) for name, part in parts.items()}
    assert {name: len(found) for name, found in documents.items()} == {
        "selection": 80, "test": 320}
    assert not documents["selection"] & documents["test"]
    assert {name: len(part) for name, part in parts.items()} == {"selection": 240, "test": 960}


def test_a_cap_on_rows_is_shared_out_as_the_documents_are():
    sweep = searching("datasets.questions.rows={test: 60}", **SELECTS)
    assert reserve(sweep).datasets["questions"].rows == {"test": 60, "selection": 15}


SHARED_ROWS = pd.DataFrame({
    "id": [f"r{i}" for i in range(400)], "document": [f"d{i}" for i in range(400)],
    "text": [f"plain text {i}" for i in range(400)],
    "label": ["positive" if i % 2 else "negative" for i in range(400)]})
STANDARD = {"objectives": [{"score": "standard/standard_accuracy"}]}


def parts(sweep: Sweep, folder: Path) -> dict[str, dict[str, pd.DataFrame]]:
    """Data set to split to the rows that are made of it."""
    found = {}
    for name, entry in sweep.datasets.items():
        if name in ("plain", "style", "again"):
            fields = {f: getattr(entry, f) for f in DataSpec.model_fields if f != "content"}
            (folder / name).mkdir()
            prepare(DataSpec(**fields), {}, folder / name)
            found[name] = {p.stem: pd.read_parquet(p) for p in (folder / name).glob("*.parquet")}
    return found


def sharing_sweep(*overrides: str, template: str = "sentiment", **datasets: dict) -> Sweep:
    """A search on ``plain`` and ``again``, beside reports on ``style``."""
    standard = {"kind": "adversarial_sets", "standard": "plain", "adversarial": ["again"],
                "template": template}
    others = {"kind": "adversarial_sets", "standard": "style", "adversarial": ["plain"],
              "template": template}
    return searching(
        *(f"datasets.{name}={json.dumps(entry)}" for name, entry in datasets.items()),
        f"evaluations.standard={json.dumps(standard)}", f"evaluations.others={json.dumps(others)}",
        *overrides, **STANDARD)


def files(folder: Path, group: str | None) -> dict[str, dict]:
    """Texts, their rewrites and the first half of the texts once more."""
    SHARED_ROWS.to_csv(folder / "plain.csv", index=False)
    SHARED_ROWS.assign(text=[f"thou text {i}" for i in range(400)]).to_csv(
        folder / "style.csv", index=False)
    shared = {"shared_documents": group} if group else {}
    return {name: {"task": "classification", "source": f"file:{folder}/{file}.csv", **shared}
            for name, file in (("plain", "plain"), ("style", "style"), ("again", "plain"))}


def test_what_selects_is_in_no_reported_split_of_a_set_with_the_same_documents(tmp_path):
    """Of 400 documents of a group 86 select; neither rewrites nor the same file under another
    name report one of them."""
    sweep = sharing_sweep(**files(tmp_path, "texts"))
    check_search(sweep, SMOKE)
    made = parts(reserve(sweep), tmp_path)
    selecting = set(made["plain"]["selection"]["document"])
    assert len(selecting) == 86
    for name in ("plain", "style", "again"):
        reported = set(made[name]["test"]["document"])
        assert len(reported) == 314 and not reported & selecting, name


def test_the_same_source_under_another_name_is_cut_alike(tmp_path):
    sweep = sharing_sweep(**files(tmp_path, None))
    check_search(sweep, SMOKE)
    reserved = reserve(sweep)
    # Rewrites that are not declared to be any are texts of their own.
    assert reserved.datasets["style"].splits == {"test": 1.0}
    made = parts(reserved, tmp_path)
    texts = set(made["plain"]["selection"]["text"])
    assert len(texts) == 80 and len(made["again"]["test"]) == 320
    assert not texts & set(made["again"]["test"]["text"])


def test_hard_pairs_of_a_premise_that_selects_are_not_reported(tmp_path):
    """SNLI-hard is pairs of SNLI's test split: 200 premises with 3 hypotheses, of which 1 is hard,
    of every second premise."""
    rows = [{"sentence1": f"Premise {i} of a text", "sentence2": f"hypothesis {i} {j}",
             "gold_label": ("entailment", "neutral", "contradiction")[j]}
            for i in range(200) for j in range(3)]
    for name, kept in (("all", rows), ("hard", rows[::6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    sets = {name: {"task": "nli", "source": f"file:{tmp_path}/{file}.jsonl", "format": form}
            for name, file, form in (("plain", "all", "snli"), ("style", "hard", "snli_hard"),
                                     ("again", "all", "snli"))}
    sweep = sharing_sweep(template="nli", **sets)
    check_search(sweep, SMOKE)
    made = parts(reserve(sweep), tmp_path)
    premises = set(made["plain"]["selection"]["premise"])
    assert len(premises) == 36 and len(made["plain"]["selection"]) == 108
    for name, rows in (("style", 77), ("again", 492)):
        reported = made[name]["test"]
        assert len(reported) == rows and not premises & set(reported["premise"]), name


def test_a_split_of_the_catalogue_is_the_same_named_or_not():
    anli = {"task": "nli", "source": "catalogue:anli_r1"}
    style, again = (anli | {"source": f"catalogue:anli_r1#{split}"}
                    for split in ("test", "validation"))
    sweep = sharing_sweep(template="nli", plain=anli, style=style, again=again)
    assert sharing(sweep, "plain") == ["style"]


@pytest.mark.parametrize(("group", "changed", "fields"), [
    ("texts", {"style": {"seed": 1}}, "datasets.style: has documents of plain, some of which "
     "choose the recipes, and is cut in another way; give both the same seed, or evaluate"),
    ("texts", {"plain": {"splits": {"selection": 0.5, "test": 0.5}}},
     "datasets.again: has documents of plain, some of which choose the recipes, and is cut in "
     "another way; give both the same splits"),
    (None, {"again": {"labels": {"positive": "negative", "negative": "positive"}}},
     "give both the same labels"),
    (None, {"again": {"disjoint_from": ["hotels"], "seed": 2}},
     "give both the same seed and disjoint_from"),
])
def test_sets_with_the_same_documents_that_are_cut_otherwise_are_refused(
    tmp_path, group, changed, fields
):
    sets = files(tmp_path, group)
    sets = {name: entry | changed.get(name, {}) for name, entry in sets.items()}
    with pytest.raises(BadInput) as caught:
        check_search(sharing_sweep(**sets), SMOKE)
    assert fields in str(caught.value)
