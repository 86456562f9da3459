"""Running text for perplexity: Wikipedia articles, and documents of other domains."""

from stages.data import originals
from stages.data.published import Form, Hub, Published, Split

DOMAINS = {
    "arxiv": "ArXiv",
    "github": "Github",
    "pubmed": "PubMed Abstracts",
    "law": "FreeLaw",
    "stackexchange": "StackExchange",
    "hackernews": "HackerNews",
    "patents": "USPTO Backgrounds",
    "web": "Pile-CC",
}
"""Name here to the Pile's name of the domain."""


def _domain(name: str) -> Published:
    return Published(
        task="text",
        title=f"Documents of the Pile's training part: {name}",
        citation="Gao et al. 2020, arXiv:2101.00027",
        licence="that of each document; see its card",
        splits={"test": Split(("data/train-*.parquet",))},
        forms=(
            Form(
                {"text": "text"},
                keep={"domain": (name,)},
                derive=originals.with_domain,
                needs=("meta",),
                makes=("domain",),
            ),
        ),
        # The first ten thousand documents of the training part: text that a model may have seen.
        hub=Hub("NeelNanda/pile-10k", "127bfedcd5047750df5ccf3a12979a47bfa0bafa"),
        files="a JSONL file with text and meta.pile_set_name",
    )


SETS: dict[str, Published] = {
    "wikitext103": Published(
        task="text",
        title="WikiText-103: whole Wikipedia articles",
        citation="Merity et al. 2017, ICLR",
        licence="CC BY-SA 3.0",
        splits={
            "test": Split(("wikitext-103-raw-v1/test-*.parquet",)),
            "validation": Split(("wikitext-103-raw-v1/validation-*.parquet",)),
        },
        forms=(
            Form(
                {"text": "article"},
                derive=originals.with_articles,
                needs=("text",),
                makes=("article",),
            ),
        ),
        hub=Hub("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3"),
        files="wiki.test.raw",
        original=originals.lines,
        original_suffix=".raw",
    ),
    **{f"pile_{name}": _domain(domain) for name, domain in DOMAINS.items()},
}
