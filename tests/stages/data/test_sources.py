import hashlib
import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data import files, sources
from stages.data.spec import DataSpec
from stages.errors import BadInput, StageFailed

# What pandas or a type inference would take for missing values, numbers, dates or quoting.
LITERAL = [
    "NA",
    "null",
    "None",
    "nan",
    "",
    "1e5",
    "007",
    "true",
    "2020-01-01",
    'say "hi"',
    '"whole"',
    "it's",
    " padded ",
    "a\\tb",
    "é\u2028",
]
SPECIAL = ["a\tb", "two\nlines", "comma, here"]


def spec(source, task="classification", **fields):
    return DataSpec(task=task, source=f"file:{source}", **fields)


def texts(source, **fields):
    return sources.load(spec(source, **fields)).table["text"].to_pylist()


def quoted(text):
    doubled = text.replace('"', '""')
    return f'"{doubled}"'


def write_csv(path, values):
    rows = "".join(f"{quoted(text)},x\r\n" for text in values)
    path.write_bytes(f"text,label\r\n{rows}".encode())


def write_tsv(path, values):
    path.write_bytes(("text\tlabel\n" + "".join(f"{text}\tx\n" for text in values)).encode())


def write_jsonl(path, values):
    lines = [json.dumps({"text": text, "label": "x"}) for text in values]
    path.write_text("\n".join(lines))


def write_parquet(path, values):
    pq.write_table(pa.table({"text": values, "label": ["x"] * len(values)}), path)


def write_arrow(path, values):
    table = pa.table({"text": values, "label": ["x"] * len(values)})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "csv": (write_csv, LITERAL + SPECIAL),
    "tsv": (write_tsv, LITERAL),
    "jsonl": (write_jsonl, LITERAL + SPECIAL),
    "parquet": (write_parquet, LITERAL + SPECIAL),
    "arrow": (write_arrow, LITERAL + SPECIAL),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_text_is_read_literally(tmp_path, suffix):
    write, values = WRITERS[suffix]
    path = tmp_path / f"data.{suffix}"
    write(path, values)
    assert texts(path) == values


def test_carriage_returns_inside_cells_survive_or_are_refused(tmp_path):
    values = ["a\rb", "a\r\nb", "\r", "tab\tand\rreturn"]
    for suffix in ("csv", "jsonl", "parquet", "arrow"):
        path = tmp_path / f"a.{suffix}"
        WRITERS[suffix][0](path, values)
        assert texts(path) == values, suffix
    path = tmp_path / "a.tsv"
    path.write_bytes(b"text\tlabel\na\rb\tx\n")  # a row break to some readers, text to others
    with pytest.raises(BadInput, match="Expected 2 columns, got 1"):
        texts(path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_marks_that_are_not_utf8_survive_and_their_lines_are_counted(tmp_path, suffix):
    """Bytes of Windows-1252 (and one that it lacks) beside proper UTF-8."""
    path = tmp_path / f"a.{suffix}"
    WRITERS[suffix][0](path, ["fine", "it@s a caf#", "na\u00efve", "odd$"])
    written = path.read_bytes().replace(b"\\u00ef", "\u00ef".encode())
    for mark, byte in ((b"@", b"\x92"), (b"#", b"\xe9"), (b"$", b"\x81")):
        written = written.replace(mark, byte)
    path.write_bytes(written)
    assert texts(path) == ["fine", "it\u2019s a caf\u00e9", "na\u00efve", "odd\x81"]
    assert sources.load(spec(path)).note == "lines that are not UTF-8, read as Windows-1252: 2"
    WRITERS[suffix][0](path, ["fine", "na\u00efve"])
    assert sources.load(spec(path)).note == ""


def test_unquoted_csv_cells_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufefftext,label\nNA,x\nnull,x\n"",x\n,x\n'.encode())
    assert texts(path) == ["NA", "null", "", ""]


def test_line_breaks_in_csv_cells_at_the_edges_of_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "_BLOCK", 64)
    values = [f"line one of {i}\nline two\n\nline four" for i in range(50)]
    write_csv(tmp_path / "a.csv", values)
    assert texts(tmp_path / "a.csv") == values


def test_arrow_file_format_is_read_like_the_stream(tmp_path):
    table = pa.table({"text": ["a"], "label": ["x"]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert texts(tmp_path / "a.arrow") == ["a"]


def test_columns_and_labels_are_mapped_and_optional_columns_filled(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"review": "fine", "y": 1, "key": 7}\n{"review": "bad", "y": 0, "key": 8}\n')
    columns = {"text": "review", "label": "y", "id": "key"}
    loaded = sources.load(spec(path, columns=columns, labels={"0": "neg", "1": "pos"}))
    assert loaded.table.to_pylist() == [
        {"id": "7", "text": "fine", "label": "pos"},
        {"id": "8", "text": "bad", "label": "neg"},
    ]
    path.write_text('{"prompt": "p"}\n')
    assert sources.load(spec(path, "prompts")).table.to_pylist() == [
        {"prompt": "p", "category": ""}
    ]


def test_booleans_are_labels_and_category_columns_are_text(tmp_path):
    table = pa.table(
        {"text": pa.array(["a", "b"]).dictionary_encode(), "label": pa.array([True, False])}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    loaded = sources.load(spec(tmp_path / "a.parquet", labels={"true": "yes", "false": "no"}))
    assert loaded.table.to_pylist() == [
        {"text": "a", "label": "yes"},
        {"text": "b", "label": "no"},
    ]


def test_check_returns_the_digest_of_what_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nfine,pos\n")
    expected = hashlib.sha256(b"text,label\nfine,pos\n").hexdigest()
    assert sources.check(spec(path), "data.mine") == expected
    vader = DataSpec(task="classification", source="pack:vader/amazon")
    assert sources.check(vader, "data.x") == sources.SETS["pack:vader/amazon"].content
    hub = DataSpec(task="prompts", source="hub:a/b@1#test")
    assert sources.check(hub, "data.x") is None


def test_columns_that_later_rows_begin_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"question": "Who?", "choices": ["a", "b"], "answer": 0, "id": "x"},
            {"question": "What?", "choices": ["a", "b"], "answer": 1, "id": "y",
             "context": "A passage."}]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows))
    asked = DataSpec(task="multiple_choice", source=f"file:{path}")
    assert sources.load(asked).table["context"].to_pylist() == ["", "A passage."]
    # Ids must be there for all or for none.
    path.write_text("\n".join(json.dumps(row) for row in (dict(rows[0], id=None), rows[1])))
    with pytest.raises(BadInput, match="id"):
        sources.load(asked)
    del rows[0]["id"]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(BadInput, match="id"):
        sources.load(asked)


def test_a_file_edited_after_the_plan_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nfine,pos\n")
    planned = spec(path)
    planned = planned.model_copy(update={"content": sources.check(planned, "data.x")})
    assert sources.load(planned).table.num_rows == 1
    path.write_text("text,label\nfine,neg\n")
    with pytest.raises(StageFailed, match="edited after the plan"):
        sources.load(planned)


WRONG_NAMES = [
    ("pack:vader/amzon", "did you mean pack:vader/amazon"),
    ("pack:vadr/amazon", "did you mean pack:vader/amazon"),
    ("builtin:lookalike", "did you mean builtin:lookalikes"),
    ("pck:vader/amazon", "did you mean pack:"),
    ("data.csv", "a local file is file:PATH"),
    ("hub:owner/name#test", "give the revision"),
    ("hub:owner/name@main", "give the revision and the split"),
    ("hub:name@main#test", "hub:OWNER/NAME"),
    ("file:", "must begin with"),
]


@pytest.mark.parametrize(("source", "remedy"), WRONG_NAMES)
def test_wrong_sources_name_the_nearest_known_one(source, remedy):
    with pytest.raises(BadInput) as caught:
        sources.check(DataSpec(task="classification", source=source), "data.x")
    message = str(caught.value)
    assert message.startswith("data.x.source: ") and remedy in message and "\n" not in message


def test_hub_sources_are_parsed():
    assert sources.parse("hub:nyu-mll/glue:sst2@abc123#train[:10%]") == sources.HubSet(
        "nyu-mll/glue", "sst2", "abc123", "train[:10%]"
    )
    assert sources.parse("hub:a/b@v1.0#test") == sources.HubSet("a/b", None, "v1.0", "test")


WRONG_SPECS = [
    ({"task": "prompts"}, "data.x.task", "set task: classification"),
    ({"columns": {"text": "review"}}, "data.x.columns", "remove this field"),
    ({"columns": {"body": "review"}}, "data.x.columns", "no column 'body'"),
    ({"labels": {"positive": "good"}}, "data.x.labels", "add negative"),
    ({"splits": {}}, "data.x.splits", "names no split"),
    ({"splits": {"a": 0.7, "b": 0.4}}, "data.x.splits", "sum to 1.1"),
    ({"splits": {"../a": 1.0}}, "data.x.splits", "letters"),
    ({"rows": {"train": 3}}, "data.x.rows", "no split 'train'"),
]


@pytest.mark.parametrize(("fields", "place", "part"), WRONG_SPECS)
def test_wrong_specs_are_refused_without_reading(fields, place, part):
    given = {"task": "classification", "source": "pack:vader/amazon", **fields}
    with pytest.raises(BadInput) as caught:
        sources.check(DataSpec(**given), "data.x")
    assert str(caught.value).startswith(f"{place}: ") and part in str(caught.value)


def test_shared_documents_must_be_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label,source\nfine,x,1\n")
    shared = spec(path).model_copy(update={"shared_documents": "films"})
    with pytest.raises(BadInput, match="no column 'document' .*set columns: {document: NAME}"):
        sources.check(shared, "data.x")
    named = shared.model_copy(update={"columns": {"document": "source"}})
    sources.check(named, "data.x")
    assert sources.load(named).table["document"].to_pylist() == ["=films/1"]
    catalogue = DataSpec(task="nli", source="catalogue:snli", shared_documents="x")
    with pytest.raises(BadInput, match=r"^data\.x\.shared_documents: .*remove this field"):
        sources.check(catalogue, "data.x")
    alone = spec(path)
    assert "shared_documents" not in alone.identity() and "shared_documents" in shared.identity()


def test_labels_belong_to_classification():
    wrong = DataSpec(task="prompts", source="pack:pyrit/advbench", labels={"a": "b"})
    with pytest.raises(BadInput, match="has no labels"):
        sources.check(wrong, "data.x")


WRONG_FILES = [
    ("a.csv", "", "is empty"),
    ("a.csv", "text,label\n", "holds no rows"),
    ("a.csv", "text,lable\nfine,x\n", "no column 'label'.*columns: {label: lable}"),
    ("a.csv", "text,label\nfine,x,y\n", "cannot be read as csv.*Expected 2 columns, got 3"),
    ("a.csv", "text,label\nfine,x\n".encode("utf-16"), "no column 'text'"),
    ("a.csv", 'text,label\n"fine,x\n', "cannot be read as csv"),
    ("a.csv", "text,label,text\nfine,x,y\n", "two columns 'text'"),
    ("a.csv", "id,text,label\n1,fine,x\n2,bad,y\n1,odd,x\n", "id '1' stands on several rows"),
    ("a.csv", "id,text,label\n,fine,x\n", "1 of 1 rows have no id"),
    ("a.csv", "document,text,label\n,fine,x\n", "1 of 1 rows have no document"),
    ("a.tsv", "text,label\nfine,x\n", "no column 'text'"),
    ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', "cannot be read as jsonl: line 2"),
    ("a.jsonl", '{"text": "a", "label": "x"}\n[1]\n', "line 2 is not an object"),
    ("a.jsonl", '{"text": 5, "label": "x"}\n', "column text holds int64, not text"),
    ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": 5, "label": "x"}\n', "cannot be read as"),
    ("a.xlsx", "text,label\nfine,x\n", "of no known kind"),
    ("a.parquet", "PAR1 not really PAR1", "cannot be read as parquet"),
    ("a.arrow", "not really", "cannot be read as arrow"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG_FILES)
def test_wrong_files_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message) as caught:
        sources.check(spec(path), "data.x")
    assert str(caught.value).startswith("data.x.source: ") and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(BadInput, match="is not a file; check the path"):
        sources.check(spec(tmp_path / "absent.csv"), "data.x")
    for suffix in ("parquet", "arrow"):
        path = tmp_path / f"a.{suffix}"
        WRITERS[suffix][0](path, [f"text {i}" for i in range(1000)])
        os.truncate(path, path.stat().st_size - 40)
        with pytest.raises(BadInput, match=f"cannot be read as {suffix}"):
            sources.check(spec(path), "data.x")


def test_undeclared_labels_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nfine,pos\nbad,neg\nso so,mixed\n")
    with pytest.raises(BadInput, match=r"label 'mixed' is not among the declared ones \(pos, neg"):
        sources.check(spec(path, labels={"pos": "positive", "neg": "negative"}), "data.x")


def test_hub_class_labels_are_read_as_names(monkeypatch):
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    asked = []

    def load_dataset(*arguments, **named):
        asked.append((arguments, named))
        rows = {"sentence": ["bad", "fine", "NA"], "label": [0, 1, 1]}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    given = DataSpec(
        task="classification", source="hub:a/b:c@rev#train", columns={"text": "sentence"}
    )
    table = sources.load(given).table
    assert table["label"].to_pylist() == ["neg", "pos", "pos"]
    assert table["text"].to_pylist() == ["bad", "fine", "NA"]
    assert asked == [(("a/b", "c"), {"split": "train", "revision": "rev"})]


def test_hub_failures_are_one_line(monkeypatch):
    import datasets

    def load_dataset(*arguments, **named):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(StageFailed, match="hub:a/b@rev#x: could not be loaded: no route; check"):
        sources.load(DataSpec(task="prompts", source="hub:a/b@rev#x"))


def test_the_planner_imports_nothing_heavy():
    script = (
        "import sys, stages.data.sources as s; from stages.data.spec import DataSpec;"
        "s.check(DataSpec(task='classification', source='pack:vader/amazon'), 'f');"
        "print(sorted({'torch', 'pandas', 'datasets', 'transformers', 'ray'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_large_file_is_checked_quickly(tmp_path):
    path = tmp_path / "a.csv"
    rows = "".join(f"{i},row number {i},{'x' if i % 2 else 'y'}\n" for i in range(200_000))
    path.write_text("id,text,label\n" + rows)
    started = time.process_time()
    sources.check(spec(path), "data.x")
    assert time.process_time() - started < 2
