"""What each knob of a recipe did, measured while it trained: ``recipe_evidence.json``."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from stages.errors import StageFailed
from stages.finetune.recipe import AUXILIARY_WEIGHTS, VISION_WEIGHTS, Recipe
from stages.finetune.spec import EVIDENCE_FILE, FinetuneSpec

KNOBS = (
    *("learning_rate", "batch_size", "steps", "epochs", "max_length"),
    *("head", "optimizer", "train", "freeze", "lora", "alternate", "auxiliary_loss_weight"),
    *("z_loss_weight", *VISION_WEIGHTS, "router", "experts", "dropout", "adversarial"),
    *("max_nonfinite_steps", "validation", "schedule", "warmup_steps", "warmup_ratio"),
    *("weight_decay", "gradient_clipping", "precision"),
)
"""The fields of a recipe that the evidence covers, one by one where a field is a section."""
MEASURED_IN_STEPS = (
    *AUXILIARY_WEIGHTS,
    *("adversarial", "router.noise", "router.jitter", "router.top_k", "router.capacity"),
    *("router.assignment", "experts.dropout", "experts.drop"),
    *("dropout.residual", "dropout.attention"),
)
"""Knobs whose evidence comes from forward passes; that of the others from the run as a whole."""
ACTIVE = (
    *("learning_rate", "batch_size", "optimizer", "schedule"),
    *("gradient_clipping", "precision"),
)
"""Those of them that do something in every recipe, by default or because each must say."""


class Evidence:
    """Collects measurements of the knobs; means over all that is reported while ``open``.

    It is open for the first optimiser step of a process that is applied, so that measuring costs
    nothing later on.
    """

    def __init__(self):
        self.open = True
        self.facts: dict[str, dict[str, Any]] = defaultdict(dict)
        self._sums: dict[tuple[str, str], list] = defaultdict(lambda: [0.0, 0])

    def note(self, knob: str, **facts: Any) -> None:
        """A fact that is known at once."""
        self.facts[knob] |= facts

    def mean(self, knob: str, what: str, values: torch.Tensor | float) -> None:
        """Part of a mean over the step."""
        if self.open:
            values = torch.as_tensor(values).detach().float()
            entry = self._sums[knob, what]
            entry[0] += values.sum().item()
            entry[1] += values.numel()

    def end_step(self, applied: bool) -> None:
        """Closes with a step that was applied; what a step before it that was not finite measured
        is forgotten."""
        if applied:
            self.open = False
        elif self.open:
            self._sums.clear()

    def measured(self, knob: str) -> dict[str, Any]:
        """All that is known of a knob."""
        means = {what: s / n for (name, what), (s, n) in self._sums.items() if name == knob and n}
        return self.facts.get(knob, {}) | means


def asked(recipe: Recipe) -> dict[str, Any]:
    """The knobs that act: those that a recipe sets to something else than the default, and those
    whose default does something; flat, JSON-ready."""
    found = {}
    given = recipe.model_dump(mode="json")
    for name in KNOBS:
        if name not in ACTIVE and getattr(recipe, name) == Recipe.model_fields[name].default:
            continue
        if name in ("router", "experts", "dropout"):
            section = getattr(recipe, name).model_dump(mode="json", exclude_defaults=True)
            found |= {f"{name}.{key}": value for key, value in section.items()}
        else:
            found[name] = given[name]
    return found


def require(evidence: Evidence, recipe: Recipe) -> None:
    """Raise StageFailed for knobs that a recipe asks for and a whole step left no trace of."""
    idle = [k for k in asked(recipe) if k in MEASURED_IN_STEPS and not evidence.measured(k)]
    if idle:
        raise StageFailed(
            f"{', '.join(idle)}: the first step left no evidence of it, so nothing in this model "
            "is what it acts on; remove it from the recipe"
        )


def write(folder: Path, spec: FinetuneSpec, evidence: Evidence, run: dict[str, Any]) -> None:
    """Write the file: per knob what was asked and what was measured, what was left out because the
    model is dense, and ``run``'s facts about the whole. Of jitter that is the model's own there is
    evidence too, though none was asked for."""
    knobs = asked(spec)
    if evidence.measured("router.jitter"):
        knobs.setdefault("router.jitter", None)
    content = {
        "knobs": {
            knob: {"asked": value, "measured": evidence.measured(knob)}
            for knob, value in knobs.items()
        },
        "not_applicable": {
            knob: {"asked": value, "reason": "only Mixture-of-Experts models have it"}
            for knob, value in spec.dropped.items()
        },
        **run,
    }
    (folder / EVIDENCE_FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
