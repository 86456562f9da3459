"""Typing errors in a text: a stated number of character edits, on chosen words.

An edit swaps two neighbouring letters, deletes one, inserts one, or replaces one by a neighbour on
the keyboard; each counts 1 in the optimal string alignment distance, and after k edits the distance
to the original is exactly k (an edit that would cancel an earlier one is not taken).

The attack never sees the attacked model: a bag-of-words logistic regression names the words that
speak most for the true label, and those are edited first (a transfer attack). The control makes the
same operations on as many words, drawn at random.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import pandas as pd

Operation = Literal["swap", "delete", "insert", "substitute"]

WORD = r"[A-Za-z]+(?:'[A-Za-z]+)?"
SHORTEST_WORD = 3
"""Letters; shorter words are left alone, as an edit makes another word of them."""
LETTERS_PER_EDIT = 3
"""A word takes one edit for every three characters, so that it stays recognisable."""

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours() -> dict[str, str]:
    """Letter to the letters beside, above and below it on a QWERTY keyboard."""
    place = {letter: (y, x + y / 2) for y, row in enumerate(_ROWS) for x, letter in enumerate(row)}
    return {
        a: "".join(b for b, (v, u) in place.items() if a != b and abs(y - v) <= 1 >= abs(x - u))
        for a, (y, x) in place.items()
    }


NEIGHBOURS = _neighbours()


class Surrogate:
    """Bag-of-words logistic regression; says how much a word speaks for a label."""

    def __init__(self, train: pd.DataFrame):
        """Fit on rows with the columns ``text`` and ``label``."""
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression

        vectorizer = CountVectorizer(token_pattern=WORD, binary=True)
        model = LogisticRegression(class_weight="balanced", max_iter=1000)
        model.fit(vectorizer.fit_transform(train["text"]), train["label"])
        # Binary models keep one row of weights, that of the second class.
        weights = model.coef_ if len(model.classes_) > 2 else [-model.coef_[0], model.coef_[0]]
        self.weights = dict(zip(model.classes_.tolist(), weights, strict=True))
        self.vocabulary = vectorizer.vocabulary_

    def contribution(self, word: str, label: str) -> float:
        """The word's weight for the label; 0 if unknown.

        (The weights of one word sum to 0 over the labels, so this is relative to the others.)
        Rounded, so that the last bits of the solver cannot change an order.
        """
        index = self.vocabulary.get(word.lower())
        return 0.0 if index is None else round(float(self.weights[label][index]), 6)


def edited_pair(
    text: str,
    label: str,
    surrogate: Surrogate,
    edits: int,
    operations: Sequence[Operation],
    seed: str,
) -> tuple[str, str, int]:
    """The text under attack, the text of the control, and the number of edits in each.

    The number is ``edits``, or fewer where the text has too few letters. It depends on the
    arguments only, not on any order of examples.
    """
    words = _words(text)
    order = random.Random(f"{seed}/order")
    shuffled = order.sample(range(len(words)), len(words))
    weight = [surrogate.contribution(text[a:b], label) for a, b in words]
    ranked = sorted(shuffled, key=lambda index: -weight[index])
    helpful = sum(w > 0 for w in weight)
    chosen = order.choices(operations, k=edits)
    distinct = min(helpful or len(words), edits)
    attacked = _edit(text, words, ranked, helpful or len(words), chosen, operations, f"{seed}/a")
    again = order.sample(range(len(words)), len(words))
    control = _edit(text, words, again, distinct, chosen, operations, f"{seed}/r")
    # Where one of the two finds no place for a further edit, the other stops there as well.
    steps = [(text, text), *zip(attacked, control, strict=False)]
    return *steps[-1], len(steps) - 1


def _words(text: str) -> list[tuple[int, int]]:
    """Spans of the words that may be edited: long enough, and not one letter repeated."""
    return [
        m.span()
        for m in re.finditer(WORD, text)
        if len(m.group()) >= SHORTEST_WORD and len(set(m.group())) > 1
    ]


def _edit(
    text: str,
    spans: list[tuple[int, int]],
    order: list[int],
    first: int,
    chosen: list[Operation],
    operations: Sequence[Operation],
    seed: str,
) -> Iterator[str]:
    """Yield the text after each edit.

    Words are visited in ``order``, one edit each, round after round among the ``first`` ones until
    these take no more, then among the rest.
    """
    rng = random.Random(seed)
    pieces = {index: text[a:b] for index, (a, b) in enumerate(spans)}
    left = {index: len(word) // LETTERS_PER_EDIT for index, word in pieces.items()}

    def whole() -> str:
        ends = [0, *(b for _, b in spans)]
        gaps = [text[end:a] for end, (a, _) in zip(ends, spans, strict=False)]
        body = "".join(gap + pieces[index] for index, gap in enumerate(gaps))
        return body + text[ends[-1] :]

    done = 0
    for group in (order[:first], order[first:]):
        progress = True
        while progress:
            progress = False
            for index in group:
                if done == len(chosen):
                    return
                if left[index] == 0:
                    continue
                word = pieces[index]
                for candidate in _candidates(word, chosen[done], operations, rng):
                    pieces[index] = candidate
                    if alignment_distance(text, whole(), done + 1) == done + 1:
                        break
                else:
                    pieces[index], left[index] = word, 0
                    continue
                left[index] -= 1
                done += 1
                progress = True
                yield whole()


def _candidates(
    word: str, operation: Operation, operations: Sequence[Operation], rng: random.Random
) -> Iterator[str]:
    """The word after one edit, in random order; the other operations only when this one fails."""
    for kind in (operation, *(other for other in operations if other != operation)):
        for at in rng.sample(range(len(word)), len(word)):
            letter = word[at]
            near = NEIGHBOURS.get(letter.lower())
            if near is None:  # an apostrophe
                continue
            new = rng.choice(near)
            new = new.upper() if letter.isupper() else new
            if kind == "delete":
                yield word[:at] + word[at + 1 :]
            elif kind == "insert":
                yield word[: at + 1] + new + word[at + 1 :]
            elif kind == "substitute":
                yield word[:at] + new + word[at + 1 :]
            elif at + 1 < len(word) and word[at + 1].isalpha() and word[at + 1] != letter:
                yield word[:at] + word[at + 1] + letter + word[at + 2 :]


def alignment_distance(a: str, b: str, most: int) -> int:
    """Optimal string alignment distance: insert, delete, substitute, swap neighbours, 1 each.

    (The restricted Damerau-Levenshtein distance: no part of a string is edited twice.) A distance
    above ``most`` is given as ``most + 1``; only the diagonals up to ``most`` are visited.
    """
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    a, b = a[start : len(a) - end], b[start : len(b) - end]
    far = most + 1
    before, previous = [], [min(j, far) for j in range(len(b) + 1)]
    for i, x in enumerate(a, 1):
        current = [far] * (len(b) + 1)
        current[0] = min(i, far)
        for j in range(max(1, i - most), min(len(b), i + most) + 1):
            best = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != b[j - 1]))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == b[j - 1]:
                best = min(best, before[j - 2] + 1)
            current[j] = min(best, far)
        before, previous = previous, current
    return previous[-1]
