"""Natural language inference: does the premise entail the hypothesis, contradict it, or neither?

The rows of one premise are one document, so that the bootstrap resamples them together.
"""

from dataclasses import replace

from stages.data import originals
from stages.data.published import Form, Hub, Published, Split, Web

LABELS = ("entailment", "neutral", "contradiction")

SNLI_PREMISES = "snli_premises"
"""The group of the data sets with premises of SNLI: its hard pairs and its revised ones."""

_NUMBERED = {str(number): label for number, label in enumerate(LABELS)}
_NAMED = {label: label for label in LABELS}
# "-" is SNLI's mark for no agreement, -1 the hub's; an empty cell was never labelled.
_UNLABELLED = ("-", "-1", "")

HUB = Form(
    {"premise": "premise", "hypothesis": "hypothesis", "label": "label", "document": "premise"},
    labels=_NUMBERED | _NAMED,
    unlabelled=_UNLABELLED,
    shared="premise",
)
STANFORD = Form(
    {
        "premise": "sentence1",
        "hypothesis": "sentence2",
        "label": "gold_label",
        "document": "sentence1",
    },
    labels=_NAMED,
    unlabelled=_UNLABELLED,
    shared="sentence1",
)
_BOSS = Form(
    {"premise": "Premise", "hypothesis": "Hypothesis", "label": "Label", "document": "Premise"},
    labels=_NUMBERED | {f"{number}.0": label for number, label in enumerate(LABELS)},
    unlabelled=_UNLABELLED,
    shared="Premise",
    quoted=True,
)
_ANLI = Form(
    HUB.columns,
    labels=HUB.labels | {"e": "entailment", "n": "neutral", "c": "contradiction"},
    unlabelled=_UNLABELLED,
)
_ANLI_OWN = replace(
    _ANLI, columns={n: "context" if c == "premise" else c for n, c in _ANLI.columns.items()}
)
_ANLI_HUB = Hub("facebook/anli", "8e4813d81f46d313dac7892e1c28076917cfcdf9")
_GLUE = Hub("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")


def _anli(number: int, train: int, test: int) -> Published:
    """One round of ANLI; counts from its hub card."""
    files = {name: (f"plain_text/{name}_r{number}-*.parquet",) for name in ("test", "dev", "train")}
    return Published(
        task="nli",
        title=f"Adversarial NLI, round {number}",
        citation="Nie et al. 2020, Adversarial NLI, ACL",
        licence="CC BY-NC 4.0",
        splits={
            "test": Split(files["test"], rows=test),
            "validation": Split(files["dev"], rows=test),
            "train": Split(files["train"], rows=train),
        },
        forms=(_ANLI, _ANLI_OWN, _BOSS),
        hub=_ANLI_HUB,
        files=f"R{number}/test.jsonl of anli_v1.0.zip",
        labels=LABELS,
    )


SETS: dict[str, Published] = {
    "snli": Published(
        task="nli",
        title="Stanford NLI",
        citation="Bowman et al. 2015, EMNLP",
        licence="CC BY-SA 4.0",
        splits={
            "test": Split(
                ("plain_text/test-*.parquet",), rows=10_000, shared_documents=SNLI_PREMISES
            ),
            "validation": Split(
                ("plain_text/validation-*.parquet",), rows=10_000, shared_documents=SNLI_PREMISES
            ),
            "train": Split(("plain_text/train-*.parquet",), rows=550_152),
        },
        forms=(HUB, STANFORD, _BOSS),
        hub=Hub("stanfordnlp/snli", "cdb5c3d5eed6ead6e5a341c8e56e669bb666725b"),
        files="snli_1.0_test.jsonl or .txt",
        original=originals.headed_text,
        original_suffix=".txt",
        labels=LABELS,
    ),
    "snli_hard": Published(
        task="nli",
        title="SNLI-hard: test pairs that the hypothesis alone does not give away",
        citation="Gururangan et al. 2018, NAACL",
        licence="CC BY-SA 4.0 (SNLI)",
        splits={
            "test": Split(
                web=Web("https://nlp.stanford.edu/projects/snli/snli_1.0_test_hard.jsonl"),
                rows=3_261,
                shared_documents=SNLI_PREMISES,
            )
        },
        forms=(STANFORD, _BOSS),
        files="snli_1.0_test_hard.jsonl",
        labels=LABELS,
    ),
    "anli_r1": _anli(1, 16_946, 1_000),
    "anli_r2": _anli(2, 45_460, 1_000),
    "anli_r3": _anli(3, 100_459, 1_200),
    "anli": Published(
        task="nli",
        title="Adversarial NLI, all rounds (BOSS)",
        citation="Nie et al. 2020, Adversarial NLI, ACL",
        licence="CC BY-NC 4.0",
        splits={
            "test": Split(tuple(f"plain_text/test_r{n}-*.parquet" for n in (1, 2, 3)), rows=3_200),
            "train": Split(
                tuple(f"plain_text/train_r{n}-*.parquet" for n in (1, 2, 3)), rows=162_865
            ),
        },
        forms=(_ANLI, _BOSS),
        hub=_ANLI_HUB,
        files="BOSS NaturalLanguageInference/anli/test.tsv",
        labels=LABELS,
    ),
    "mnli": Published(
        task="nli",
        title="Multi-Genre NLI",
        citation="Williams et al. 2018, NAACL",
        licence="OANC and others, see its paper",
        splits={
            "validation_matched": Split(("mnli/validation_matched-*.parquet",), rows=9_815),
            "validation_mismatched": Split(
                ("mnli/validation_mismatched-*.parquet",), rows=9_832
            ),
            "train": Split(("mnli/train-*.parquet",), rows=392_702),
        },
        forms=(HUB, STANFORD, _BOSS),
        hub=_GLUE,
        files="multinli_1.0_dev_matched.jsonl or .txt",
        original=originals.headed_text,
        original_suffix=".txt",
        labels=LABELS,
    ),
    "wanli": Published(
        task="nli",
        title="WANLI: written by workers and a model together",
        citation="Liu et al. 2022, Findings of EMNLP",
        licence="CC BY 4.0",
        splits={
            "test": Split(("test.jsonl",), rows=5_000),
            "train": Split(("train.jsonl",), rows=102_885),
        },
        forms=(
            Form(HUB.columns | {"label": "gold"}, labels=_NAMED, unlabelled=_UNLABELLED),
            _BOSS,
        ),
        hub=Hub("alisawuffles/WANLI", "61c95318fd71c55b6ba355d76253254615f387ec"),
        files="test.jsonl",
        labels=LABELS,
    ),
    "contract_nli": Published(
        task="nli",
        title="ContractNLI: a contract entails a statement or not",
        citation="Koreeda and Manning 2021, Findings of EMNLP",
        licence="CC BY 4.0",
        splits={"test": Split(), "train": Split()},
        forms=(
            Form(
                {
                    "premise": "premise",
                    "hypothesis": "hypothesis",
                    "label": "label",
                    "document": "document",
                },
                labels={
                    "Entailment": "entailment",
                    "NotMentioned": "neutral",
                    "Contradiction": "contradiction",
                },
            ),
            _BOSS,
        ),
        files="test.json of contract-nli.zip (stanfordnlp.github.io/contract-nli)",
        original=originals.contract_nli,
        original_suffix=".json",
        labels=LABELS,
    ),
}
