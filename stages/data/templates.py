"""Prompt templates: training and evaluation use the same object, known by its hash.

Placeholders in braces are columns of the task's schema. The labels are the words that follow the
prompt, one per class; they are compared within this closed set. Instructions go through the model's
own chat template, or through the one here.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from stages.data.spec import TASK_COLUMNS, TEMPLATED, Task

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Template:
    """How a row with a label becomes a prompt and its label a continuation.

    A classification head gives one output per label, in the order of ``labels``.
    """

    prompt: str
    labels: dict[str, str]
    """Label of the data to the word that stands for it, with the blank before it."""
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Further words of a label; its probability is the sum over all its words. Training teaches the
    one in ``labels``."""

    def __post_init__(self) -> None:
        if not self.columns or not self._tasks:
            raise ValueError(f"template {self.prompt!r}: no task has the fields {self.columns}")
        if unknown := {*self.synonyms} - {*self.labels}:
            raise ValueError(f"template {self.prompt!r}: synonyms of no label: {unknown}")

    def fill(self, row: Mapping[str, str]) -> str:
        """The prompt of one row. Braces in the row's own text stay what they are."""
        return _PLACEHOLDER.sub(lambda match: row[match[1]], self.prompt)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the prompt names; the first is the one that is cut when too long."""
        return tuple(dict.fromkeys(_PLACEHOLDER.findall(self.prompt)))

    @property
    def task(self) -> Task:
        """The task whose rows it is for."""
        return self._tasks[0]

    @property
    def _tasks(self) -> list[Task]:
        """The labelled tasks whose rows have every column that the prompt names."""
        return [task for task in TASK_COLUMNS if task in TEMPLATED
                and {*self.columns} <= {*TASK_COLUMNS[task]} - {"label"}]

    @property
    def words(self) -> list[tuple[str, str]]:
        """Every label with each of its words, label by label."""
        return [
            (label, word)
            for label, first in self.labels.items()
            for word in (first, *self.synonyms.get(label, ()))
        ]

    @property
    def hash(self) -> str:
        """First 12 hexadecimal digits of the sha256 of the template's content."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]


TEMPLATES: dict[str, Template] = {
    "sentiment": Template(
        prompt="Text: {text}\nSentiment:",
        labels={"negative": " negative", "positive": " positive"},
    ),
    "sentiment_with_neutral": Template(
        prompt="Text: {text}\nSentiment:",
        labels={"negative": " negative", "neutral": " neutral", "positive": " positive"},
    ),
    "toxicity": Template(
        prompt="Text: {text}\nToxicity:",
        labels={"benign": " benign", "toxic": " toxic"},
    ),
    "nli": Template(
        prompt="Premise: {premise}\nHypothesis: {hypothesis}\nDoes the premise entail it?",
        labels={"entailment": " Yes", "neutral": " Maybe", "contradiction": " No"},
    ),
    # For data sets that join neutral and contradiction.
    "nli_binary": Template(
        prompt="Premise: {premise}\nHypothesis: {hypothesis}\nDoes the premise entail it?",
        labels={"entailment": " Yes", "not_entailment": " No"},
    ),
    "paraphrase": Template(
        prompt="First: {sentence1}\nSecond: {sentence2}\nDo both mean the same?",
        labels={"paraphrase": " Yes", "not_paraphrase": " No"},
    ),
}

INSTRUCTION_CHAT = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{% elif message.role == 'user' %}{{ '### Instruction:\n' + message.content + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message.content + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
"""Chat template (Jinja) of a model that is trained on instructions and has none of its own. It is
written beside the checkpoint, so that a model is asked as it was trained. With other words, raise
``FinetuneSpec.VERSION``."""
