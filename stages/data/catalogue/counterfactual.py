"""Counterfactually augmented SNLI and IMDB: texts revised so that another label fits, and the texts
that were revised.
"""

from dataclasses import replace

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
_REVIEWS = replace(
    _PAIRS,
    task="classification",
    licence="Apache-2.0; the reviews are third-party text",
    forms=(
        Form(
            {"text": "Text", "label": "Sentiment"},
            labels={"Negative": "negative", "Positive": "positive"},
            quoted=True,
        ),
    ),
    labels=sentiment.BINARY,
)


def _revised(
    kind: Published, folder: str, title: str, parts: dict[str, tuple[int, str]]
) -> Published:
    """One folder of the repository; rows counted in its files, whose checksums are given."""
    splits = {
        split: Split(web=Web(f"{_ADDRESS}{folder}/{name}.tsv", parts[name][1]), rows=parts[name][0])
        for split, name in (("test", "test"), ("validation", "dev"), ("train", "train"))
    }
    return replace(kind, title=title, splits=splits, files=f"{folder}/test.tsv")


SETS: dict[str, Published] = {
    "counterfactual_snli": _revised(
        _PAIRS,
        "NLI/revised_combined",
        "Counterfactually revised SNLI, premise or hypothesis",
        {
            "test": (1600, "e5a3e55f7df0319decbb34dfa8ab4a4820be1b5ae4af9ee54aeaba539b9636f5"),
            "dev": (800, "ff7d6d40a26c5bca5b9d9030db14000a42fbf5bc8a0e6d0d86cc9b378198eb88"),
            "train": (6664, "054a8cf808bcd4a5b3a849eba4e6c1fb49f2f789e3a0f88d21e05f3f38fa5428"),
        },
    ),
    "counterfactual_snli_original": _revised(
        _PAIRS,
        "NLI/original",
        "The SNLI pairs that were revised",
        {
            "test": (400, "07154b31ea7cf1bb0ac33e37bec143b928edbf2c964a73988973e5c0fe039b07"),
            "dev": (200, "27ef042f87b7181c79609b56734caed8fb9c09ba2627d0fe876f7248141fdff7"),
            "train": (1666, "016b1657b1c0eb89e163aa194e5e2da6ca890fd6e97ee42c33de914e7e0a7ce6"),
        },
    ),
    "counterfactual_imdb": _revised(
        _REVIEWS,
        "sentiment/new",
        "Counterfactually revised IMDB reviews",
        {
            "test": (488, "28d32ca405131d87ef095109cc1764d6e917a3df63584b2f16e9465020b7f29d"),
            "dev": (245, "69f559bfbf9eb2e0545d2d2f14482a699ec81f94e2bca110e4fa15670fdf78e6"),
            "train": (1707, "c9f65a2425e9aa358082040961d9d0e215fb8631b85242cbb410b82f9c62c0d4"),
        },
    ),
    "counterfactual_imdb_original": _revised(
        _REVIEWS,
        "sentiment/orig",
        "The IMDB reviews that were revised",
        {
            "test": (488, "35e8fab251220685ae47f95ef86bad1fd7fa0017a6ce4afe803ab18a71ff61ff"),
            "dev": (245, "d7b815d31ddc6eed7bdeb9dc78e18db88ebb22dd347cf72cc797791edfd7bab0"),
            "train": (1707, "adccf2763b67ddbfbd4571b7ee96c9bb689e98c4295e779151148c014b2b1050"),
        },
    ),
}
