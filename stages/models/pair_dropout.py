"""Dropout inside experts that is the same wherever an expert is computed.

Experts that are modules (Switch Transformers, NLLB-MoE) have dropout between their two matrices.
Its masks would be drawn over the tokens that meet on a rank, in another order and number with
another expert-parallel size, and so would whatever is drawn after them. Here each pair of a token
and an expert gets a key where the token is, drawn there from PyTorch's random state; the key
goes with the token to the rank of its expert, and the pair's mask is a function of it.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
)

from stages.models.families import family

# Shape letters: T tokens, K experts per token, N token-expert pairs, F neurons of an expert.

# Of SplitMix64 (Steele, Lea, Flood 2014): what a counter moves by, then shifts and factors.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


class PairDropout(nn.Dropout):
    """Dropout whose mask of each row is a function of the row's key."""

    keys: torch.Tensor
    """Of the rows of the next call, shape (N,), integers."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shape (N, F), and the same out."""
        if not self.training or self.p == 0:
            return input
        return input * (uniform(self.keys, input.shape[-1]) >= self.p) / (1 - self.p)


def uniform(keys_N: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers from [0, 1), shape (N, width): each row a SplitMix64 that starts at its key."""
    bits = keys_N[:, None] + _STEP * torch.arange(1, width + 1, device=keys_N.device)
    for shift, factor in _MIX:
        bits = (bits ^ _shifted(bits, shift)) * factor
    bits = bits ^ _shifted(bits, 31)
    return (bits & (1 << 24) - 1) / (1 << 24)


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, zeros coming after, as of numbers without a sign."""
    return bits >> by & (1 << 64 - by) - 1


class SwitchExperts(SwitchTransformersExperts):
    """Switch Transformers' experts, whose dropout follows the keys of their tokens."""

    def forward(
        self, hidden_states: torch.Tensor, selected_experts: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As transformers' own."""
        if self.training:
            token, place, chosen = selected_experts.nonzero(as_tuple=True)
            hand_out(self, chosen, self.pair_keys[token, place])
        return super().forward(hidden_states, selected_experts, weights)


def follow_pairs(model: PreTrainedModel) -> None:
    """Let dropout inside experts follow their tokens, in place; before the experts are spread."""
    for experts in family(model).modules(model, "expert").values():
        inside = [
            module
            for name, expert in experts.named_children()
            for module in expert.modules()
            if isinstance(experts, nn.ModuleDict) and name.startswith("expert_")
            and isinstance(module, nn.Dropout) and module.p
        ]  # fmt: skip
        for module in inside:
            module.__class__ = PairDropout
        if inside:
            experts.register_forward_pre_hook(_draw)
            if type(experts) is SwitchTransformersExperts:
                experts.__class__ = SwitchExperts


def _draw(experts: nn.ModuleDict, arguments: tuple) -> None:
    """A key for each of the K places of each of the rank's T tokens, shape (T, K)."""
    hidden, chosen, *_ = arguments
    if experts.training:
        experts.pair_keys = torch.randint(2**63 - 1, chosen.shape[:2], device=hidden.device)


def hand_out(experts: nn.ModuleDict, chosen_N: torch.Tensor, keys_N: torch.Tensor) -> None:
    """Give each expert's dropout the keys of the pairs that the expert is about to compute, which
    stand in the order of the tokens."""
    for expert in chosen_N.unique().tolist():
        for module in experts[f"expert_{expert}"].modules():
            if isinstance(module, PairDropout):
                module.keys = keys_N[chosen_N == expert]


def keys_of(
    experts: nn.ModuleDict, token_N: torch.Tensor, place_N: torch.Tensor
) -> torch.Tensor | None:
    """The keys (N,) of pairs in training; None where the experts have no dropout."""
    keys = getattr(experts, "pair_keys", None) if experts.training else None
    return None if keys is None else keys[token_N, place_N]
