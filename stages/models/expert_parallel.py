"""Expert parallelism on Hugging Face models: only the experts change, in place.

Of a sparse layer, the module that holds the routed experts keeps its path, its hooks and the names
of its parameters; it loses the experts of the other ranks, and its forward pass exchanges tokens by
DeepSpeed's all-to-all before and after the family's own computation. Router, shared experts,
auxiliary loss and whatever hooks on them stay Hugging Face's own, so that every architecture whose
experts are called with the tokens and their routing is exact by construction, whatever its router,
activation, biases or weight layout.

``convert`` before ``deepspeed.initialize`` does it; ``block_check`` proves that each block still
computes the same; ``gather_state_dict`` undoes it for export.
"""

from collections.abc import Iterator
from functools import cache

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep_layer import (
    AutoEPMoELayer,
    _AllToAllV,
    compute_split_plan,
)
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import groups
from torch import nn
from transformers import PreTrainedModel
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

from stages.errors import StageFailed
from stages.models.families import family
from stages.models.nllb_moe import Experts as NllbMoeExperts
from stages.models.pair_dropout import keys_of

# Shape letters: T tokens of this rank, K experts per token, D hidden size, N token-expert pairs.


def entries(parameter: nn.Parameter) -> int:
    """How many entries a parameter has, also while ZeRO stage 3 keeps it with other ranks."""
    return getattr(parameter, "ds_numel", parameter.numel())


class ExpertParallel(AutoEPMoELayer):
    """Mixed into the class of an experts module (``MixtralExperts`` and the like) by ``convert``.

    The arguments of ``forward`` are those of the family, for the tokens of this rank and with the
    numbers of all experts, so a pre-hook sees and may change the same as without parallelism. The
    base class is never initialised: being one of its kind is how DeepSpeed's engine recognises a
    sparse layer, binds the process groups and treats the parameters as experts'.
    """

    ep_group: torch.distributed.ProcessGroup
    ep_group_name: str
    ep_size: int
    ep_rank: int
    all_experts: int

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs, shape (T, D).

        ``hidden_states`` (T, D), ``top_k_index`` (T, K) and ``top_k_weights`` (T, K) as in
        transformers' fused experts.
        """
        chosen = top_k_index.flatten()
        order = torch.argsort(chosen, stable=True)
        pairs_ND = self._exchange(hidden_states[order // top_k_index.shape[1]], chosen[order])
        pairs_TKD = pairs_ND[torch.argsort(order)].unflatten(0, top_k_index.shape)
        output_TD = (pairs_TKD * top_k_weights.unsqueeze(-1)).sum(dim=1)
        return output_TD.to(hidden_states.dtype)

    def _exchange(
        self, tokens_ND: torch.Tensor, expert_N: torch.Tensor, keys_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The output (N, D) of each pair's expert, unweighted; pairs are sorted by expert.

        ``keys_N`` are what dropout inside the experts follows, where they have some.
        """
        local = self.all_experts // self.ep_size
        plan = compute_split_plan(expert_N, self.all_experts, self.ep_size, local, self.ep_group)
        there, back = plan.input_splits, plan.output_splits
        received = _AllToAllV.apply(self.ep_group, tokens_ND, there, back)
        ids = torch.arange(local, device=received.device).repeat(self.ep_size)
        ids = ids.repeat_interleave(plan.local_counts_by_source.flatten())
        pairs = len(ids)
        if pairs == 0:
            # One empty token, or this rank would have nothing to call the backward exchange with.
            received = torch.cat([received, received.new_zeros(1, received.shape[1])])
            ids = ids.new_zeros(1)
        if keys_N is not None:
            keys = _AllToAllV.apply(self.ep_group, keys_N[:, None], there, back)
            self.pair_keys = keys if pairs else keys.new_zeros(1, 1)
        output = self._compute(received, ids)[:pairs]
        return _AllToAllV.apply(self.ep_group, output, back, there)

    def _compute(self, tokens_ND: torch.Tensor, local_N: torch.Tensor) -> torch.Tensor:
        """The family's own computation, one local expert for each token, with weight 1."""
        ones = tokens_ND.new_ones(len(tokens_ND), 1)
        # Next to AutoEPMoELayer in the order of the base classes stands the family's own class.
        return super(AutoEPMoELayer, self).forward(tokens_ND, local_N[:, None], ones)

    def keep_local(self) -> None:
        """Drop the experts of other ranks; the remaining ones are copies, to free the memory."""
        local = self.all_experts // self.ep_size
        for parameter in self.parameters():
            own = parameter.data[self.ep_rank * local : (self.ep_rank + 1) * local]
            parameter.data = own.clone()
        self.num_experts = local

    def extent(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Where a parameter's first entry stands among those of all ranks under the same name, and
        how many entries they have together."""
        return self.ep_rank * entries(parameter), self.ep_size * entries(parameter)

    def gathered(self, key: str, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """A parameter of all experts by its name, from the same one of each rank of the group."""
        return {key: torch.cat(parts)}


class ExpertParallelModules(ExpertParallel):
    """The same for experts that are modules of their own, ``expert_0`` and so on, each with the
    number that it has among all experts, and routed by a mask (Switch Transformers)."""

    def forward(
        self, hidden_states: torch.Tensor, selected_experts: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs, shape (T, D).

        ``hidden_states`` (T, D), ``selected_experts`` (T, 1, experts), 1 where a token goes to an
        expert and nowhere 1 for a token beyond the capacity, ``weights`` (T, 1).
        """
        token, place, chosen = selected_experts.nonzero(as_tuple=True)
        keys = keys_of(self, token, place)
        return self._sum(hidden_states, token, chosen, weights[token], keys)

    def _sum(
        self,
        hidden_states: torch.Tensor,
        token_N: torch.Tensor,
        chosen_N: torch.Tensor,
        weights_N1: torch.Tensor,
        keys_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """The weighted sum (T, D) over N pairs of a token and an expert in any order."""
        order = torch.argsort(chosen_N, stable=True)
        token_N, keys_N = token_N[order], None if keys_N is None else keys_N[order]
        pairs_ND = self._exchange(hidden_states[token_N], chosen_N[order], keys_N)
        pairs_ND = pairs_ND * weights_N1[order]
        return torch.zeros_like(hidden_states).index_add(
            0, token_N, pairs_ND.to(hidden_states.dtype)
        )

    def _compute(self, tokens_ND: torch.Tensor, local_N: torch.Tensor) -> torch.Tensor:
        first = self.ep_rank * (self.all_experts // self.ep_size)
        mask = F.one_hot(first + local_N, self.all_experts)[:, None]
        ones = tokens_ND.new_ones(len(tokens_ND), 1)
        return super(AutoEPMoELayer, self).forward(tokens_ND, mask, ones)

    def keep_local(self) -> None:
        """Drop the experts of other ranks."""
        local = self.all_experts // self.ep_size
        for expert in range(self.all_experts):
            if expert // local != self.ep_rank:
                del self[f"expert_{expert}"]

    def extent(self, parameter: nn.Parameter) -> tuple[int, int]:
        """No other rank has a parameter of this name."""
        return 0, entries(parameter)

    def gathered(self, key: str, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """A parameter of one expert of each rank, by their names."""
        expert, _, name = key.removeprefix("expert_").partition(".")
        local = self.all_experts // self.ep_size
        first = int(expert) % local
        return {f"expert_{first + rank * local}.{name}": t for rank, t in enumerate(parts)}


class ExpertParallelNumbered(ExpertParallelModules):
    """The same for experts that are modules and called with their numbers (NLLB-MoE)."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As of fused experts; what has the weight 0 is sent to no rank."""
        weights = self.masked(top_k_weights)
        token, place = weights.nonzero(as_tuple=True)
        chosen = top_k_index[token, place]
        keys = keys_of(self, token, place)
        return self._sum(hidden_states, token, chosen, weights[token, place, None], keys)

    def _compute(self, tokens_ND: torch.Tensor, local_N: torch.Tensor) -> torch.Tensor:
        first = self.ep_rank * (self.all_experts // self.ep_size)
        ones = tokens_ND.new_ones(len(tokens_ND), 1)
        return self.weighted_sum(tokens_ND, first + local_N[:, None], ones)


class ExpertParallelSorted(ExpertParallel):
    """The same for one matrix of each expert, applied to tokens that the caller has sorted
    (JetMoE, whose sparse layers call two of them one after the other)."""

    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        """The product of each input (N, in) with its expert's matrix, shape (N, out).

        The first ``expert_size[0]`` inputs are for expert 0, and so on.
        """
        sizes = torch.tensor(expert_size, device=inputs.device)
        experts = torch.arange(self.all_experts, device=inputs.device)
        return self._exchange(inputs, experts.repeat_interleave(sizes))

    def _compute(self, tokens_ND: torch.Tensor, local_N: torch.Tensor) -> torch.Tensor:
        order = torch.argsort(local_N, stable=True)
        sizes = torch.bincount(local_N, minlength=self.num_experts).tolist()
        output = super(AutoEPMoELayer, self).forward(tokens_ND[order], sizes)
        return output[torch.argsort(order)]


@cache
def _parallel_class(kind: type[nn.Module]) -> type[ExpertParallel]:
    mixin = ExpertParallelModules if issubclass(kind, nn.ModuleDict) else ExpertParallel
    if kind is JetMoeParallelExperts:
        mixin = ExpertParallelSorted
    elif kind is NllbMoeExperts:
        mixin = ExpertParallelNumbered
    return type(f"ExpertParallel{kind.__name__}", (mixin, kind), {})


@torch.no_grad()
def convert(model: PreTrainedModel, size: int, *, grouped_mm: bool) -> None:
    """Spread the routed experts of a model over groups of ``size`` ranks, in place.

    Called by every rank, after DeepSpeed's process group is there and before
    ``deepspeed.initialize``; the parameters stay the same objects. ``grouped_mm`` computes the
    experts of a rank by one grouped matrix product, otherwise one after the other (as do always
    the families whose experts are not fused).

    Raises StageFailed when the family is refused, or ``size`` does not divide its experts.
    """
    entry = family(model)
    if entry.no_expert_parallel:
        raise StageFailed(
            f"expert_parallel: refused for {entry.model_type}: {entry.no_expert_parallel}; set "
            "expert_parallel to 1"
        )
    experts = getattr(model.config, entry.num_experts)
    if experts % size:
        raise StageFailed(f"expert_parallel: {size} does not divide the model's {experts} experts")
    name = f"ep_size_{size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm" if grouped_mm else "eager")
    for module in entry.modules(model, "expert").values():
        module.__class__ = _parallel_class(type(module))
        module.all_experts, module.ep_size, module.ep_group_name = experts, size, name
        module.ep_group = groups._get_expert_parallel_group(name)
        module.ep_rank = groups._get_expert_parallel_rank(name)
        module.keep_local()
        for parameter in module.parameters():
            # What DeepSpeed's engine and ZeRO know an expert's parameter by.
            parameter.allreduce = False
            parameter.group_name = parameter.ds_zero_partition_group_name = name
            parameter.ds_zero_placement_family = "autoep_expert"


@torch.no_grad()
def gather_state_dict(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The state dict with all experts on the CPU of rank 0, None elsewhere.

    Called by every rank; the experts of rank 0's expert-parallel group are gathered one parameter
    at a time.
    """
    leader = dist.get_rank() == 0
    state = {key: t.cpu() for key, t in _whole(model) if leader}
    for path, module in model.named_modules():
        if not isinstance(module, ExpertParallel):
            continue
        for key, local in _whole(module):
            if 0 not in torch.distributed.get_process_group_ranks(module.ep_group):
                continue
            local = local.contiguous()
            parts = [torch.empty_like(local) for _ in range(module.ep_size)] if leader else None
            torch.distributed.gather(local, parts, dst=0, group=module.ep_group)
            if leader:
                complete = module.gathered(key, [part.cpu() for part in parts])
                state.update({f"{path}.{name}": t for name, t in complete.items()})
    return state if leader else None


def _whole(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's state dict; what ZeRO stage 3 has partitioned is gathered, one at a time."""
    for key, tensor in module.state_dict(keep_vars=True).items():
        partitioned = hasattr(tensor, "ds_id")
        with GatheredParameters([tensor], enabled=partitioned):
            yield key, tensor.detach().clone() if partitioned else tensor.detach()
