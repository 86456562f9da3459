"""What a gradient attack on a text climbs, through or around the choice of experts; and what one on
a text or an image climbs to change that choice."""

from contextlib import nullcontext

import torch

from stages.attack.questions import LOSSES, Question, Victim, margin, tokens_of
from stages.attack.text_spec import GradientAttack
from stages.models.routes import Policy, imposed, selected, soft_backward
from stages.models.routing import Routing, weighing


class Objective:
    """The loss of one question, to be raised; made from the clean input.

    Called with embeddings (B, n, D), returns the loss (B,) with its graph, and the margin (B,) of
    the model as it is, by which success is judged.
    """

    def __init__(self, victim: Victim, question: Question, attack: GradientAttack):
        self.victim, self.question, self.attack = victim, question, attack
        self.routing = attack.routing if victim.moe else "as_is"
        self.clean = victim.table[question.tokens]
        self.routes: list[Routing] = []
        if self.routing in ("frozen", "targeted", "joint"):
            with torch.no_grad():
                self.routes = victim.routes(self.clean[None], question)[1]
        self.weigh = weighing(victim.model) if self.routing in ("frozen", "soft") else None

    def __call__(self, embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and margin, each (B,)."""
        victim, question = self.victim, self.question
        soft = self.routing == "soft"
        backward = soft_backward(victim.model, self.weigh) if soft else nullcontext()
        if self.routing in ("targeted", "joint"):
            logprobs, now = victim.routes(embedded, question)
            surrogate = routing_loss(self.routes, now, len(embedded), embedded.shape[1])
        else:
            with backward:
                logprobs = victim.logprobs(embedded, question)
        reached = margin(logprobs.detach(), question)
        if self.routing == "targeted":
            return surrogate, reached
        if self.routing == "frozen":
            logprobs, _ = victim.routes(embedded, question, self._frozen(len(embedded)))
        loss = LOSSES[self.attack.loss](logprobs, question)
        if self.routing == "joint":
            loss = loss + self.attack.routing_weight * surrogate
        return loss, reached

    def _frozen(self, inputs: int) -> Policy:
        return imposed([repeated(routing, inputs) for routing in self.routes], weigh=self.weigh)


def repeated(routing: Routing, inputs: int) -> Routing:
    """The routes of one input for so many equal ones."""
    return routing.change(
        experts=routing.experts.repeat(inputs, 1), weights=routing.weights.repeat(inputs, 1)
    )


def routing_loss(
    clean: list[Routing], now: list[Routing], inputs: int, length: int
) -> torch.Tensor:
    """How much the routers lean away from the clean choice (``leaning``), averaged over tokens and
    blocks, (B,)."""
    losses = []
    for before, after in zip(clean, now, strict=True):
        chosen = selected(tokens_of(before, 1, length)).repeat(inputs, 1)
        found = leaning(tokens_of(after, inputs, length).logits, chosen)
        losses.append(found.view(inputs, length).mean(-1))
    return torch.stack(losses).mean(0)


def leaning(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """How much routers lean away from some experts, (T,): the mean logit (T, E) of the others minus
    that of those ``chosen`` (T, E), booleans. An expert at -inf, which the token cannot have, is
    none of them.

    Sums in the place of the means would count the others E - K times and the chosen ones K times:
    such a loss grows with the number of experts, and the push away from the chosen ones is lost in
    it.
    """
    there = logits.isfinite()
    values = logits.float().masked_fill(~there, 0.0)
    other, chosen = ~chosen & there, chosen & there
    of_chosen = (values * chosen).sum(-1) / chosen.sum(-1).clamp(min=1)
    return (values * other).sum(-1) / other.sum(-1).clamp(min=1) - of_chosen
