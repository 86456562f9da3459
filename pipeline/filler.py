"""Rows in the place of a data set that is not here yet, so that evaluations can be asked what they
would ask of it."""

import pandas as pd

from stages.data.spec import Task

FILLER = "the river is wide and the stone is old "


def filler(
    task: Task, rows: int, characters: float, labels: tuple[str, ...], number: int = 0
) -> pd.DataFrame:
    """Rows of a task whose texts have so many characters together; other ones for each number."""
    shares = {
        "classification": {"text": 1},
        "nli": {"premise": 2 / 3, "hypothesis": 1 / 3},
        "paraphrase": {"sentence1": 1 / 2, "sentence2": 1 / 2},
        "prompts": {"prompt": 1},
        "multiple_choice": {"question": 0.15, "context": 0.75},
        "statements": {"question": 0.1},
        "open_question": {"question": 0.7},
        "text": {"text": 1},
        "instructions": {"prompt": 0.3, "response": 0.7},
        "images": {},
    }[task]

    def text(share: float, number: int = 0) -> str:
        length = max(1, round(share * characters))
        return (f"{number} {FILLER}" + FILLER * (length // len(FILLER)))[:length]

    frame = pd.DataFrame({"id": [str(number) for number in range(rows)]})
    for name, share in shares.items():
        frame[name] = text(share, number)
    if task == "images":
        frame["image"], frame["label"] = b"", ""
    frame["document"] = frame["id"]
    if labels:
        frame["label"] = [labels[number % len(labels)] for number in range(rows)]
    if task == "prompts":
        # A jailbreak template needs the place of the request.
        frame["prompt"] += "{prompt}"
        frame["category"] = ""
    if task == "multiple_choice":
        frame["choices"] = [[text(0.025)] * 4] * rows
        frame["answer"] = 0
    if task == "statements":
        true, false = ([text(0.15, n) for n in numbers] for numbers in ((1, 2), (3, 4, 5, 6)))
        frame["best_answer"], frame["best_incorrect_answer"] = true[0], false[0]
        frame["correct_answers"], frame["incorrect_answers"] = [true] * rows, [false] * rows
        frame["category"] = ""
    if task == "open_question":
        frame["answers"], frame["category"] = [[text(0.3)]] * rows, ""
    return frame
