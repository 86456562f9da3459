"""What a run tells about itself while it trains: load of the experts, entropy, speed."""

import re
from collections.abc import Iterable

import torch

from stages.models.routing import Routing, probabilities

PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 operations per second, from the vendors' data sheets, by a part of the device name."""


class RoutingTelemetry:
    """Sums over the forward passes of one optimiser step, per sparse layer.

    ``scores`` are those of the model's family, of which the entropy is taken.
    """

    def __init__(self, scores: str):
        self.scores = scores
        self.layers: list[str] = []
        self.sums: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, routings: Iterable[Routing]) -> None:
        """Take up one forward pass: per layer the loads (E), tokens, their entropy, dropped
        choices."""
        rows = []
        for routing in routings:
            entropy = torch.special.entr(probabilities(routing.logits, self.scores)).sum()
            dropped = (routing.weights == 0).sum()
            tokens = entropy.new_tensor(len(routing.logits))
            rest = torch.stack([tokens, entropy, dropped.to(entropy)])
            rows.append(torch.cat([load(routing.experts, routing).to(entropy), rest]))
        if rows:
            self.layers = [_name(routing.layer) for routing in routings]
            summed = torch.stack(rows).double()
            self.sums = summed if self.sums is None else self.sums + summed

    def row(self) -> dict[str, float | dict[str, float | list[float]]]:
        """The step's columns, the same on every rank; called by every rank.

        ``router_entropy`` in nats, ``expert_load_variation`` (coefficient of variation) and
        ``dropped_choices`` (share of token-expert choices whose output did not count) as means over
        the layers, and each of them ``_by_layer``, with ``expert_load``, the experts' shares.
        """
        if self.sums is None:
            return {}
        torch.distributed.all_reduce(self.sums)
        loads, (tokens, entropy, dropped) = self.sums[:, :-3], self.sums[:, -3:].T
        per_layer = {
            "router_entropy": entropy / tokens,
            "expert_load_variation": load_variation(loads),
            "dropped_choices": dropped / loads.sum(-1),
        }
        found: dict = {name: values.mean().item() for name, values in per_layer.items()}
        per_layer["expert_load"] = loads / loads.sum(-1, keepdim=True)
        for name, values in per_layer.items():
            found[f"{name}_by_layer"] = dict(zip(self.layers, values.tolist(), strict=True))
        return found


def _name(path: str) -> str:
    """``layer_3`` and what tells it from a router of the same number: member of an ensemble, stack
    of an encoder-decoder, and whether it routes attention; the path where it is no layer's."""
    numbers, parts = re.findall(r"[0-9]+", path), path.split(".")
    if not numbers:
        return path
    if parts[0] != "members":
        numbers = numbers[:1]
    stack = next((f"{part}_" for part in ("encoder", "decoder") if part in parts), "")
    attention = "_attention" if any(part.startswith(("attn", "self_att")) for part in parts) else ""
    return f"{stack}layer_{'_'.join(numbers)}{attention}"


def load(experts: torch.Tensor, routing: Routing) -> torch.Tensor:
    """How often each expert was chosen, shape (E,)."""
    return torch.bincount(experts.flatten(), minlength=routing.logits.shape[-1])


def load_variation(loads: torch.Tensor) -> torch.Tensor:
    """Coefficient of variation of the experts' loads (..., E): standard deviation over mean."""
    loads = loads.float()
    return loads.std(-1, correction=0) / loads.mean(-1)


def model_flops_utilisation(
    forward_flops_per_second: float, precision: str, workers: int
) -> float | None:
    """Share of the devices' peak that the model's own operations make up; None where the peak is
    not known. A training step counts three forward passes (backward is twice one); attention
    scores are left out, as in the model's card."""
    if not torch.cuda.is_available() or precision != "bf16":
        return None
    name = torch.cuda.get_device_name()
    peak = next((flops for part, flops in PEAK_BF16_FLOPS.items() if part in name), None)
    return None if peak is None else 3 * forward_flops_per_second / (peak * workers)
