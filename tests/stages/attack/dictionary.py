"""A dictionary of a few words in the format of WordNet's database files (wndb(5WN))."""

from pathlib import Path

LICENCE = "  1 A dictionary of a few words for tests.  \n  2   \n"
SENSES = {
    "noun": [("film", "movie", "moving_picture"), ("film", "coating"), ("good", "goodness")],
    "verb": [("film", "shoot")],
    "adj": [("good", "Fine", "just(p)"), ("good", "full")],
    "adv": [("well", "good"), tuple(f"word{letter}" for letter in "abcdefghijklmnop")],
}
"""Part of speech to its senses, each word's most frequent first."""


def write_dictionary(folder: Path) -> Path:
    """Write index and data files of the words above; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, senses in SENSES.items():
        letter = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}[part]
        data, places = LICENCE, {}
        for words in senses:
            at = f"{len(data):08d}"
            for word in words:
                places.setdefault(word.partition("(")[0].lower(), []).append(at)
            listed = " ".join(f"{word} 0" for word in words)
            data += f"{at} 02 {letter} {len(words):02x} {listed} 001 @ {at} n 0000 | a gloss  \n"
        lines = [
            f"{word} {letter} {len(found)} 1 @ {len(found)} 0 {' '.join(found)}  \n"
            for word, found in sorted(places.items())
        ]
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(LICENCE + "".join(lines))
    return folder
