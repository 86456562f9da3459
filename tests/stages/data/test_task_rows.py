"""The rows of each task: choices, statements, answers, pairs; what of them is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import spec

from stages.data import sources
from stages.data.spec import DataSpec
from stages.errors import BadInput

WRONG_CHOICES = [
    ({"choices": ["a"], "answer": 0}, "row 1 needs two or more choices"),
    ({"choices": ["a", ""], "answer": 0}, "none of them empty"),
    (
        {"choices": ["a", "b"], "answer": 2},
        r"answer 2, .* index of one of its 2 choices \(0 to 1\)",
    ),
    ({"choices": ["a", "b"], "answer": -1}, "answer -1"),
    ({"choices": ["a", "b"]}, "answer None"),
    ({"choices": None, "answer": 0}, "two or more choices"),
]


@pytest.mark.parametrize(("row", "message"), WRONG_CHOICES)
def test_choices_and_answers_are_checked(tmp_path, row, message):
    right = {"question": "q1", "choices": ["a", "b"], "answer": 1}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(right) + "\n")
    assert sources.load(spec(path, "multiple_choice")).table.to_pylist() == [
        {**right, "context": ""}
    ]
    path.write_text(f"{json.dumps(right)}\n{json.dumps({'question': 'q2', **row})}\n")
    with pytest.raises(BadInput, match=message):
        sources.check(spec(path, "multiple_choice"), "data.x")


def test_csv_cannot_hold_choices(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,choices,answer\nq,a|b,0\n")
    with pytest.raises(BadInput, match="choices holds string, not lists of texts.*JSONL"):
        sources.check(spec(path, "multiple_choice"), "data.x")


TASK_ROWS = {
    "nli": {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"},
    "paraphrase": {"sentence1": "It rains.", "sentence2": "null", "label": "paraphrase"},
    "statements": {
        "question": "Do pigs fly?",
        "best_answer": "No.",
        "correct_answers": ["No, they walk.", "They do not."],
        "incorrect_answers": ["Yes."],
        "best_incorrect_answer": "Yes.",
        "category": "animals",
    },
    "open_question": {"question": "Who?", "answers": ["NA", "null"], "category": ""},
    "text": {"text": "Once\tupon\na time."},
}


@pytest.mark.parametrize("task", TASK_ROWS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "hub"])
def test_every_task_is_read_alike_from_files_and_hub(monkeypatch, tmp_path, task, suffix):
    import datasets

    row = TASK_ROWS[task]
    path = tmp_path / f"a.{suffix}"
    given = spec(path, task)
    if suffix == "hub":
        given = DataSpec(task=task, source="hub:a/b@1#test")
        found = datasets.Dataset.from_list([row])
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row) + "\n")
    assert sources.load(given).table.to_pylist() == [row]


WRONG_ROWS = [
    ("paraphrase", {"sentence2": 4}, "sentence2 holds int64, not text"),
    ("statements", {"incorrect_answers": []}, "row 0 needs one or more incorrect_answers"),
    ("statements", {"correct_answers": ["a", ""]}, "none of them empty"),
    ("open_question", {"answers": None}, "answers holds null, not lists of texts"),
    ("open_question", {"question": 4}, "question holds int64, not text"),
]


@pytest.mark.parametrize(("task", "changed", "message"), WRONG_ROWS)
def test_wrong_rows_of_a_task_are_refused(tmp_path, task, changed, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(TASK_ROWS[task] | changed) + "\n")
    with pytest.raises(BadInput, match=message):
        sources.check(spec(path, task), "data.x")


def test_labels_of_nli_are_mapped(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("premise\thypothesis\tlabel\nIt rains.\tIt is dry.\t2\n")
    table = sources.load(spec(path, "nli", labels={"2": "contradiction"})).table
    assert table["label"].to_pylist() == ["contradiction"]
