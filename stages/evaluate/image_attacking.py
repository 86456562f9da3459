"""Attacks on images, run on a loaded classifier: the procedure of ``image_attacks``."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from stages.attack import images
from stages.attack.image_objective import Best, Value
from stages.attack.image_spec import AnyImageAttack, Noise, PaperPGD, Transfer
from stages.attack.images import Outcome, attack_images
from stages.errors import StageFailed
from stages.evaluate.image_attacks import (
    SWAPS,
    ImageAttacks,
    checked_without_bound,
    shown,
    variants,
)
from stages.evaluate.showing import Shown
from stages.models.families import family
from stages.models.images import Classifier, ImageProcessor
from stages.models.patches import with_patch_products
from stages.models.routes import Policy, Weigh, imposed
from stages.models.routing import Routing, weighing
from stages.probe.change import chance, choice_changes, routing_changes

UNBOUNDED = 0.5
"""Largest change of a pixel that makes every image the same grey one."""
ALL = slice(None)
_PLAIN = {"routing": "as_is", "importance_loss_weight": 0.0, "gshard_loss_weight": 0.0}


class _Case(NamedTuple):
    """An attack on some images, as a check of another."""

    key: str
    """The name of the check."""
    named: str
    """What its random numbers are drawn for."""
    attack: AnyImageAttack
    budget: float
    among: torch.Tensor
    """The images, a mask (B,)."""


class Attacker(Shown):
    """A classifier and some images under all attacks of an evaluation.

    ``surrogates`` are the models that ``transfer`` attacks, by name. Raises StageFailed for one
    that reads other images or labels than the classifier.
    """

    def __init__(
        self,
        spec: ImageAttacks,
        model: PreTrainedModel,
        processor: ImageProcessor,
        rows: Sequence[dict],
        surrogates: Mapping[str, tuple[PreTrainedModel, ImageProcessor]],
    ):
        super().__init__(spec, model, processor, rows)
        self.surrogates = {}
        for name, (other, reads) in surrogates.items():
            if (reads.size, reads.channels, reads.labels) != (
                processor.size, processor.channels, processor.labels
            ):  # fmt: skip
                raise StageFailed(
                    f"transfer: {name} has other labels or another size of image than the attacked "
                    "model; name one that is trained on the same data"
                )
            self.surrogates[name] = Classifier(with_patch_products(other), reads)
        self.clean, self.routes = self.seen(self.pixels)
        checked = torch.tensor([row["checked"] for row in rows], device=self.labels.device)
        self.checked = checked & (self.clean.argmax(1) == self.labels)
        """Images that attacks are checked on and have something to break."""

    def run(self) -> list[dict]:
        """What every attack did to each image at each budget."""
        noise, rounded = self._noise()
        found = [
            {"prediction": prediction, "noise": noise[i], "noise_bfloat16": rounded[i],
             "chance": self.chance, "attacks": [], "budgets": {}, "checks": {}}
            for i, prediction in enumerate(self.predictions(self.clean))
        ]  # fmt: skip
        standing = {name: [] for name in self.spec.tried}
        for budget in self.spec.budgets:
            worst = Best(self.pixels)
            for name, attack in self.spec.tried.items():
                outcome = self._attack(attack, ALL, budget, self.seeds(name))
                if name in self.spec.counted:
                    value = Value(self.losses(outcome.logits), outcome.logits)
                    worst.update(outcome.images, value, self.labels)
                for result, row in zip(found, self._rows(name, attack, budget, outcome),
                                       strict=True):  # fmt: skip
                    result["attacks"].append(row)
                left = self.checked & (outcome.logits.argmax(1) == self.labels)
                standing[name].append((budget, left))
            for result, row in zip(found, self._exchanged(worst.images, budget), strict=True):
                result["budgets"][shown(budget)] = row
        for name, attack in self.spec.tried.items():
            self._check(name, attack, standing[name], found)
        return found

    @property
    def chance(self) -> float:
        """The routing change of two even random choices; NaN for a dense model."""
        if not self.routes:
            return float("nan")
        first = self.routes[0]  # a member of an ensemble can choose among its own alone
        return chance(int(first.logits[0].isfinite().sum()), first.experts.shape[-1])

    @cached_property
    def weigh(self) -> Weigh | None:
        """The family's rule from logits to weights, where it is known."""
        try:
            return weighing(self.model)
        except StageFailed:
            return None

    def _attack(
        self,
        attack: AnyImageAttack,
        which: torch.Tensor | slice,
        budget: float | torch.Tensor,
        seeds: Sequence[Sequence[int]],
    ) -> Outcome:
        """One attack on some of the images, each with its seeds."""
        partner = None
        if isinstance(attack, Transfer):
            partner = self.surrogates[attack.surrogate.role]
        if not family((partner or self.classifier).model).is_moe:
            given = {f: v for f, v in _PLAIN.items() if f in type(attack).model_fields}
            attack = attack.model_copy(update=given)
        pixels, labels = self.pixels[which], self.labels[which]
        return attack_images(self.classifier, attack, pixels, labels, budget, seeds, partner)

    def _rows(
        self, name: str, attack: AnyImageAttack, budget: float, outcome: Outcome
    ) -> Iterator[dict]:
        """What one attack did at one budget."""
        _, now = self.seen(outcome.images)
        # That work's rule for tokens that no expert took goes with its attack.
        published = isinstance(attack, PaperPGD)
        changes = routing_changes(self.routes, now, len(self.ids), published=published)
        choices = choice_changes(self.routes, now, len(self.ids))
        made = images.rows(
            name, attack, budget, outcome, self.pixels, self.clean, self.labels, self.ids
        )
        for row, change, choice in zip(made, changes, choices, strict=True):
            yield row | {"routing_change": change, "choices": choice}

    def _noise(self) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """The routing change of each image when its mirror image stands beside it in the batch, and
        when the model computes in bfloat16."""
        beside = torch.stack([self.pixels, self.pixels.flip(-1)], dim=1).flatten(0, 1)
        _, batch = self.seen(beside)
        count = len(self.ids)
        own = torch.arange(2 * count, device=beside.device) % 2 == 0
        kept = [
            each.only(own.repeat_interleave(len(each.logits) // (2 * count))) for each in batch
        ]
        with torch.autocast(self.model.device.type, torch.bfloat16):
            _, rounded = self.seen(self.pixels)
        return (
            routing_changes(self.routes, kept, count),
            routing_changes(self.routes, rounded, count),
        )

    def _exchanged(self, attacked: torch.Tensor, budget: float) -> Iterator[dict]:
        """Of the worst images (B, C, H, W) of a budget: the routing change of random perturbations
        of the same size, and predictions under the routes of the other image."""
        one = Noise(norm=self.spec.norm, queries=1)
        drawn = self._attack(one, ALL, budget, self.seeds("random")).images
        random = routing_changes(self.routes, self.seen(drawn)[1], len(self.ids))
        swaps: list[dict[str, str]] = [{} for _ in self.ids]
        now = self.seen(attacked)[1]
        for swap, (pixels, other) in zip(
            SWAPS, ((self.pixels, now), (attacked, self.routes)), strict=True
        ):
            for what, force in self._forces(other):
                logits, _ = self.seen(pixels, force)
                for row, prediction in zip(swaps, self.predictions(logits), strict=True):
                    row[f"{swap}/{what}"] = prediction
        for change, row in zip(random, swaps, strict=True):
            yield {"random": change, "swaps": row}

    def _forces(self, routes: list[Routing]) -> Iterator[tuple[str, Policy]]:
        """Ways to impose some routes, by name: as they are, weighed anew, in one layer alone."""
        if not routes:
            return
        yield "routes", imposed(routes)
        if self.weigh is not None:
            yield "experts", imposed(routes, weigh=self.weigh)
        for each in routes:
            yield each.layer, imposed(routes, layers={each.layer})

    def _check(
        self,
        name: str,
        attack: AnyImageAttack,
        standing: list[tuple[float, torch.Tensor]],
        found: list[dict],
    ) -> None:
        """Whether twice the effort breaks the checked images that the attack left standing at each
        budget, (budget, mask); the others count as broken. And whether it breaks all without a
        bound. One run for each of the attacks made of it, over all budgets."""
        cases = [
            _Case(f"{name}/{shown(budget)}/{key}", named, harder, budget, left)
            for key, (named, harder) in variants(name, attack).items()
            for budget, left in standing
        ]
        if name in self.spec.attacks and checked_without_bound(attack):
            radius = UNBOUNDED
            if attack.norm == "l2":
                radius *= self.pixels[0].numel() ** 0.5
            cases.append(_Case(f"{name}/unbounded", name, attack, radius, self.checked))
        for made in dict.fromkeys(case.attack for case in cases):
            of = [case for case in cases if case.attack == made]
            for case, wrong in zip(of, self._broken(made, of), strict=True):
                broken = ~case.among
                broken[case.among] = wrong
                for row, result, success in zip(self.rows, found, broken.tolist(), strict=True):
                    if row["checked"]:
                        result["checks"][case.key] = success

    def _broken(self, attack: AnyImageAttack, cases: list[_Case]) -> tuple[torch.Tensor, ...]:
        """Which of the images of each case, (their number,), end misclassified."""
        of = [case.among.nonzero().flatten() for case in cases]
        places = torch.cat(of)
        budgets = torch.cat([
            torch.full_like(each, case.budget, dtype=torch.float64)
            for each, case in zip(of, cases, strict=True)
        ])  # fmt: skip
        seeds = [
            self.seeds(case.named)[place]
            for each, case in zip(of, cases, strict=True)
            for place in each.tolist()
        ]
        wrong = torch.zeros_like(places, dtype=torch.bool)
        most = len(self.ids)  # so many fit at once
        for start in range(0, len(places), most):
            part = slice(start, start + most)
            outcome = self._attack(attack, places[part], budgets[part], seeds[part])
            wrong[part] = outcome.logits.argmax(1) != self.labels[places[part]]
        return wrong.split([len(each) for each in of])
