"""A rule that says whether an answer corrects the premise of its question.

An answer *corrects* if one of its first sentences denies that something happened or exists, says
that it has not happened yet, or names the error; it is *unsure* if it only says that the model does
not know; otherwise it *accepts* the premise. English only. The rule sees no reference answer: it
tells whether the model objects, not whether its objection is right.
"""

import re
from dataclasses import dataclass
from typing import Literal

VERSION = 2
"""Recorded with every score; raised when any answer could be judged otherwise."""

OPENING_SENTENCES = 3

_UNSURE = re.compile(
    r"\bI(?:'m| am) (?:not (?:sure|aware|certain|familiar)|unsure|unable)\b"
    r"|\bI (?:do not|don't|cannot|can't|could not|couldn't) (?:\w+ ){0,2}?"
    r"(?:know|find|have|say|tell|answer|confirm|verify|access|provide|recall)\b"
    r"|\bI have no (?:information|knowledge|comment|data)\b",
    re.IGNORECASE,
)
CORRECTS = {
    "names the error": re.compile(
        r"\bfalse premise\b|\bpremise\b.*\b(?:false|wrong|incorrect)\b|\bmisconception\b"
        r"|\b(?:incorrect|inaccurate|mistaken|untrue|fictional|hypothetical|a myth|a hoax)\b"
        r"|\b(?:not|isn't|n't) (?:\w+ )?(?:true|correct|accurate|the case)\b|\bcontrary to\b"
        r"|^\W*(?:(?:actually|in fact|well|oh|uh)\W+)?no(?:pe)?\s*[,.!;:–—-]",
        re.IGNORECASE,
    ),
    "not yet": re.compile(
        r"\b(?:has|have|had|is|are) yet to\b|\bnot yet\b|\bso far\b.*\b(?:no|none|not)\b"
        r"|\bhas(?:n't| not)\b.*\byet\b",
        re.IGNORECASE,
    ),
    "does not exist": re.compile(
        r"\bthere (?:is|are|was|were|has|have|will)(?: \w+ly)? (?:no|not|never)\b"
        r"|\bthere (?:isn't|aren't|wasn't|weren't|hasn't been|haven't been)\b"
        r"|\bno (?:such|record|evidence|one|woman|man|person|country|team)\b|\bnobody\b"
        r"|\bnone of\b|\b(?:does not|doesn't|do not|don't|did not|didn't) exist\b",
        re.IGNORECASE,
    ),
    "did not happen": re.compile(
        r"\b(?:did|does|do|has|have|had|is|are|was|were|will|would|could|can)(?: not|n't)\b"
        r"|\bcan't\b|\bnever\b|\bno longer\b|\bcannot\b|\bwon't\b",
        re.IGNORECASE,
    ),
}


@dataclass(frozen=True)
class Verdict:
    """An outcome and the name of the rule that gave it."""

    outcome: Literal["corrects", "accepts", "unsure"]
    rule: str


def judge(answer: str) -> Verdict:
    """Judge one answer."""
    text = re.sub(r"[‘’ʼ´]", "'", answer).strip()
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part]
    unsure = not sentences
    for sentence in sentences[:OPENING_SENTENCES]:
        if _UNSURE.search(sentence):
            unsure = True
            continue
        for name, pattern in CORRECTS.items():
            if pattern.search(sentence):
                return Verdict("corrects", name)
    return Verdict("unsure", "does not know") if unsure else Verdict("accepts", "none")
