"""Toxicity of comments and posts: CivilComments in distribution, the others out of it (BOSS)."""

from stages.data import originals
from stages.data.published import Form, Hub, Published, Split

LABELS = ("benign", "toxic")

_NUMBERED = {"0": "benign", "1": "toxic"}
_BOSS = Form(
    {"text": "Text", "label": "Label"},
    labels=_NUMBERED | {"0.0": "benign", "1.0": "toxic"},
    quoted=True,
)

SETS: dict[str, Published] = {
    "civil_comments": Published(
        task="classification",
        title="CivilComments: toxic where half of the raters say so",
        citation="Borkan et al. 2019, arXiv:1903.04561",
        licence="CC0 1.0",
        splits={
            "test": Split(("data/test-*.parquet",), rows=97_320),
            "validation": Split(("data/validation-*.parquet",), rows=97_320),
            "train": Split(("data/train-*.parquet",), rows=1_804_874),
        },
        forms=(
            Form(
                {"text": "text", "label": "label"},
                derive=originals.with_halves,
                needs=("toxicity",),
                makes=("label",),
            ),
            _BOSS,
        ),
        hub=Hub("google/civil_comments", "c70f3b18a8b49df546556991f65a3b95953ee9c1"),
        files="BOSS ToxicDetection/civil_comments/test.tsv",
        labels=LABELS,
    ),
    "hate_speech": Published(
        task="classification",
        title="Hate speech from a white supremacist forum",
        citation="de Gibert et al. 2018, Workshop on Abusive Language Online",
        licence="CC BY-SA 3.0 ES",
        splits={"test": Split(("default/train/*.parquet",), rows=10_944)},
        forms=(
            Form(
                {"text": "text", "label": "label"},
                labels=_NUMBERED | {"noHate": "benign", "hate": "toxic"},
                # Skipped, and sentences that are hateful only together with others.
                unlabelled=("2", "3", "idk/skip", "relation"),
            ),
            _BOSS,
        ),
        # The repository itself holds a loading script; this is the hub's own copy of its rows.
        hub=Hub("odegiber/hate_speech18", "refs/convert/parquet"),
        files="BOSS ToxicDetection/hate_speech/test.tsv",
        labels=LABELS,
    ),
    "adv_civil": Published(
        task="classification",
        title="AdvCivil: CivilComments rewritten against a model (BOSS)",
        citation="Yuan et al. 2023, BOSS, NeurIPS Datasets and Benchmarks",
        licence="not stated",
        splits={"test": Split()},
        forms=(_BOSS,),
        files="BOSS ToxicDetection/adv_civil/test.tsv (github.com/lifan-yuan/OOD_NLP)",
        labels=LABELS,
    ),
    "implicit_hate": Published(
        task="classification",
        title="Implicit hate: posts of extremist groups",
        citation="ElSherief et al. 2021, Latent Hatred, EMNLP",
        licence="not stated in its repository",
        splits={"test": Split(rows=21_480)},
        forms=(
            Form(
                {"text": "post", "label": "class"},
                labels={
                    "not_hate": "benign",
                    "implicit_hate": "toxic",
                    "explicit_hate": "toxic",
                },
                quoted=True,
            ),
            _BOSS,
        ),
        gated="request form, github.com/SALT-NLP/implicit-hate",
        files="implicit_hate_v1_stg1_posts.tsv",
        labels=LABELS,
    ),
    "toxigen": Published(
        task="classification",
        title="ToxiGen: machine-written statements about groups, rated by people",
        citation="Hartvigsen et al. 2022, ToxiGen, ACL",
        licence="not stated in its card",
        splits={
            "test": Split(("annotated/test-*.parquet",), rows=940),
            "train": Split(("annotated/train-*.parquet",)),
        },
        forms=(
            Form(
                {"text": "text", "label": "label"},
                derive=originals.with_ratings,
                derived=2,
                needs=("toxicity_ai", "toxicity_human"),
                makes=("label",),
            ),
            _BOSS,
        ),
        hub=Hub("toxigen/toxigen-data", "2234046f8fd63e9ad54fbe755c81a3bf1ebd9c61"),
        gated="accept the terms on its hub page and set HF_TOKEN; "
        "request form, github.com/microsoft/TOXIGEN",
        files="annotated_test.csv",
        labels=LABELS,
    ),
}
