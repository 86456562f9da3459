"""Greedy edits of words against a toy that knows what each word is worth."""

import random

from stages.attack import edits

WORTH = {"good": -3.0, "fine": -1.0, "bad": 2.0}
TEXT = "The good film is fine, good Fine"


def ask(texts):
    """1 plus the worth of the words: above 0 is a wrong answer."""
    asked.extend(texts)
    return [1.0 + sum(WORTH.get(w.strip(","), 0.0) for w in text.split()) for text in texts]


asked: list[str] = []


def first_letter_off(word, rng):
    return [word[1:], "x" + word[1:]]


def run(count, variants=first_letter_off):
    asked.clear()
    return edits.greedy(TEXT, variants, ask, count, random.Random(0))


def test_the_words_that_matter_are_edited_first_until_the_prediction_changes():
    # 1 - 3 - 1 - 3 = -6; both "good" are worth most, then "fine"; -6 + 3 + 3 + 1 = 1.
    assert [run(n).margin for n in (1, 2, 3, 9)] == [-3.0, 0.0, 1.0, 1.0]
    found = run(9)
    assert found.text == "The ood film is ine, ood Fine" and found.edits == 3
    assert found.words == 5  # without "The" and "is"


def test_queries_are_the_text_its_words_and_the_candidates():
    run(2)
    assert len(asked) == 1 + 5 + 2 * 2


def test_an_edit_that_does_not_help_is_not_made():
    found = run(9, lambda word, rng: [f"{word} good"])
    assert found.text == TEXT and found.edits == 0 and found.margin == -6.0


def test_the_control_edits_as_many_words():
    text, count = edits.at_random(TEXT, first_letter_off, 3, random.Random(1))
    assert count == 3 and len(text.split()) == len(TEXT.split())
    assert sum(a != b for a, b in zip(text.split(), TEXT.split(), strict=True)) == 3
    again, all_of_them = edits.at_random(TEXT, first_letter_off, 99, random.Random(1))
    assert all_of_them == 5 and "The" in again and " is " in again


def test_operations_by_hand():
    def forms(*operations):
        return set(edits.character_variants(operations)("Abba", random.Random(0)))

    assert forms("swap") == {"bAba", "Abab"}
    assert forms("delete") == {"bba", "Aba", "Abb"}
    assert all(len(form) == 4 and form[0].isupper() for form in forms("substitute"))
    assert all(len(form) == 5 for form in forms("insert"))


def test_homoglyphs_look_alike_and_are_other_letters():
    found = edits.homoglyph_variants("cat", random.Random(0))
    assert [len(form) for form in found] == [3, 3] and "cat" not in found
    assert found[0][1:] == "at" and ord(found[0][0]) == 0x441
    assert all(ord(key) < 128 < ord(value) for key, value in edits.HOMOGLYPHS.items())


def test_neighbours_keep_the_capital_and_are_other_words():
    forms = edits.neighbour_variants(lambda word: ["nice", "good", "GOOD"])
    assert forms("Good", random.Random(0)) == ["Nice"]
