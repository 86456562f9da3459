"""Synonyms from a dictionary in WordNet's format, by hand."""

import pytest
from pydantic import ValidationError

from stages.attack import wordnet
from stages.attack.text_spec import WordNeighbours
from stages.attack.wordnet import WordNet, digest, folder
from tests.stages.attack.dictionary import write_dictionary


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path / "dict"))
    return write_dictionary(tmp_path / "dict")


def test_synonyms_come_by_rank_of_their_sense(files):
    known = WordNet(folder())
    # First senses as noun, verb, adjective and adverb, then second ones; no two-word names.
    assert known.synonyms("film") == ["movie", "shoot", "coating"]
    assert known.synonyms("Good") == ["goodness", "fine", "just", "well", "full"]
    assert known.synonyms("just") == ["good", "fine"]
    # The number of words of a sense is hexadecimal: sixteen stand as 10.
    assert len(known.synonyms("wordp")) == 15
    assert known.synonyms("films") == known.synonyms("moving_picture2") == []


def test_a_release_is_known_by_its_content(files):
    before = digest(files)
    (files / "data.adv").write_text((files / "data.adv").read_text().replace("gloss", "word"))
    digest.cache_clear()
    assert digest(files) != before


def test_missing_files_are_told_with_the_remedy(files, monkeypatch):
    assert WordNeighbours(synonyms="wordnet").neighbours == 8
    with pytest.raises(ValidationError, match="cosine has no effect on synonyms of wordnet"):
        WordNeighbours(synonyms="wordnet", cosine=0.5)
    (files / "data.verb").unlink()
    with pytest.raises(ValidationError, match=r"WordNet's data.verb is not in .*dict; apt-get "):
        WordNeighbours(synonyms="wordnet")
    monkeypatch.delenv("WNSEARCHDIR")
    monkeypatch.setattr(wordnet, "DEBIAN", files.parent)
    with pytest.raises(ValidationError, match="index.noun is not in"):
        WordNeighbours(synonyms="wordnet")
    assert WordNeighbours().synonyms == "embedding"
