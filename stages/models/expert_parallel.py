"""Expert parallelism: DeepSpeed's AutoEP on Hugging Face models, checked block by block.

``deepspeed.initialize`` replaces each sparse block by one that holds the experts of its rank and
exchanges tokens by all-to-all. ``observe_blocks`` before and ``check_blocks`` after it make sure
that the replacement computes the same function; ``gather_state_dict`` undoes it for export.
"""

import dataclasses

import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets import base, registry
from torch import nn
from transformers import PreTrainedModel

from stages.errors import StageFailed
from stages.models.families import family

# DeepSpeed ships no preset for OLMoE, and its pattern keys alone would lose the router logits that
# the auxiliary loss needs.
registry.PRESET_MODELS["olmoe"] = dataclasses.replace(
    registry.PRESET_MODELS["mixtral"],
    num_experts_attr="num_experts",
    route_norm=False,
    preset_adapter="olmoe",
    hf_model_types=("olmoe",),
)
registry._PRESET_ADAPTERS["olmoe"] = base.TransformersTopLevelRouterLogitsAdapter(
    display_name="OLMoE", hf_model_types=("olmoe",), class_name_fragments=("Olmoe",)
)

PROBE_TOKENS = 16


@torch.no_grad()
def observe_blocks(model: PreTrainedModel, size: int) -> dict[str, torch.Tensor]:
    """Output of each sparse block, by its path, on fixed random hidden states of shape (1, 16, D).

    Raises StageFailed when the model has no sparse block, or experts that ``size`` does not divide.
    """
    entry = family(model)
    if registry.preset_name_for_hf_model_type(entry.model_type) is None:
        known = ", ".join(
            sorted(t for p in registry.PRESET_MODELS.values() for t in p.hf_model_types)
        )
        raise StageFailed(
            f"expert_parallel: DeepSpeed has no preset for model_type {entry.model_type!r} "
            f"(known: {known}); set expert_parallel to 1"
        )
    experts = getattr(model.config, entry.num_experts)
    if experts % size:
        raise StageFailed(f"expert_parallel: {size} does not divide the model's {experts} experts")
    return {
        path: _output(model.get_submodule(path), model.config.hidden_size)
        for path in (path.rpartition(".")[0] for path in entry.modules(model, "expert"))
    }


@torch.no_grad()
def check_blocks(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Compare every converted block with what it computed before; called by every rank.

    In fp32 no token may differ by more than 1e-5 of the block's largest output. bf16 rounds a few
    tokens onto other experts, so there half of them must agree within 5 %.
    """
    for path, expected in before.items():
        block = model.get_submodule(path)
        if not isinstance(block, AutoEPMoELayer):
            raise StageFailed(
                f"{path}: DeepSpeed left this sparse block as it is; set expert_parallel to 1"
            )
        output = _output(block, expected.shape[-1])
        tokens = (output.float() - expected.to(output.device)).abs().amax(dim=-1)
        fp32 = output.dtype == torch.float32
        difference = (tokens.max() if fp32 else tokens.median()) / expected.abs().max()
        # All ranks raise together, for a rank that goes on alone would wait for ever.
        torch.distributed.all_reduce(difference, op=torch.distributed.ReduceOp.MAX)
        if not difference <= (1e-5 if fp32 else 0.05):
            raise StageFailed(
                f"{path}: the expert-parallel block differs from the original by "
                f"{difference:.1e} of its largest output; set expert_parallel to 1"
            )


def _output(block: nn.Module, hidden_size: int) -> torch.Tensor:
    weight = next(block.parameters())
    probe = torch.randn((1, PROBE_TOKENS, hidden_size), generator=torch.Generator().manual_seed(0))
    output = block(probe.to(weight))
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def gather_state_dict(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The state dict in the original Hugging Face layout on the CPU of rank 0, None elsewhere.

    Called by every rank; the experts of rank 0's expert-parallel group are gathered layer by layer.
    """
    entry = family(model)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, AutoEPMoELayer)}
    state: dict[str, torch.Tensor] = {}
    if dist.get_rank() == 0:
        state |= {
            key: tensor.cpu()
            for key, tensor in model.state_dict().items()
            if not any(key.startswith(f"{path}.") for path in layers)
        }
    for path, layer in layers.items():
        w1, w2, w3 = (_gather_experts(layer, name) for name in ("w1", "w2", "w3"))
        if dist.get_rank() != 0:
            continue

        def put(pattern: str, parameters: dict[str, torch.Tensor], path: str = path) -> None:
            child = pattern.rpartition(".")[2]
            state.update({f"{path}.{child}.{key}": t.cpu() for key, t in parameters.items()})

        put(entry.experts, {"gate_up_proj": torch.cat([w1, w3], dim=1), "down_proj": w2})
        put(entry.router, layer.router.gate.state_dict())
        if layer.shared_experts is not None:
            put(entry.shared_expert, layer.shared_experts.state_dict())
        if layer.shared_experts_gate is not None:
            put(entry.shared_expert_gate, layer.shared_experts_gate.state_dict())
    return state if dist.get_rank() == 0 else None


def _gather_experts(layer: AutoEPMoELayer, name: str) -> torch.Tensor | None:
    """One expert matrix of all experts, shape (E, out, in), on rank 0."""
    local = getattr(layer.experts, name).detach().contiguous()
    if 0 not in torch.distributed.get_process_group_ranks(layer.ep_group):
        return None
    leader = dist.get_rank() == 0
    parts = [torch.empty_like(local) for _ in range(layer.ep_size)] if leader else None
    torch.distributed.gather(local, parts, dst=0, group=layer.ep_group)
    return torch.cat(parts) if leader else None
