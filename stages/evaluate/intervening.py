"""Interventions on the experts of a loaded model, whatever it reads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from transformers import PreTrainedModel

from stages.errors import StageFailed
from stages.evaluate.base import Evaluation
from stages.evaluate.probes import WAYS, Interventions
from stages.models import routes
from stages.models.families import family
from stages.models.roles import roles
from stages.models.routes import Policy, hash_of
from stages.models.routing import Routing, weighing
from stages.models.size import measure
from stages.probe.usage import pruned


def refuse_dense(spec: Evaluation, model: PreTrainedModel) -> None:
    """Raise StageFailed for a model without experts."""
    if not family(model).is_moe:
        raise StageFailed(
            f"{spec.kind}: {model.config.model_type} has no experts; name a Mixture-of-Experts "
            "model"
        )


class Intervening:
    """The policies of an evaluation's interventions."""

    spec: Interventions
    model: PreTrainedModel

    @cached_property
    def weigh(self) -> routes.Weigh:
        """The family's rule from logits to weights."""
        return weighing(self.model)

    def policies(
        self, id: str, layers: Sequence[str], used: torch.Tensor | None
    ) -> Iterator[tuple[str, Policy]]:
        """Every intervention on the example of that id but other numbers of experts, by name.

        ``layers`` are the paths of the sparse blocks, ``used`` how often each expert is chosen
        (L, E), which only pruning asks for.
        """
        spec = self.spec
        seed = hash_of(f"{spec.seed}/{id}")
        weigh = self.weigh if spec.weights == "by_logits" else None
        made: dict[str, Callable[[], Policy]] = {
            "next_ranked": lambda: routes.next_ranked(weigh),
            "random": lambda: routes.at_random(seed, weigh),
            "drop_first": routes.without_first,
            "drop_output": routes.without_output,
            "permuted": lambda: routes.permuted(spec.seed),
        }
        for name in spec.substitutions:
            for share in spec.shares:
                yield f"{name}_{share:g}", routes.at_share(made[name](), share, seed)
        for count in spec.prune:
            for which in WAYS:
                gone = pruned(used, layers, count, which, spec.seed)
                yield f"prune_{which}_{count}", routes.masked(gone, self.weigh)

    def other_counts(self) -> Iterator[tuple[str, AbstractContextManager[Policy | None]]]:
        """Every other number of experts per token, by name: a context that sets it and gives the
        policy, where one is needed."""
        for name, count, other_rule in self.spec.counts:
            yield name, routes.another_k(self.model, count, self.weigh if other_rule else None)

    def operations(self) -> dict[str, float]:
        """Operations per token with other numbers of experts, in those of the model as it is."""
        experts, chosen = family(self.model).experts_of(self.model.config.to_dict())
        own, role_of = measure(self.model, "").flops_per_token, roles(self.model)
        every = sum(
            2 * parameter.numel() for name, parameter in self.model.named_parameters()
            if role_of[name] == "expert" and parameter.ndim > 1 and not name.endswith("bias")
        )  # fmt: skip
        return {
            f"top_{count}": 1 + (count - chosen) * every / experts / own
            for count in self.spec.top_k
        }

    def masks(self, routing: Sequence[Routing]) -> Iterator[tuple[str, list[Policy]]]:
        """By layer, the random masks of half its experts that its criticality is measured by."""
        for each in routing if self.spec.random_masks else ():
            experts, found = each.logits.shape[1], []
            for number in range(self.spec.random_masks):
                seed = hash_of(f"{self.spec.seed}/{each.layer}/{number}")
                drawn = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
                gone = {each.layer: drawn[: experts // 2].tolist()}
                found.append(routes.masked(gone, self.weigh))
            yield each.layer, found
