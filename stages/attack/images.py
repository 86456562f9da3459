"""Several attacks on one classifier's images, and what each example stood.

Every attack sees the same examples, so that attacks and models are compared example by example, and
the worst case is a minimum over attacks for each example, never of their means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stages.attack.apgd import apgd
from stages.attack.image_geometry import Draws, same, sizes
from stages.attack.image_objective import Best, Objective, Value
from stages.attack.image_spec import (
    APGD,
    PGD,
    AnyImageAttack,
    Noise,
    PaperPGD,
    Square,
    Transfer,
)
from stages.attack.pgd import paper_pgd, pgd
from stages.attack.square import noise, square
from stages.errors import StageFailed
from stages.models.images import Classifier


@dataclass(frozen=True)
class Outcome:
    """What an attack made of some examples; all tensors lie on the model's device."""

    images: torch.Tensor
    """Adversarial images, (B, C, H, W)."""
    logits: torch.Tensor
    """The attacked model's logits on them, (B, labels)."""
    gradients: int
    """Gradient evaluations of each example."""
    forwards: torch.Tensor
    """Forward passes of each example, (B,), those of the gradients among them."""
    zero_gradient: torch.Tensor
    """Share of the clean image's pixels whose gradient is exactly zero, (B,); NaN where the attack
    uses none."""


def attack_images(
    classifier: Classifier,
    attack: AnyImageAttack,
    clean: torch.Tensor,
    labels: torch.Tensor,
    budget: float | torch.Tensor,
    seeds: Sequence[Sequence[int]],
    partner: Classifier | None = None,
) -> Outcome:
    """Attack images (B, C, H, W) in [0, 1] with labels (B,), within one budget or one for each.

    ``seeds`` are those of each example's random numbers: the same example gets the same ones in any
    batch. ``partner`` is the model that ``transfer`` attacks. The model is in evaluation mode and
    float32; its parameters get no gradients. Raises StageFailed for an attack that the model or
    its labels do not allow.
    """
    draws, count = Draws(seeds), len(clean)
    if not isinstance(budget, torch.Tensor):
        budget = same(budget, clean)
    unknown = torch.full((count,), torch.nan, device=clean.device)
    if isinstance(attack, Square):
        best, queries = square(classifier, attack, clean, labels, budget, draws)
        return Outcome(best.images, best.logits, 0, queries, unknown)
    if isinstance(attack, Noise):
        best = noise(classifier, attack, clean, labels, budget, draws)
        queries = torch.full_like(labels, attack.queries)
        return Outcome(best.images, best.logits, 0, queries, unknown)
    attacked = classifier
    if isinstance(attack, Transfer):
        if partner is None:
            raise StageFailed("transfer: there is no partner to attack; pair the model")
        attacked = partner
    best, objectives = _by_gradient(attacked, attack, clean, labels, budget, draws)
    gradients = sum(objective.gradients for objective in objectives) // count
    forwards = sum(objective.forwards for objective in objectives) // count
    # Of the first objective: it is the same function for all restarts.
    zero = (objectives[0].climb(clean)[1] == 0).float().flatten(1).mean(1)
    logits = best.logits
    if isinstance(attack, Transfer):
        with torch.no_grad():
            logits = classifier(best.images)
    return Outcome(best.images, logits, gradients, torch.full_like(labels, forwards), zero)


def _by_gradient(
    classifier: Classifier,
    attack: AnyImageAttack,
    clean: torch.Tensor,
    labels: torch.Tensor,
    budget: torch.Tensor,
    draws: Draws,
) -> tuple[Best, list[Objective]]:
    if isinstance(attack, APGD) and attack.targets:
        return _targeted(classifier, attack, clean, labels, budget, draws)
    objective = Objective(classifier, attack, clean, labels)
    if isinstance(attack, PaperPGD):
        return paper_pgd(objective, attack, clean, budget), [objective]
    if isinstance(attack, PGD):
        return pgd(objective, attack, clean, budget, draws), [objective]
    return _apgd(objective, attack, clean, budget, draws), [objective]


def _targeted(
    classifier: Classifier,
    attack: APGD,
    clean: torch.Tensor,
    labels: torch.Tensor,
    budget: torch.Tensor,
    draws: Draws,
) -> tuple[Best, list[Objective]]:
    """One run per wrong label, the most probable first."""
    with torch.no_grad():
        others = classifier(clean).scatter(1, labels[:, None], -torch.inf)
    ranked = others.argsort(dim=1, descending=True)[:, : min(attack.targets, others.shape[1] - 1)]
    best, objectives = Best(clean), []
    for target in ranked.T:
        objectives.append(Objective(classifier, attack, clean, labels, target))
        found = _apgd(objectives[-1], attack, clean, budget, draws)
        best.update(found.images, Value(found.loss, found.logits), labels)
    return best, objectives


def _apgd(
    objective: Objective,
    attack: APGD | Transfer,
    clean: torch.Tensor,
    budget: torch.Tensor,
    draws: Draws,
) -> Best:
    return apgd(
        objective,
        clean,
        norm=attack.norm,
        budget=budget,
        steps=attack.steps,
        restarts=attack.restarts,
        draws=draws,
    )


def rows(
    name: str,
    attack: AnyImageAttack,
    budget: float,
    outcome: Outcome,
    clean: torch.Tensor,
    clean_logits: torch.Tensor,
    labels: torch.Tensor,
    ids: Sequence[str],
) -> list[dict]:
    """One row per example, ready for Parquet.

    ``robust`` is 1 where the attacked prediction is the label; for all attacks but the paper's that
    never holds where the clean one is wrong. ``distance`` is the perturbation's norm.
    """
    before, after = clean_logits.argmax(1), outcome.logits.argmax(1)
    robust = after == labels
    if not isinstance(attack, PaperPGD):
        robust &= before == labels
    columns = {
        "clean_prediction": before,
        "prediction": after,
        "clean_correct": (before == labels).float(),
        "robust": robust.float(),
        "prediction_changed": (before != after).float(),
        "clean_loss": torch.nn.functional.cross_entropy(clean_logits, labels, reduction="none"),
        "loss": torch.nn.functional.cross_entropy(outcome.logits, labels, reduction="none"),
        "distance": sizes(outcome.images - clean, attack.norm),
        "forwards": outcome.forwards,
        "zero_gradient": outcome.zero_gradient,
    }
    values = {key: column.tolist() for key, column in columns.items()}
    same = {
        "attack": name,
        "kind": attack.kind,
        "norm": attack.norm,
        "budget": budget,
        "gradients": outcome.gradients,
    }
    return [
        {"id": id, **same, **{key: column[i] for key, column in values.items()}}
        for i, id in enumerate(ids)
    ]


def worst_case(found: Sequence[Mapping]) -> dict[tuple[str, str, float], float]:
    """Per example, norm and budget, 1 where no attack succeeded, from ``rows``."""
    worst: dict[tuple[str, str, float], float] = {}
    for row in found:
        key = row["id"], row["norm"], row["budget"]
        worst[key] = min(worst.get(key, 1.0), row["robust"])
    return worst
