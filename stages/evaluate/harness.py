"""Any benchmark of lm-evaluation-harness, answered by our engine.

The harness makes the prompts and scores the answers (``harness_replay.py``); the model's answers
come from the one pass over all requests of a checkpoint, and each metric is a function of sums over
examples, so that it has an interval and a paired difference like any other. What the harness sums
up otherwise (corpus BLEU, a median, a function of the task's own) is a gap with that reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from stages.evaluate.base import AXES, Evaluation, Metric, Request, Response
from stages.evaluate.examples import difference, mean_where
from stages.spec import Spec


class Measure(Spec):
    """One metric of a task, after one of its filters."""

    metric: str
    filter: str = "none"
    """The harness's name of the rule that extracts the answer."""
    aggregation: str
    """The harness's name of the function from examples to the task's number."""
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
    output_type: str
    measures: tuple[Measure, ...]


class GroupMeasure(Spec):
    """A group's number: the mean over its tasks, or over all of their examples."""

    metric: str
    filters: tuple[str, ...]
    weight_by_size: bool


class Harness(Spec):
    """What the harness says about a task or group without its data (``harness_tasks.py``)."""

    version: str
    """Of lm-evaluation-harness."""
    digest: str
    """Of the definitions of all tasks, and of the files in the folder of one's own."""
    tasks: tuple[HarnessTask, ...]
    group: tuple[GroupMeasure, ...] = ()


@dataclass(frozen=True)
class Aggregation:
    """How per-example values of the harness become its number, by sums."""

    parts: tuple[str, ...]
    """Suffixes of the columns that a value is stored in."""
    split: Callable[[object], tuple]
    """A value of the harness, as its columns."""
    statistics: Callable[[np.ndarray], np.ndarray]
    """Columns (n, parts) to what is summed (n, k)."""
    value: Callable[[np.ndarray], np.ndarray]
    """Sums (..., k) to the number (...)."""
    mean: bool = False
    """The number is the mean of one column."""


def _plain(value: object) -> tuple:
    return (float(value),)


def _pair(value: tuple) -> tuple:
    return tuple(float(part) for part in value)


def _counted(columns: np.ndarray) -> np.ndarray:
    return np.concatenate([columns, np.ones((len(columns), 1))], axis=1)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def _brier(value: tuple) -> tuple:
    """Squared distance of the probabilities from the right answer."""
    gold, probabilities = value
    right = np.eye(len(probabilities))[gold]
    return (float(((np.asarray(probabilities) - right) ** 2).sum()),)


def _outcomes(columns: np.ndarray) -> np.ndarray:
    """True and false positives, false and true negatives of (gold, prediction)."""
    gold, prediction = columns[:, 0] == 1, columns[:, 1] == 1
    return np.stack(
        [gold & prediction, ~gold & prediction, gold & ~prediction, ~gold & ~prediction], axis=1
    ).astype(float)


def _f1(sums: np.ndarray) -> np.ndarray:
    tp, fp, fn = sums[..., 0], sums[..., 1], sums[..., 2]
    return 2 * tp / np.maximum(2 * tp + fp + fn, 1)


def _matthews(sums: np.ndarray) -> np.ndarray:
    tp, fp, fn, tn = np.moveaxis(sums, -1, 0)
    spread = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / np.where(spread > 0, spread, 1)


WEIGHED = (".logprob", ".weight")
AGGREGATIONS = {
    "mean": Aggregation(("",), _plain, _counted, _ratio, mean=True),
    "nanmean": Aggregation(("",), _plain, _counted, _ratio, mean=True),
    "brier_score": Aggregation(("",), _brier, _counted, _ratio, mean=True),
    "perplexity": Aggregation(("",), _plain, _counted, lambda s: np.exp(-_ratio(s))),
    "weighted_perplexity": Aggregation(
        WEIGHED, _pair, lambda columns: columns, lambda s: np.exp(-_ratio(s))
    ),
    "bits_per_byte": Aggregation(
        WEIGHED, _pair, lambda columns: columns, lambda s: -_ratio(s) / np.log(2)
    ),
    "f1": Aggregation((".gold", ".prediction"), _pair, _outcomes, _f1),
    "matthews_corrcoef": Aggregation((".gold", ".prediction"), _pair, _outcomes, _matthews),
}
"""The harness's aggregations that are functions of sums over examples."""


class LmEval(Evaluation):
    """A task or group of lm-evaluation-harness."""

    kind: Literal["lm_eval"] = "lm_eval"
    task: str
    """The harness's name of the task or group."""
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

    VERSION: ClassVar[int] = 1

    @model_validator(mode="after")
    def _turns_need_a_template(self) -> "LmEval":
        if not (self.fewshot_as_multiturn or self.apply_chat_template):
            raise ValueError(
                "fewshot_as_multiturn has no effect without apply_chat_template; remove it"
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
            if getattr(AGGREGATIONS.get(measure.aggregation), "parts", ()) == WEIGHED
        }

    @property
    def primary(self) -> str:
        """The first metric that has a number."""
        return self.metrics()[0].name

    @property
    def generates(self) -> bool:
        """Whether every answer is a text."""
        return all(task.output_type == "generate_until" for task in self.harness.tasks)

    @property
    def writes_texts(self) -> bool:
        """Whether at least some of them are."""
        return any(task.output_type == "generate_until" for task in self.harness.tasks)

    @property
    def reads_windows(self) -> bool:
        """Whether whole texts are scored, which an encoder-decoder cannot do."""
        return any(t.output_type == "loglikelihood_rolling" for t in self.harness.tasks)

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
            members = {
                task.name: measure
                for task in self.harness.tasks
                for measure in task.measures
                if (measure.metric, measure.filter) == (group.metric, filter)
            }
            first = next(iter(members.values()))
            fields = {
                "higher_is_better": first.higher_is_better,
                "label": f"{_words(first.name)}, {self.task}",
            }
            mean = {
                task: mean_where(first.name, first.name, "subset", (task,), **fields)
                for task in members
            }
            sums = [AGGREGATIONS.get(m.aggregation) for m in members.values()]
            if not all(each and each.mean for each in sums):
                metrics.append(_gap(first.name, "the mean of numbers that are no means", fields))
            elif group.weight_by_size:
                whole = mean_where(first.name, first.name, "subset", tuple(members), **fields)
                metrics.append(whole)
            else:
                metrics.append(difference(first.name, list(mean.values()), [], **fields))
        return metrics


def _metric(name: str, task: HarnessTask, measure: Measure) -> Metric:
    label = _words(measure.name) if name == measure.name else f"{_words(measure.name)}, {task.name}"
    fields = {"higher_is_better": measure.higher_is_better, "label": label}
    if measure.aggregation not in AGGREGATIONS:
        return _gap(name, f"the harness sums it up by {measure.aggregation}", fields)
    aggregation = AGGREGATIONS[measure.aggregation]
    columns = [measure.name + part for part in aggregation.parts]
    if aggregation.mean:
        return mean_where(measure.name, name, "subset", (task.name,), **fields)

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        values = scores[columns].to_numpy(dtype=float)
        mine = ((scores["subset"] == task.name) & scores[columns[0]].notna()).to_numpy()
        return np.where(mine[:, None], aggregation.statistics(values), 0.0)

    return Metric(name, statistics, aggregation.value, **fields)


def _gap(name: str, what: str, fields: dict) -> Metric:
    reason = f"{what}, which is no function of sums over examples"
    return Metric(name, lambda scores: np.zeros((len(scores), 1)), _ratio, gap=reason, **fields)


def _words(name: str) -> str:
    return name.replace("_", " ")
