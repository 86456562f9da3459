"""Three ways to classify, each a field of the evaluation.

- ``label_words``: the label whose words are most probable after the prompt, within the closed set.
- ``prompting``: the model is told the label words and writes an answer, in which a rule finds the
  label (``free_answers.py``).
- ``head``: the largest output of the checkpoint's classification head; output i belongs to the
  template's i-th label.

All go through the same template, which training uses as well.
"""

from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator
from scipy.special import logsumexp

from stages.data.spec import Task
from stages.data.templates import TEMPLATES, Template
from stages.errors import StageFailed
from stages.evaluate import free_answers
from stages.evaluate.base import Evaluation, Request, Response, mean_of
from stages.evaluate.examples import answers
from stages.evaluate.free_answers import OUT_OF_SET, label_in
from stages.evaluate.prompting import CHAT_CHOICES, Shots, wording
from stages.evaluate.techniques import ExpertCount
from stages.evaluate.thinking import stripped

CONTENT_FREE = "N/A"
"""What stands for the text in the prompt that calibration compares with."""
CALIBRATION = "#calibration"
ANSWER_TOKENS = 16


class Classification(Evaluation):
    """Fields and steps that all evaluations of labelled texts share."""

    template: str
    """A name in ``stages/data/templates.py``, which has a word for every label."""
    method: Literal["label_words", "prompting", "head"] = "label_words"
    shots: Shots | None = None
    """Answered examples before each, the labels taking turns (few-shot)."""
    calibrated: bool = False
    """Divide each word's probability by that after the same prompt without content (Zhao et al.
    2021, arXiv 2102.09690); ``label_words`` only."""
    chat: bool = False
    """Put the prompt through the tokenizer's chat template."""
    max_new_tokens: Annotated[int, Field(ge=1)] = ANSWER_TOKENS
    """Length of an answer; ``prompting`` only."""

    VERSION: ClassVar[int] = 2

    @model_validator(mode="after")
    def _method_uses_its_fields(self) -> "Classification":
        idle = {
            "calibrated": self.calibrated and self.method != "label_words",
            "max_new_tokens": self.max_new_tokens != ANSWER_TOKENS and self.method != "prompting",
            "shots": self.shots is not None and self.method == "head",
            "chat": self.chat and self.method == "head",
            # Every other technique is about the next token.
            "technique": not isinstance(self.technique, ExpertCount | None)
            and self.method == "head",
        }
        for field, given in idle.items():
            if given:
                raise ValueError(f"{field} has no effect with method: {self.method}; remove it")
        return self

    @property
    def asks_head(self) -> bool:
        """Whether the checkpoint's classification head answers."""
        return self.method == "head"

    @property
    def generates(self) -> bool:
        """Whether the model writes its answers."""
        return self.method == "prompting"

    @property
    def task(self) -> Task:
        """The task of the data sets, which is the template's."""
        return TEMPLATES[self.template].task if self.template in TEMPLATES else "classification"

    def shot_source(self) -> dict[str, tuple[str, str]]:
        """The answered examples' key in ``data``, with their data set and split."""
        return {self.shots.key: (self.shots.dataset, self.shots.split)} if self.shots else {}

    def tasks(self) -> dict[str, Task]:
        """Data set to the task that it must be of."""
        names = [*self.datasets(), *(dataset for dataset, _ in self.shot_source().values())]
        return {dataset: self.task for dataset in names}

    def wordings(self) -> dict[str, str]:
        """The template's hash; which side of a prompt a head does without; how the model is told
        the labels, and how they are read, where it writes its answers."""
        cut = {"too_long": "left"} if self.method == "head" else {}
        shots = self.shots.rule if self.shots else {}
        chat = CHAT_CHOICES if self.chat and self.method == "label_words" else {}
        written = {"options": wording(free_answers.OPTIONS), "read": str(free_answers.VERSION)}
        template = {"template": TEMPLATES[self.template].hash}
        return {**template, **cut, **shots, **chat, **(written if self.generates else {})}

    def vote(self, request: Request, text: str) -> str:
        """The label in an answer."""
        return label_in(TEMPLATES[self.template], stripped(text)[0])

    def prompts(self, rows: pd.DataFrame, data: dict[str, pd.DataFrame]) -> list[str]:
        """The prompt of each row, with the answered examples before it, and before these the
        options where the model writes its answers."""
        template = TEMPLATES[self.template]
        before = free_answers.options(template) if self.generates else ""
        if self.shots is not None:
            drawn = self.shots.drawn(data, template.columns, balance="label")
            check_labels(self.shots.dataset, drawn["label"], self.template)
            before += "".join(
                f"{template.fill(row)}{template.labels[row['label']]}\n\n"
                for row in drawn.to_dict("records")
            )
        return [before + template.fill(row) for row in rows.to_dict("records")]

    def asked(
        self, ids: list[str], rows: pd.DataFrame, data: dict[str, pd.DataFrame]
    ) -> list[Request]:
        """One request per row (see ``calibration`` for one more)."""
        prompts = zip(ids, self.prompts(rows, data), strict=True)
        if self.method == "head":
            return [Request(id, prompt, head=True) for id, prompt in prompts]
        if self.method == "prompting":
            stop = () if self.chat else ("\n",)
            length = self.max_new_tokens
            return [
                Request(id, prompt, max_new_tokens=length, chat=self.chat, stop=stop)
                for id, prompt in prompts
            ]
        words = tuple(word for _, word in TEMPLATES[self.template].words)
        return [Request(id, prompt, words, chat=self.chat) for id, prompt in prompts]

    def calibration(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """The prompt without content, where it is needed."""
        if not self.calibrated:
            return []
        empty = dict.fromkeys(TEMPLATES[self.template].columns, CONTENT_FREE)
        return self.asked([CALIBRATION], pd.DataFrame([empty]), data)

    def answered(self, ids: list[str], responses: dict[str, Response]) -> pd.DataFrame:
        """Per row ``prediction``, ``answer`` (what was written), ``thinking`` (the rule that
        stripped it) and ``out_of_set`` (0 or 1). The first label wins a tie."""
        template = TEMPLATES[self.template]
        found = answers(ids, responses)
        texts, rules = [""] * len(found), ["none"] * len(found)
        if self.method == "prompting":
            texts = [response.text for response in found]
            plain, rules = zip(*map(stripped, texts), strict=True)
            predictions = [label_in(template, text) for text in plain]
        elif self.method == "head":
            predictions = [_largest_output(template, response) for response in found]
        else:
            base = np.zeros(len(template.words))
            if self.calibrated:
                base = np.array(answers([CALIBRATION], responses)[0].logprobs)
            predictions = [
                most_probable(template, np.array(response.logprobs) - base) for response in found
            ]
        return pd.DataFrame(
            {
                "prediction": predictions,
                "answer": texts,
                "thinking": list(rules),
                "out_of_set": [float(prediction == OUT_OF_SET) for prediction in predictions],
            }
        )

    def out_of_set_rate(self) -> tuple:
        """How many answers name no label; only where answers are written."""
        rate = mean_of("out_of_set", "out_of_set_rate", higher_is_better=False, label="no label")
        return (rate,) if self.method == "prompting" else ()


def most_probable(template: Template, logprobs: np.ndarray) -> str:
    """The label with the largest summed probability of its words (log-probabilities, (words,))."""
    owners = [label for label, _ in template.words]
    scores = [
        logsumexp([value for owner, value in zip(owners, logprobs, strict=True) if owner == label])
        for label in template.labels
    ]
    return list(template.labels)[int(np.argmax(scores))]


def _largest_output(template: Template, response: Response) -> str:
    if len(response.outputs) != len(template.labels):
        raise StageFailed(
            f"the classification head has {len(response.outputs)} outputs, the template "
            f"{len(template.labels)} labels; use the template that it was trained with"
        )
    return list(template.labels)[int(np.argmax(response.outputs))]


def check_labels(dataset: str, labels: pd.Series, name: str) -> None:
    """Raise StageFailed if a data set has a label for which the template has no word."""
    unknown = sorted(set(labels) - set(TEMPLATES[name].labels))
    if unknown:
        raise StageFailed(
            f"data set {dataset!r} has the label {unknown[0]!r}, which template {name!r} lacks "
            f"({', '.join(TEMPLATES[name].labels)}): map it with the data set's `labels`"
        )


def correct(gold: pd.Series, found: pd.DataFrame) -> list[float]:
    """1 where the prediction is the label, else 0; an answer without a label is wrong."""
    return (gold.to_numpy() == found["prediction"].to_numpy()).astype(float).tolist()
