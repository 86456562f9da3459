"""Synonyms of English words from WordNet's own database files (Fellbaum, 1998; wndb(5WN)).

NLTK's reader takes these files only from its own data folders and with a file ``lexnames`` that
Debian's package leaves out, so they are read here. Light to import: no torch.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

PARTS = ("noun", "verb", "adj", "adv")
FILES = tuple(f"{kind}.{part}" for part in PARTS for kind in ("index", "data"))
DEBIAN = Path("/usr/share/wordnet")
"""Where the package wordnet-base puts them."""


def folder() -> Path:
    """Where the files are: ``$WNSEARCHDIR``, which WordNet's own programs read too, or Debian's.

    Raises ValueError where one of them is not there.
    """
    found = Path(os.environ.get("WNSEARCHDIR") or DEBIAN)
    missing = [name for name in FILES if not (found / name).is_file()]
    if missing:
        raise ValueError(
            f"WordNet's {missing[0]} is not in {found}; apt-get install wordnet-base, or set "
            "WNSEARCHDIR to the folder that has it"
        )
    return found


@lru_cache
def digest(found: Path) -> str:
    """What tells one release from another: a hash of the files' content."""
    whole = hashlib.sha256()
    for name in FILES:
        whole.update((found / name).read_bytes())
    return whole.hexdigest()[:16]


class WordNet:
    """The synonyms that the files in a folder know."""

    def __init__(self, found: Path):
        self.index: dict[str, dict[str, str]] = {}
        """Part of speech to base form to the rest of its line."""
        self.data: dict[str, bytes] = {}
        for part in PARTS:
            lines = (found / f"index.{part}").read_text(encoding="ascii").splitlines()
            self.index[part] = {w: rest for w, _, rest in (line.partition(" ") for line in lines)}
            self.data[part] = (found / f"data.{part}").read_bytes()

    def synonyms(self, word: str) -> list[str]:
        """Single words that share a sense with a base form, in small letters.

        Its most frequent sense as each part of speech comes first, then the second of each, and so
        on: which part of speech the word is in a text is not asked for.
        """
        word = word.lower()
        senses = [
            (rank, PARTS.index(part), part, place)
            for part in PARTS
            for rank, place in enumerate(self._places(part, word))
        ]
        found = (name for *_, part, place in sorted(senses) for name in self._words(part, place))
        return [name for name in dict.fromkeys(found) if name != word and name.isalpha()]

    def _places(self, part: str, word: str) -> list[int]:
        """Where a word's senses begin in the data file, the most frequent first."""
        # pos synset_cnt p_cnt [ptr_symbol…] sense_cnt tagsense_cnt synset_offset…
        fields = self.index[part].get(word, "x 0").split()
        count = int(fields[1])
        return [int(number) for number in fields[len(fields) - count :]]

    def _words(self, part: str, place: int) -> Iterator[str]:
        """The words of the sense that begins at a byte of the data file."""
        # synset_offset lex_filenum ss_type w_cnt word lex_id [word lex_id…] …; w_cnt hexadecimal.
        line = self.data[part][place : self.data[part].index(b"\n", place)].decode("ascii")
        fields = line.split()
        for name in fields[4 : 4 + 2 * int(fields[3], 16) : 2]:
            yield name.partition("(")[0].lower()  # an adjective's place: galore(ip)

