"""Labels in answers that a model writes freely: how it is told them, and how one is read by rule.

The first mention that counts decides. Mentions are the template's words for the labels; the labels'
own names count where no word does (after "Entailment: no" the word is the answer). Both are whole,
in upper or lower case; of two at one place the longer one counts. A mention does not count

- after a negation in its own clause with at most ``REACH`` words between: not, no, never, neither,
  nor, without, cannot, non (also "non-") and contractions with n't. "Not only" and "no doubt" are
  none.
- if it is "no" that belongs to the next word ("no conflict") and is no answer ("no, …", "no because
  …").

A clause ends at punctuation, brackets, dashes, line breaks and conjunctions such as "but" and
"and"; the commas of a list that ends in "or" or "nor" do not end it. What is denied says nothing of
the other labels: "not toxic" names none. English only.
"""

import re

from stages.data.templates import Template

VERSION = 2
"""Raised when another label could be read in an answer; part of the identity of such scores."""

OPTIONS = "Answer with one of these words: {words}.\n\n"
"""Stands once in front of the prompt, before any answered examples."""
OUT_OF_SET = ""
"""The prediction where an answer names no label."""
REACH = 5
"""Words between a negation and what it denies: "I don't think that this comment is toxic"."""

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_NEGATION = re.compile(
    r"no|not|non|never|neither|nor|without|cannot|\w+n['’]t|(?:is|are|was|were|do|does|did)nt"
)
_AFFIRMATION = re.compile(
    r"\bnot (?:only|just|merely|simply)\b"
    r"|\b(?:no|without|without a|without any) (?:doubt|question)\b",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(
    r"[.,;:!?…()\[\]{}|>→–—\n]|\s-+\s"
    r"|\b(?:but|and|because|since|although|though|while|whereas|however|instead|therefore|thus"
    r"|hence)\b",
    re.IGNORECASE,
)
_LIST_COMMA = re.compile(r",(?=(?: [^\W_]+,)* n?or\b)", re.IGNORECASE)
# After blanks, what cannot go on with "no" as the article of a noun.
_ARTICLE = (
    r"(?!-\w|[ \t]+(?!(?:a|an|the|this|that|these|those|it|he|she|they|there|i|we|you|is|was"
    r"|because|since|as|and|but|or|so|if|in|for|from|by|at|with|given|based)\b)\w)"
)


def options(template: Template) -> str:
    """What tells the model the words that it may answer with, in the template's order."""
    return OPTIONS.format(words=", ".join(word.strip() for word in template.labels.values()))


def label_in(template: Template, text: str) -> str:
    """The label that an answer names, by the rule above; ``OUT_OF_SET`` where it names none."""
    text = _LIST_COMMA.sub("", text)
    for mentions in (template.words, [(label, label) for label in template.labels]):
        found = [
            (match.start(), -len(match[0]), label)
            for label, word in mentions
            for match in _mention(word).finditer(text)
            if not _denied(text[: match.start()])
        ]
        if found:
            return min(found)[2]
    return OUT_OF_SET


def _mention(word: str) -> re.Pattern:
    parts = re.split(r"[\s_-]+", word.strip())
    article = _ARTICLE if parts[-1].casefold() == "no" else ""
    pattern = r"[\s_-]".join(map(re.escape, parts))
    # Underscores are marks of emphasis and no letters.
    return re.compile(rf"(?<![^\W_]){pattern}(?![^\W_]){article}", re.IGNORECASE)


def _denied(before: str) -> bool:
    """Whether what follows a text is denied by its last clause."""
    clause = _AFFIRMATION.sub("", _CLAUSE_END.split(before)[-1])
    return any(map(_NEGATION.fullmatch, _WORD.findall(clause.casefold())[-REACH - 1 :]))
