"""Authors' files that are no plain table, and columns that a file does not hold as such.

Each reader takes the path of one file and returns its rows with the columns that a ``Form`` names.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from stages.data.files import MIXED

ANSWERS = tuple(f"answer_{number}" for number in range(10))
"""Columns of the acceptable answers in a FreshQA sheet."""

_HEADING = re.compile(r" ?= [^=\n]+ = ?\n?")


def instructions(path: Path) -> pa.Table:
    """safety-tuned-llamas: one JSON object of parallel lists, ``instructions`` and perhaps tags."""
    content = json.loads(path.read_text(encoding="utf-8", errors=MIXED))
    prompts = content["instructions"]
    tags = content.get("tags") or [""] * len(prompts)
    if len(tags) != len(prompts):
        raise ValueError(f"{len(prompts)} instructions but {len(tags)} tags")
    return pa.table({"instruction": prompts, "tag": tags})


def records(path: Path) -> pa.Table:
    """Alpaca's JSON: a list with one object a row."""
    return pa.Table.from_pylist(json.loads(path.read_text(encoding="utf-8", errors=MIXED)))


def with_prompt(table: pa.Table) -> pa.Table:
    """``prompt``: Alpaca's instruction, and below it the input where there is one."""
    tasks, inputs = (table[name].to_pylist() for name in ("instruction", "input"))
    prompts = [
        f"{task}\n\n{given}" if given else task
        for task, given in zip(tasks, inputs, strict=True)
    ]
    return table.append_column("prompt", pa.array(prompts, pa.string()))


def adversarial_glue(task: str) -> Callable[[Path], pa.Table]:
    """AdvGLUE's ``dev.json``: one JSON object with a list of rows for each GLUE task."""

    def read(path: Path) -> pa.Table:
        content = json.loads(path.read_text(encoding="utf-8", errors=MIXED))
        if task not in content:
            raise ValueError(f"there is no task {task!r} (there are {', '.join(content)})")
        return pa.Table.from_pylist(content[task])

    return read


def contract_nli(path: Path) -> pa.Table:
    """ContractNLI's JSON: every contract with each of the hypotheses that are annotated for it."""
    content = json.loads(path.read_text(encoding="utf-8", errors=MIXED))
    hypotheses = {key: label["hypothesis"] for key, label in content["labels"].items()}
    rows = [
        {
            "document": str(contract["id"]),
            "premise": contract["text"],
            "hypothesis": hypotheses[key],
            "label": annotation["choice"],
        }
        for contract in content["documents"]
        for key, annotation in contract["annotation_sets"][0]["annotations"].items()
    ]
    return pa.Table.from_pylist(rows)


def tweets(path: Path) -> pa.Table:
    """SemEval task 4A: id, label and text between tabs, no header, no quoting.

    Some lines end with a further tab, which is no text.
    """
    rows = []
    with path.open(encoding="utf-8-sig", newline="\n", errors=MIXED) as file:
        for number, line in enumerate(file, 1):
            line = line.removesuffix("\n").removesuffix("\r")
            if not line:
                continue
            cells = line.removesuffix("\t").split("\t", 2)
            if len(cells) < 3:
                raise ValueError(f"line {number} has {len(cells)} cells, not 3")
            rows.append(dict(zip(("tweet", "label", "text"), cells, strict=True)))
    return pa.Table.from_pylist(rows)


def headed_text(path: Path) -> pa.Table:
    """SNLI's and MultiNLI's ``.txt``: cells between tabs under a header, no quoting."""
    with path.open(encoding="utf-8-sig", newline="\n", errors=MIXED) as file:
        lines = [line.removesuffix("\n").removesuffix("\r") for line in file]
    names = lines[0].split("\t")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        if len(cells) != len(names):
            raise ValueError(f"line {number} has {len(cells)} cells, not {len(names)}")
        rows.append(cells)
    return pa.table(
        {name: [row[place] for row in rows] for place, name in enumerate(names) if name}
    )


def with_revised_premise(table: pa.Table) -> pa.Table:
    """``source``: the digest of the premise that a row's own was revised from, or of its own.

    Four rows after one another revise one pair, two of them its hypothesis: the premise that these
    have in common is the original one.
    """
    premises = table["sentence1"].to_pylist()
    sources = []
    for start in range(0, len(premises), 4):
        block = premises[start : start + 4]
        original, times = Counter(block).most_common(1)[0]
        sources += [
            original if times > 1 and block.count(premise) == 1 else premise for premise in block
        ]
    digests = [hashlib.sha256(source.encode()).hexdigest()[:16] for source in sources]
    return table.append_column("source", pa.array(digests, pa.string()))


def with_part(table: pa.Table) -> pa.Table:
    """``part``: of each batch the first row is the original, the other one is revised."""
    seen = set()
    parts = []
    for batch in table["batch_id"].to_pylist():
        parts.append("revised" if batch in seen else "original")
        seen.add(batch)
    return table.append_column("part", pa.array(parts, pa.string()))


def lines(path: Path) -> pa.Table:
    """WikiText's ``.raw``: one line a row, its line break kept."""
    with path.open(encoding="utf-8", newline="\n", errors=MIXED) as file:
        return pa.table({"text": list(file)})


def sheet(path: Path) -> pa.Table:
    """A FreshQA sheet saved as CSV: notes may stand above the line that names the columns."""
    with path.open(encoding="utf-8-sig", newline="", errors=MIXED) as file:
        lines = list(csv.reader(file, strict=True))
    start = next((n for n, cells in enumerate(lines) if "question" in cells), None)
    if start is None:
        raise ValueError("no line names a column question")
    names = lines[start]
    rows = [
        {name: cell for name, cell in zip(names, cells, strict=False) if name}
        for cells in lines[start + 1 :]
        if any(cells)
    ]
    return pa.Table.from_pylist(rows)


def with_answers(table: pa.Table) -> pa.Table:
    """``answers``: the cells of ``ANSWERS`` that are filled in."""
    columns = [table[name].to_pylist() for name in ANSWERS if name in table.column_names]
    answers = [[cell for cell in row if cell] for row in zip(*columns, strict=True)]
    return table.append_column("answers", pa.array(answers, pa.list_(pa.string())))


def with_statements(table: pa.Table) -> pa.Table:
    """``correct_answers`` and ``incorrect_answers``: TruthfulQA separates them by semicolons."""
    for name in ("Correct Answers", "Incorrect Answers"):
        lists = [
            [part.strip() for part in cell.split(";") if part.strip()]
            for cell in table[name].to_pylist()
        ]
        made = pa.array(lists, pa.list_(pa.string()))
        table = table.append_column(name.lower().replace(" ", "_"), made)
    return table


def with_choices(table: pa.Table) -> pa.Table:
    """``choices`` and ``answer``: SciQ's right answer among its three distractors.

    The place of the right answer follows from the question alone.
    """
    names = ("correct_answer", "distractor1", "distractor2", "distractor3")
    columns = [table[name].to_pylist() for name in ("question", *names)]
    choices, answers = [], []
    for question, *options in zip(*columns, strict=True):
        order = sorted(
            range(4), key=lambda i: hashlib.sha256(f"{question}/{i}".encode()).digest()
        )
        choices.append([options[i] for i in order])
        answers.append(order.index(0))
    table = table.append_column("choices", pa.array(choices, pa.list_(pa.string())))
    return table.append_column("answer", pa.array(answers, pa.int64()))


def with_articles(table: pa.Table) -> pa.Table:
    """``article``: WikiText's lines joined, a new article at each heading of the first level."""
    articles: list[list[str]] = []
    for line in table["text"].to_pylist():
        if _HEADING.fullmatch(line) or not articles:
            articles.append([])
        articles[-1].append(line)
    return pa.table({"article": ["".join(lines) for lines in articles]})


def with_domain(table: pa.Table) -> pa.Table:
    """``domain``: where a document of the Pile comes from."""
    return table.append_column("domain", pc.struct_field(table["meta"], "pile_set_name"))


def with_halves(table: pa.Table) -> pa.Table:
    """``label``: whether half of the raters or more called a comment toxic (CivilComments)."""
    toxic = pc.greater_equal(table["toxicity"].cast(pa.float64()), 0.5)
    return _labelled(table, pc.if_else(toxic, "toxic", "benign"))


def with_ratings(table: pa.Table) -> pa.Table:
    """``label``: toxic where both ratings, of 1 to 5, sum to more than 5.5 (as ToxiGen's authors
    label it, and lm-evaluation-harness)."""
    ratings = [table[name].cast(pa.float64()) for name in ("toxicity_ai", "toxicity_human")]
    toxic = pc.greater(pc.add(*ratings), 5.5)
    return _labelled(table, pc.if_else(toxic, "toxic", "benign"))


def with_stars(table: pa.Table) -> pa.Table:
    """``label``: the stars of a review as a whole number."""
    return _labelled(table, table["overall"].cast(pa.float64()).cast(pa.int64()).cast(pa.string()))


def _labelled(table: pa.Table, label: pa.ChunkedArray) -> pa.Table:
    return table.append_column("label", label)
