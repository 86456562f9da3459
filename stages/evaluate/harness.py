"""Any benchmark of lm-evaluation-harness, answered by our engine.

The harness makes the prompts and scores the answers (``harness_replay.py``); the model's answers
come from the one pass over all requests of a checkpoint, and each metric is a function of sums over
examples (``harness_sums.py``), so that it has an interval and a paired difference like any other.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from stages.evaluate.base import AXES, Evaluation, Metric, Request, Response
from stages.evaluate.examples import mean_where
from stages.evaluate.harness_sums import WEIGHED, aggregation
from stages.evaluate.techniques import SelfConsistency
from stages.spec import Spec


class Measure(Spec):
    """One metric of a task, after one of its filters."""

    metric: str
    filter: str = "none"
    """The harness's name of the rule that extracts the answer."""
    aggregation: str
    """The harness's name of the function from examples to the task's number, or the module and
    name (with a dot) of one of the task's own."""
    higher_is_better: bool = True

    @property
    def name(self) -> str:
        """As in tables: the filter is named only where it is one."""
        return self.metric if self.filter == "none" else f"{self.metric}.{self.filter}"

    @property
    def key(self) -> str:
        """As in the harness's results."""
        return f"{self.metric},{self.filter}"


class HarnessTask(Spec):
    """A task without subtasks."""

    name: str
    output_types: tuple[str, ...]
    """What it asks the model for, by the harness's names."""
    measures: tuple[Measure, ...]


class GroupMeasure(Spec):
    """A group's number: the mean over its tasks, or over all of their examples."""

    metric: str
    filters: tuple[str, ...]
    weight_by_size: bool


class Harness(Spec):
    """What the harness says about a task, group or tag without its data (``harness_tasks.py``)."""

    version: str
    """Of lm-evaluation-harness."""
    digest: str
    """Of the definitions of all tasks, and of the files in the folder of one's own."""
    tasks: tuple[HarnessTask, ...]
    group: tuple[GroupMeasure, ...] = ()


class LmEval(Evaluation):
    """A task, group or tag of lm-evaluation-harness."""

    kind: Literal["lm_eval"] = "lm_eval"
    task: str
    """The harness's name of the task, group or tag."""
    include_path: str | None = None
    """Folder with task files of one's own, relative to the sweep file; keep their data in it."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Answered examples before each; the task's own number where absent."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """The first so many examples of each task."""
    apply_chat_template: bool = False
    """Put each example through the chat template of the model's tokenizer."""
    fewshot_as_multiturn: bool = True
    """Answered examples are turns of the conversation; else all stand in the user's one turn."""
    system_instruction: str | None = None
    """Text before everything; the system's turn of a conversation."""
    document: str | None = None
    """Column of the harness's data that says which examples share a source, for intervals."""
    axis: Literal[AXES] = "capability"
    """Section of the report that it stands in."""
    harness: Harness
    """Filled in when the sweep is read."""

    VERSION: ClassVar[int] = 3

    @model_validator(mode="after")
    def _turns_need_a_template(self) -> "LmEval":
        if not (self.fewshot_as_multiturn or self.apply_chat_template):
            raise ValueError(
                "fewshot_as_multiturn has no effect without apply_chat_template; remove it"
            )
        return self

    @model_validator(mode="after")
    def _filters_find_what_samples_agree_on(self) -> "LmEval":
        without = [
            task.name
            for task in self.harness.tasks
            if any(measure.filter == "none" for measure in task.measures)
        ]
        if isinstance(self.technique, SelfConsistency) and without:
            raise ValueError(
                f"self_consistency votes on what a task's filter takes from an answer, and "
                f"{without[0]} has no filter; remove technique"
            )
        return self

    @property
    def prompting(self) -> dict[str, bool | str | None]:
        """How the harness is to make the prompts."""
        return {
            "apply_chat_template": self.apply_chat_template,
            "fewshot_as_multiturn": self.apply_chat_template and self.fewshot_as_multiturn,
            "system_instruction": self.system_instruction,
        }

    @property
    def units(self) -> dict[str, str]:
        """The log-probabilities of texts stand beside what their task weighs them by."""
        measures = (measure for task in self.harness.tasks for measure in task.measures)
        return {
            f"{measure.name}.logprob": f"{measure.name}.weight"
            for measure in measures
            if getattr(aggregation(measure.aggregation), "parts", ()) == WEIGHED
        }

    @property
    def primary(self) -> str:
        """The first metric that has a number."""
        return self.metrics()[0].name

    @property
    def generates(self) -> bool:
        """Whether every answer is a text."""
        return self._output_types == {"generate_until"}

    @property
    def writes_texts(self) -> bool:
        """Whether at least some of them are."""
        return "generate_until" in self._output_types

    @property
    def reads_windows(self) -> bool:
        """Whether whole texts are scored, which an encoder-decoder cannot do."""
        return "loglikelihood_rolling" in self._output_types

    @property
    def _output_types(self) -> set[str]:
        return {output_type for task in self.harness.tasks for output_type in task.output_types}

    def datasets(self) -> dict[str, str]:
        """None of the sweep's: the harness brings its own."""
        return {}

    def tasks(self) -> dict[str, str]:
        """None."""
        return {}

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """What the harness asks the model; raises StageFailed where its data cannot be had."""
        from stages.evaluate.harness_replay import requests

        return requests(self)

    def voter(self, data: dict[str, pd.DataFrame]) -> Callable[[Request, str], str]:
        """What the filters of its task take from an answer."""
        from stages.evaluate.harness_replay import voter

        return voter(self)

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per example of each task, with the values that the harness gives it.

        Raises StageFailed where a metric is not the number that the harness itself reports.
        """
        from stages.evaluate.harness_replay import score

        return score(self, responses)

    def metrics(self) -> tuple[Metric, ...]:
        """The group's metrics, then those of each task; those without a number come last."""
        tasks = self.harness.tasks
        found = [metric for group in self.harness.group for metric in self._of_group(group)]
        alone = len(tasks) == 1 and not found
        for task in tasks:
            for measure in task.measures:
                name = measure.name if alone else f"{measure.name}/{task.name}"
                found.append(_metric(name, task, measure))
        return tuple(sorted(found, key=lambda metric: bool(metric.gap)))

    def _of_group(self, group: GroupMeasure) -> list[Metric]:
        """A group's metric, once for each filter."""
        metrics = []
        for filter in group.filters:
            members = [
                (task, measure)
                for task in self.harness.tasks
                for measure in task.measures
                if (measure.metric, measure.filter) == (group.metric, filter)
            ]
            _, first = members[0]
            fields = {
                "higher_is_better": first.higher_is_better,
                "label": f"{_words(first.name)}, {self.task}",
            }
            each = [_metric(first.name, task, measure) for task, measure in members]
            columns = {metric.column for metric in each}
            if any(metric.gap for metric in each):
                metrics.append(_gap(first.name, "the mean of a number that is none", fields))
            elif group.weight_by_size and len(columns) == 1 and None not in columns:
                among = tuple(task.name for task, _ in members)
                metrics.append(mean_where(*columns, first.name, "subset", among, **fields))
            else:
                sums = [aggregation(measure.aggregation).sums for _, measure in members]
                metrics.append(_mean_of(first.name, each, sums, group.weight_by_size, **fields))
        return metrics


def _metric(name: str, task: HarnessTask, measure: Measure) -> Metric:
    """A task's metric; the last of its sums is how many examples it has."""
    label = _words(measure.name) if name == measure.name else f"{_words(measure.name)}, {task.name}"
    fields = {"higher_is_better": measure.higher_is_better, "label": label}
    found = aggregation(measure.aggregation)
    if found is None:
        return _gap(name, f"the harness sums it up by {measure.aggregation}", fields)
    columns = [measure.name + part for part in found.parts]
    if found.mean:
        return mean_where(*columns, name, "subset", (task.name,), **fields)

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        values = scores[columns].to_numpy(dtype=float)
        mine = ((scores["subset"] == task.name) & scores[columns[0]].notna()).to_numpy()
        sums = np.concatenate([found.statistics(values), np.ones((len(scores), 1))], axis=1)
        return np.where(mine[:, None], sums, 0.0)

    return Metric(name, statistics, lambda sums: found.value(sums[..., :-1]), **fields)


def _mean_of(
    name: str, parts: list[Metric], sums: list[int], weighed: bool, **fields: object
) -> Metric:
    """The mean of the numbers of tasks, each of so many sums, all alike or each as often as it has
    examples."""
    starts = np.cumsum(sums)[:-1]

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        return np.concatenate([part.statistics(scores) for part in parts], axis=1)

    def value(totals: np.ndarray) -> np.ndarray:
        own = np.split(totals, starts, axis=-1)
        numbers = np.stack([part.value(its) for part, its in zip(parts, own, strict=True)])
        sizes = np.stack([its[..., -1] if weighed else np.ones(its.shape[:-1]) for its in own])
        with np.errstate(invalid="ignore", divide="ignore"):
            return (numbers * sizes).sum(axis=0) / sizes.sum(axis=0)

    return Metric(name, statistics, value, **fields)


def _gap(name: str, what: str, fields: dict) -> Metric:
    reason = f"{what}, which is no function of sums over examples"
    return Metric(name, lambda scores: np.zeros((len(scores), 1)), lambda s: s[..., 0], gap=reason,
                  **fields)  # fmt: skip


def _words(name: str) -> str:
    return name.replace("_", " ")
