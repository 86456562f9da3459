"""Greedy edits of words: the model is asked for margins of texts and for nothing else."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WORD = r"[^\W\d_]+(?:['’][^\W\d_]+)*"
STOP_WORDS = frozenset(
    "a an and are as at be been but by can could did do does for from had has have he her him his "
    "how i if in into is it its me my no nor not of on or our out she so some such than that the "
    "their them then there these they this those to too up us was we were what when where which "
    "who will with would you your".split()
)
"""Left alone: DeepWordBug's and TextFooler's published recipes leave stop words alone as well."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HOMOGLYPHS = {
    "a": "а", "c": "с", "e": "е", "i": "і", "j": "ј", "o": "о", "p": "р", "s": "ѕ", "x": "х",
    "y": "у", "h": "һ", "d": "ԁ", "q": "ԛ", "w": "ԝ", "A": "А", "B": "В", "C": "С", "E": "Е",
    "H": "Н", "I": "І", "J": "Ј", "K": "К", "M": "М", "O": "О", "P": "Р", "S": "Ѕ", "T": "Т",
    "X": "Х", "Y": "У", "n": "ո", "u": "ս", "g": "ɡ", "l": "ⅼ", "v": "ν", "N": "Ν", "Z": "Ζ",
}  # fmt: skip
"""Latin letters and one of another script that most typefaces draw alike."""
Variants = Callable[[str, random.Random], list[str]]
"""Other forms of a word, in an order that the given numbers decide."""


@dataclass(frozen=True)
class Edited:
    """A text whose words were edited."""

    text: str
    margin: float
    edits: int
    words: int
    """Words that could have been edited."""


def spans(text: str) -> list[tuple[int, int]]:
    """Where the words are that may be edited: two letters or more and not a stop word."""
    return [
        match.span() for match in re.finditer(WORD, text)
        if len(match.group()) > 1 and match.group().lower() not in STOP_WORDS
    ]  # fmt: skip


def greedy(
    text: str,
    variants: Variants,
    ask: Callable[[Sequence[str]], Sequence[float]],
    edits: int,
    rng: random.Random,
) -> Edited:
    """Edit at most ``edits`` words, the most important first, until the margin is above 0.

    A word's importance is the margin of the text without it. Of a word's variants the one with the
    largest margin is kept, if it is larger than before. ``ask`` gives the margins of texts.
    """
    places = spans(text)
    without = [text[:a] + text[b:] for a, b in places]
    margin, *left = ask([text, *without])
    order = sorted(range(len(places)), key=lambda index: -left[index])
    pieces = {index: text[slice(*places[index])] for index in order}
    done = 0
    for index in order:
        if done == edits or margin > 0:
            break
        forms = variants(pieces[index], rng)
        if not forms:
            continue
        texts = [_joined(text, places, pieces | {index: form}) for form in forms]
        margins = ask(texts)
        best = max(range(len(forms)), key=lambda number: margins[number])
        if margins[best] > margin:
            pieces[index], margin = forms[best], margins[best]
            done += 1
    return Edited(_joined(text, places, pieces), float(margin), done, len(places))


def at_random(text: str, variants: Variants, edits: int, rng: random.Random) -> tuple[str, int]:
    """The control: as many words, drawn evenly, each with one of its variants; and how many."""
    places = spans(text)
    pieces = {index: text[slice(*span)] for index, span in enumerate(places)}
    done = 0
    for index in rng.sample(range(len(places)), len(places)):
        if done == edits:
            break
        forms = variants(pieces[index], rng)
        if forms:
            pieces[index] = rng.choice(forms)
            done += 1
    return _joined(text, places, pieces), done


def _joined(text: str, places: list[tuple[int, int]], pieces: dict[int, str]) -> str:
    parts, end = [], 0
    for index, (a, b) in enumerate(places):
        parts += [text[end:a], pieces[index]]
        end = b
    return "".join(parts) + text[end:]


def character_variants(operations: Sequence[str]) -> Variants:
    """One edit by each operation at each place; substituted and inserted letters are drawn."""

    def forms(word: str, rng: random.Random) -> list[str]:
        found = []
        for at, letter in enumerate(word):
            if "swap" in operations and at + 1 < len(word):
                found.append(word[:at] + word[at + 1] + letter + word[at + 2 :])
            if "delete" in operations:
                found.append(word[:at] + word[at + 1 :])
            if "substitute" in operations:
                found.append(word[:at] + _like(rng.choice(LETTERS), letter) + word[at + 1 :])
            if "insert" in operations:
                found.append(word[:at] + _like(rng.choice(LETTERS), letter) + word[at:])
        return [form for form in dict.fromkeys(found) if form != word]

    return forms


def homoglyph_variants(word: str, rng: random.Random) -> list[str]:
    """One letter replaced by its look-alike, for each letter that has one."""
    return [
        word[:at] + HOMOGLYPHS[letter] + word[at + 1 :]
        for at, letter in enumerate(word)
        if letter in HOMOGLYPHS
    ]


def neighbour_variants(near: Callable[[str], Sequence[str]]) -> Variants:
    """What ``near`` gives for the word, capitalised as it is."""

    def forms(word: str, rng: random.Random) -> list[str]:
        found = [_like(other, word) for other in near(word)]
        return [form for form in dict.fromkeys(found) if form.lower() != word.lower()]

    return forms


def _like(new: str, old: str) -> str:
    """The new text with a capital where the old has one."""
    if len(old) > 1 and old.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if old[:1].isupper() else new
