"""Safety: does the model refuse harmful requests, and answer harmless ones that look like them?

Answers are generated and judged by the rule of ``stages/evaluate/refusal.py``, whose version stands
in every score row.
"""

from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from stages.evaluate import refusal
from stages.evaluate.base import Evaluation, Metric, Request, Response, mean_of
from stages.evaluate.examples import answers, mean_where, qualified


class Refusal(Evaluation):
    """Refusal rate on harmful requests beside over-refusal on benign ones."""

    kind: Literal["refusal"] = "refusal"
    harmful: Annotated[tuple[str, ...], Field(min_length=1)]
    """Data sets of requests that should be refused."""
    benign: Annotated[tuple[str, ...], Field(min_length=1)]
    """Data sets of requests that should be answered; a model that refuses all is not safe."""
    split: str = "test"
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    chat: bool = True
    """Ask through the tokenizer's chat template."""

    axis: ClassVar[str] = "safety"
    VERSION: ClassVar[int] = refusal.VERSION
    primary: ClassVar[str] = "harmful_refusal_rate"

    @model_validator(mode="after")
    def _named_once(self) -> "Refusal":
        if len({*self.harmful, *self.benign}) < len(self.harmful) + len(self.benign):
            raise ValueError("harmful and benign name a data set twice; name each once")
        return self

    def datasets(self) -> dict[str, str]:
        """Every data set and the split."""
        return {dataset: self.split for dataset in (*self.harmful, *self.benign)}

    def tasks(self) -> dict[str, str]:
        """Data set to the task that it must be of."""
        return {dataset: "prompts" for dataset in self.datasets()}

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One generation per prompt, harmful data sets first."""
        return [
            Request(id, prompt, max_new_tokens=self.max_new_tokens, chat=self.chat)
            for dataset in self.datasets()
            for id, prompt in zip(
                qualified(dataset, data[dataset]["id"]), data[dataset]["prompt"], strict=True
            )
        ]

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per prompt.

        ``refused`` has a score for harmful prompts only, ``over_refused`` for benign ones only,
        ``incoherent`` for all; ``rule`` is what the judge went by, ``judge`` its version.
        """
        parts = []
        for dataset in self.datasets():
            frame, harmful = data[dataset], dataset in self.harmful
            ids = qualified(dataset, frame["id"])
            texts = [response.text for response in answers(ids, responses)]
            verdicts = [
                refusal.judge(prompt, text)
                for prompt, text in zip(frame["prompt"], texts, strict=True)
            ]
            outcomes = pd.Series([verdict.outcome for verdict in verdicts])
            refused = (outcomes == "refusal").astype(float)
            parts.append(
                pd.DataFrame(
                    {
                        "example_id": ids,
                        "document": qualified(dataset, frame["document"]),
                        "subset": "harmful" if harmful else "benign",
                        "prompt": frame["prompt"].tolist(),
                        "gold": "refusal" if harmful else "compliance",
                        "prediction": outcomes,
                        "answer": texts,
                        "dataset": dataset,
                        "category": frame["category"].tolist(),
                        "rule": [verdict.rule for verdict in verdicts],
                        "judge": refusal.VERSION,
                        "refused": refused if harmful else np.nan,
                        "over_refused": np.nan if harmful else refused,
                        "incoherent": (outcomes == "incoherent").astype(float),
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def metrics(self) -> tuple[Metric, ...]:
        """Refusal, over-refusal and incoherence; each data set's own rate where there are more."""
        metrics = [
            mean_of("refused", "harmful_refusal_rate", label="refused, harmful requests"),
            mean_of(
                "over_refused",
                "over_refusal_rate",
                higher_is_better=False,
                label="refused, benign requests",
            ),
            mean_of(
                "incoherent", "incoherent_rate", higher_is_better=False, label="incoherent answers"
            ),
        ]
        for column, name, datasets in (
            ("refused", "harmful_refusal_rate", self.harmful),
            ("over_refused", "over_refusal_rate", self.benign),
        ):
            if len(datasets) > 1:
                metrics += [
                    mean_where(
                        column,
                        f"{name}/{dataset}",
                        "dataset",
                        (dataset,),
                        higher_is_better=column == "refused",
                        label=f"refused, {dataset}",
                    )
                    for dataset in datasets
                ]
        return tuple(metrics)
