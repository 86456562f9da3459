"""Prompt templates: training and evaluation use the same object, known by its hash.

Placeholders in braces are columns of the task's schema. The labels are the words that follow the
prompt, one per class; they are compared within this closed set.
"""

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Template:
    """How a classification row becomes a prompt and its label a continuation."""

    prompt: str
    labels: dict[str, str]

    def render(self, text: str) -> str:
        """The prompt for one row's text."""
        return self.prompt.replace("{text}", text)

    @property
    def hash(self) -> str:
        """First 12 hexadecimal digits of the sha256 of the template's content."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


TEMPLATES: dict[str, Template] = {
    "sentiment": Template(
        prompt="Text: {text}\nSentiment:",
        labels={"negative": " negative", "positive": " positive"},
    ),
}
