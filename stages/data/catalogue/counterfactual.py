"""Counterfactually augmented SNLI and IMDB: texts revised so that another label fits, and the texts
that were revised. Both are one document.
"""

from dataclasses import replace

from stages.data import originals
from stages.data.catalogue import inference, sentiment
from stages.data.published import Form, Published, Split, Web

_ADDRESS = (
    "https://raw.githubusercontent.com/acmi-lab/counterfactually-augmented-data/"
    "6f232a1d2a11462a30ce08fb4825b734ab30828e/"
)
_PAIRS = Published(
    task="nli",
    title="",
    citation="Kaushik et al. 2020, ICLR",
    licence="Apache-2.0; SNLI CC BY-SA 4.0",
    splits={},
    forms=(replace(inference.STANFORD, quoted=True),),
    files="",
    labels=inference.LABELS,
)
_REVISED_PAIRS = replace(
    _PAIRS,
    forms=(
        replace(
            _PAIRS.forms[0],
            columns=_PAIRS.forms[0].columns | {"document": "source"},
            shared="source",
            derive=originals.with_revised_premise,
            needs=("sentence1",),
            makes=("source",),
        ),
    ),
)
_REVIEW = Form(
    {"text": "Text", "label": "Sentiment"},
    labels={"Negative": "negative", "Positive": "positive"},
    quoted=True,
)


def _pairs(
    kind: Published, folder: str, title: str, parts: dict[str, tuple[int, str]]
) -> Published:
    """One folder of the repository; rows counted in its files, whose checksums are given."""
    splits = {
        split: Split(
            web=Web(f"{_ADDRESS}{folder}/{name}.tsv", parts[name][1]),
            rows=parts[name][0],
            shared_documents=inference.SNLI_PREMISES,
        )
        for split, name in (("test", "test"), ("validation", "dev"), ("train", "train"))
    }
    return replace(kind, title=title, splits=splits, files=f"{folder}/test.tsv")


_PAIRED = {
    "test": ("test", 488, "9534b20850205c59015b313983cae7afb31c54c04ffcbd19cea7f1bce5011275"),
    "validation": ("dev", 245, "4c2d8a70cbce23eba27fb1f0bb5043cf044811912435cf8d10c3ea6fc7a51363"),
    "train": ("train", 1707, "7ac50ca3d70890f80e11ee59955cdbfc43f26b5078d0603717817ab224d2af18"),
}
"""Split to the name, pairs and checksum of the file with both members of each pair."""


def _reviews(part: str, folder: str, title: str) -> Published:
    """One member of each pair, out of the file whose ``batch_id`` names the pair; that folder's own
    files have the same rows and no such name."""
    paired = "sentiment/combined/paired"
    return replace(
        _PAIRS,
        task="classification",
        title=title,
        licence="Apache-2.0; the reviews are third-party text",
        splits={
            split: Split(
                web=Web(f"{_ADDRESS}{paired}/{name}_paired.tsv", checksum),
                rows=rows,
                shared_documents="counterfactual_imdb",
            )
            for split, (name, rows, checksum) in _PAIRED.items()
        },
        forms=(
            replace(
                _REVIEW,
                keep={"part": (part,)},
                derive=originals.with_part,
                needs=("batch_id",),
                makes=("part",),
                shared="batch_id",
            ),
            _REVIEW,
        ),
        files=f"{paired}/test_paired.tsv or sentiment/{folder}/test.tsv",
        labels=sentiment.BINARY,
    )


SETS: dict[str, Published] = {
    "counterfactual_snli": _pairs(
        _REVISED_PAIRS,
        "NLI/revised_combined",
        "Counterfactually revised SNLI, premise or hypothesis",
        {
            "test": (1600, "e5a3e55f7df0319decbb34dfa8ab4a4820be1b5ae4af9ee54aeaba539b9636f5"),
            "dev": (800, "ff7d6d40a26c5bca5b9d9030db14000a42fbf5bc8a0e6d0d86cc9b378198eb88"),
            "train": (6664, "054a8cf808bcd4a5b3a849eba4e6c1fb49f2f789e3a0f88d21e05f3f38fa5428"),
        },
    ),
    "counterfactual_snli_original": _pairs(
        _PAIRS,
        "NLI/original",
        "The SNLI pairs that were revised",
        {
            "test": (400, "07154b31ea7cf1bb0ac33e37bec143b928edbf2c964a73988973e5c0fe039b07"),
            "dev": (200, "27ef042f87b7181c79609b56734caed8fb9c09ba2627d0fe876f7248141fdff7"),
            "train": (1666, "016b1657b1c0eb89e163aa194e5e2da6ca890fd6e97ee42c33de914e7e0a7ce6"),
        },
    ),
    "counterfactual_imdb": _reviews("revised", "new", "Counterfactually revised IMDB reviews"),
    "counterfactual_imdb_original": _reviews(
        "original", "orig", "The IMDB reviews that were revised"
    ),
}
