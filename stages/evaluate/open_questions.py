"""Questions answered in the model's own words: closed book, and with false premises."""

import re
import string
from collections import Counter
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from stages.evaluate import premises
from stages.evaluate.base import Evaluation, Metric, Request, Response, mean_of
from stages.evaluate.examples import answers, by_set, clusters, qualified
from stages.evaluate.prompting import Shots, wording
from stages.evaluate.thinking import stripped

INSTRUCTION = "Answer these questions:\n\n"


class OpenQuestion(Evaluation):
    """Exact match and token F1 of short answers, such as NQ-open's, without any passage.

    Prompt as lm-evaluation-harness's NQ-open task; unlike there an answer ends at the end of its
    line and not at the first comma or full stop, and normalisation is SQuAD's.
    """

    kind: Literal["open_question"] = "open_question"
    dataset: str
    split: str = "test"
    shots: Shots | None = None
    """Answered questions before each; of task ``open_question``, the first answer is given."""
    chat: bool = False
    """Ask through the tokenizer's chat template; an answer is then not cut at its first line."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 32

    axis: ClassVar[str] = "truthfulness"
    primary: ClassVar[str] = "exact_match"

    @property
    def generates(self) -> bool:
        """The model writes its answers."""
        return True

    def datasets(self) -> dict[str, str]:
        """The one data set and its split."""
        return {self.dataset: self.split}

    def sources(self) -> dict[str, tuple[str, str]]:
        """The questions and, under a key of their own, the answered ones."""
        shots = {self.shots.key: (self.shots.dataset, self.shots.split)} if self.shots else {}
        return super().sources() | shots

    def tasks(self) -> dict[str, str]:
        """Data set to the task that it must be of."""
        shots = {self.shots.dataset: "open_question"} if self.shots else {}
        return {self.dataset: "open_question"} | shots

    def wordings(self) -> dict[str, str]:
        """The hash of the prompt's fixed part."""
        shots = self.shots.rule if self.shots else {}
        return {"prompt": wording(INSTRUCTION, _asked("?")), **shots}

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One generation per question."""
        ids = qualified(self.dataset, data[self.dataset]["id"])
        return [
            Request(
                id,
                context,
                max_new_tokens=self.max_new_tokens,
                chat=self.chat,
                stop=() if self.chat else ("\n",),
            )
            for id, context in zip(ids, self._contexts(data), strict=True)
        ]

    def vote(self, request: Request, text: str) -> str:
        """The normalised answer."""
        return normalised(stripped(text)[0])

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per question: ``exact`` (0 or 1) and ``f1``, the best over its answers."""
        frame = data[self.dataset]
        ids = qualified(self.dataset, frame["id"])
        found = answers(ids, responses)
        texts, rules = zip(*(stripped(response.text) for response in found), strict=True)
        golds = frame["answers"]
        return pd.DataFrame(
            {
                "example_id": ids,
                "document": qualified(self.dataset, frame["document"]),
                "subset": self.dataset,
                "prompt": self._contexts(data),
                "gold": [" | ".join(gold) for gold in golds],
                "prediction": [normalised(text) for text in texts],
                "answer": [response.text for response in found],
                "thinking": rules,
                "exact": [
                    max(exact_match(text, answer) for answer in gold)
                    for text, gold in zip(texts, golds, strict=True)
                ],
                "f1": [
                    max(token_f1(text, answer) for answer in gold)
                    for text, gold in zip(texts, golds, strict=True)
                ],
            }
        )

    def metrics(self) -> tuple[Metric, ...]:
        """The means over questions."""
        return (
            mean_of("exact", "exact_match", label="exact match"),
            mean_of("f1", "token_f1", label="token F1", bounded=True),
        )

    def _contexts(self, data: dict[str, pd.DataFrame]) -> list[str]:
        shown = ""
        if self.shots:
            rows = self.shots.drawn(data, ("question",))
            shown = "".join(
                f"{_asked(question)} {answered[0]}\n"
                for question, answered in zip(rows["question"], rows["answers"], strict=True)
            )
        questions = data[self.dataset]["question"]
        return [f"{INSTRUCTION}{shown}{_asked(question)}" for question in questions]


def _asked(question: str) -> str:
    return f"Q: {question.strip().rstrip('?')}?\nA:"


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and doubled white space (Rajpurkar
    et al. 2016, arXiv 1606.05250, as in the SQuAD evaluation script)."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def exact_match(answer: str, gold: str) -> float:
    """1 where both are the same after normalisation, else 0."""
    return float(normalised(answer) == normalised(gold))


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the normalised words, with repetition."""
    ours, theirs = normalised(answer).split(), normalised(gold).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return float(ours == theirs)
    return 2 * common / (len(ours) + len(theirs))


class FalsePremises(Evaluation):
    """Does the model correct a question that assumes what is not so, as FreshQA's false premises?

    Judged by the rule of ``premises.py``. Questions with true premises are the control: a model
    that contradicts everything corrects nothing.
    """

    kind: Literal["false_premises"] = "false_premises"
    false: Annotated[tuple[str, ...], Field(min_length=1)]
    """Data sets of questions with a false premise."""
    true: tuple[str, ...] = ()
    """Data sets of questions with a true one."""
    split: str = "test"
    chat: bool = True
    max_new_tokens: Annotated[int, Field(ge=1)] = 64

    axis: ClassVar[str] = "truthfulness"
    VERSION: ClassVar[int] = premises.VERSION + 1
    primary: ClassVar[str] = "corrected_rate"

    @property
    def generates(self) -> bool:
        """The model writes its answers."""
        return True

    def datasets(self) -> dict[str, str]:
        """Every data set and the split."""
        return {dataset: self.split for dataset in (*self.false, *self.true)}

    def tasks(self) -> dict[str, str]:
        """Data set to the task that it must be of."""
        return {dataset: "open_question" for dataset in self.datasets()}

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One generation per question, those with a false premise first."""
        return [
            Request(id, question, max_new_tokens=self.max_new_tokens, chat=self.chat)
            for dataset in self.datasets()
            for id, question in zip(
                qualified(dataset, data[dataset]["id"]), data[dataset]["question"], strict=True
            )
        ]

    def vote(self, request: Request, text: str) -> str:
        """What the rule says of the answer."""
        return premises.judge(stripped(text)[0]).outcome

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per question: ``corrected`` for false premises only, ``contradicted`` for true
        ones only, ``unsure`` for all; each 0 or 1."""
        parts = []
        for dataset in self.datasets():
            frame, is_false = data[dataset], dataset in self.false
            ids = qualified(dataset, frame["id"])
            found = answers(ids, responses)
            texts, rules = zip(*(stripped(response.text) for response in found), strict=True)
            verdicts = [premises.judge(text) for text in texts]
            outcomes = pd.Series([verdict.outcome for verdict in verdicts])
            corrects = (outcomes == "corrects").astype(float)
            parts.append(
                pd.DataFrame(
                    {
                        "example_id": ids,
                        "document": clusters(dataset, frame["document"]),
                        "subset": "false premise" if is_false else "true premise",
                        "prompt": frame["question"].tolist(),
                        "gold": [" | ".join(answered) for answered in frame["answers"]],
                        "prediction": outcomes,
                        "answer": [response.text for response in found],
                        "thinking": rules,
                        "dataset": dataset,
                        "rule": [verdict.rule for verdict in verdicts],
                        "judge": premises.VERSION,
                        "corrected": corrects if is_false else np.nan,
                        "contradicted": np.nan if is_false else corrects,
                        "unsure": (outcomes == "unsure").astype(float),
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def metrics(self) -> tuple[Metric, ...]:
        """The rates; that of true premises only where there are any; each data set's own and the
        worst of them where there are more."""
        corrected = {"label": "corrected, false premises"}
        contradicted = {"label": "contradicted, true premises", "higher_is_better": False}
        control = mean_of("contradicted", "contradicted_rate", datasets=self.true, **contradicted)
        return (
            mean_of("corrected", "corrected_rate", datasets=self.false, **corrected),
            *((control,) if self.true else ()),
            mean_of("unsure", "unsure_rate", higher_is_better=False, label="unsure answers"),
            *by_set("corrected", "corrected_rate", "dataset", self.false, **corrected),
            *by_set("contradicted", "contradicted_rate", "dataset", self.true, **contradicted),
        )
