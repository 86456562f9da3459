"""What a gradient attack climbs on a classifier, through or around the choice of experts.

The choice itself has no gradient: a plain attack sees the chosen experts and their weights, never
that another expert could be chosen. The ways to see more are tried side by side, and an example
counts as robust only where none of them succeeds.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch

from stages.attack.image_losses import LOSSES, targeted_ratio
from stages.attack.image_spec import GradientAttack, PaperPGD
from stages.attack.objectives import leaning
from stages.errors import StageFailed
from stages.models.balance import gshard_loss, importance_loss
from stages.models.families import family
from stages.models.images import Classifier
from stages.models.routes import imposed, routed, selected, soft_backward
from stages.models.routing import Routing, weighing


class Value(NamedTuple):
    """An objective at some images."""

    loss: torch.Tensor
    """To be raised, (B,)."""
    logits: torch.Tensor
    """Of the model as it is, (B, labels): what success is judged by."""


class Objective:
    """The loss that an attack raises for some images (B, C, H, W) and labels (B,).

    ``targets`` (B,) are labels to be reached by the targeted ratio instead. Raises StageFailed for
    a way of routing that the model does not have.
    """

    def __init__(
        self,
        classifier: Classifier,
        attack: GradientAttack | PaperPGD,
        clean: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor | None = None,
    ):
        self.classifier, self.labels, self.targets = classifier, labels, targets
        self.attack, self.gradients, self.forwards = attack, 0, 0
        self.routing = getattr(attack, "routing", "as_is")
        self.auxiliary = {
            importance_loss: attack.importance_loss_weight,
            gshard_loss: attack.gshard_loss_weight,
        }
        self.through = self.routing != "as_is" or any(self.auxiliary.values())
        entry = family(classifier.model) if self.through else None
        if entry and (not entry.is_moe or entry.index is None):
            raise StageFailed(
                f"{entry.model_type} has no choice of experts to attack; set routing: as_is and no "
                "auxiliary loss"
            )
        self.force, self.used, self.weigh = None, {}, None
        if self.routing in ("frozen", "soft"):
            self.weigh = weighing(classifier.model)
        if self.routing in ("frozen", "targeted", "joint"):
            with torch.no_grad(), routed(classifier.model) as routes:
                self._run(clean)
            self.used = {routing.layer: selected(routing) for routing in routes}
            if self.routing == "frozen":
                self.force = imposed(routes, weigh=self.weigh)

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        self.forwards += len(images)
        return self.classifier(images)

    @contextmanager
    def _routed(self) -> Iterator[list[Routing]]:
        """What happens to routing during the forward pass that has a gradient, and what it was."""
        if not self.through:
            yield []
            return
        model = self.classifier.model
        soft = self.routing == "soft"
        backward = soft_backward(model, self.weigh) if soft else nullcontext()
        with backward, routed(model, self.force) as routes:
            yield routes

    def _towards_other_experts(self, seen: list[Routing]) -> torch.Tensor:
        """How much the routers lean away from the clean image's experts, mean over tokens and
        layers, (B,)."""
        gains = [leaning(routing.logits, self.used[routing.layer]) for routing in seen]
        return torch.stack(gains).mean(0).unflatten(0, (len(self.labels), -1)).mean(1)

    def __call__(self, images: torch.Tensor) -> Value:
        """The loss, through which a gradient flows, and the logits of the model as it is."""
        with self._routed() as seen:
            logits = self._run(images)
        if self.routing == "targeted":
            loss = self._towards_other_experts(seen)
        elif self.targets is not None:
            loss = targeted_ratio(logits, self.labels, self.targets)
        else:
            loss = LOSSES[getattr(self.attack, "loss", "ce")](logits, self.labels)
        if self.routing == "joint":
            loss = loss + self.attack.routing_weight * self._towards_other_experts(seen)
        for auxiliary, weight in self.auxiliary.items():
            if weight:
                # One number for the batch; so its gradient is that of mean loss plus auxiliary.
                loss = loss + weight * auxiliary(seen)
        if self.routing == "frozen":
            with torch.no_grad():
                logits = self._run(images)
        return Value(loss, logits.detach())

    def climb(self, images: torch.Tensor) -> tuple[Value, torch.Tensor]:
        """The objective at some images, and its gradient (B, C, H, W), 0 where it is no number."""
        images = images.detach().requires_grad_()
        value = self(images)
        self.gradients += len(images)
        (gradient,) = torch.autograd.grad(value.loss.sum(), images)
        return Value(value.loss.detach(), value.logits), gradient.nan_to_num(0.0, 0.0, 0.0)


class Best:
    """The best images of each example so far: misclassified before not, then the highest loss."""

    def __init__(self, images: torch.Tensor):
        self.images = images.clone()
        self.loss = torch.full((len(images),), -torch.inf, device=images.device)
        self.wrong = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self.logits: torch.Tensor | None = None

    def update(
        self,
        images: torch.Tensor,
        value: Value,
        labels: torch.Tensor,
        among: torch.Tensor | None = None,
    ) -> None:
        """Take up what is better than what there was.

        ``images`` and ``value`` are those of all examples, or of those that the mask (B,) names.
        """
        if self.logits is None:
            self.logits = value.logits.clone()
        if among is None:
            among = torch.ones_like(self.wrong)
        wrong = value.logits.argmax(1) != labels[among]
        before = self.wrong[among]
        better = (wrong & ~before) | ((wrong == before) & (value.loss > self.loss[among]))
        place = among.nonzero()[better, 0]
        self.images[place] = images[better].detach()
        self.loss[place], self.logits[place] = value.loss[better], value.logits[better]
        self.wrong[place] = wrong[better]
