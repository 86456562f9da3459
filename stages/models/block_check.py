"""Whether each sparse block computes, once its experts are spread out, what it did before.

``observe_blocks`` looks at the blocks before ``expert_parallel.convert``, ``check_blocks`` asks
them the same again under DeepSpeed: the whole block with router, routed and shared experts on
random hidden states, and each experts module alone with a given choice, so that one which rounding
turned does not count and, where the choice can be given, every expert is met however rarely its
router takes it.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.zero import GatheredParameters
from torch import nn
from transformers import PreTrainedModel

from stages.errors import StageFailed
from stages.models.families import family

PROBE_TOKENS = 16
CHOICES = 32
"""How often each expert is chosen, were all chosen as often."""


@dataclass
class Call:
    """One call of a module: its arguments and what it returned, the first of a tuple."""

    arguments: tuple
    named: dict[str, Any]
    output: torch.Tensor


@torch.no_grad()
def observe_blocks(model: PreTrainedModel) -> dict[str, Call]:
    """What each sparse block, and before it its experts modules, make of random hidden states, by
    path. They are normal, as large as those of 16 random tokens or one random image.

    Each rank draws its own, so that tokens which end up at the wrong rank are seen.
    """
    entry, found = family(model), {}
    generator = torch.Generator().manual_seed(dist.get_rank())
    experts, top_k = entry.experts_of(model.config.to_dict())
    for path, (arguments, named) in _block_calls(model, generator).items():
        hidden = arguments[0] if arguments else named["hidden_states"]
        copies = math.ceil(CHOICES * experts / top_k / hidden[..., 0].numel())
        shape = (copies * len(hidden), *hidden.shape[1:])
        drawn = torch.randn(shape, generator=generator) * hidden.square().mean().sqrt()
        arguments, named = _changed((arguments, named), _copied(hidden, copies, drawn))
        inside = {name: module for name, module in entry.modules(model, "expert").items()
                  if name.startswith(f"{path}.")}  # fmt: skip
        with ExitStack() as undo:
            for name, module in inside.items():
                undo.enter_context(module.register_forward_hook(_noted(found, name)))
            output = model.get_submodule(path)(*arguments, **named)
        for name, module in inside.items() if entry.index is not None else ():
            states, chosen, weights = found[name].arguments
            turned = (chosen + torch.arange(len(chosen))[:, None]) % experts
            found[name] = Call((states, turned, weights), {}, module(states, turned, weights))
        found[path] = Call(arguments, named, _first(output))
    return found


def _copied(hidden: torch.Tensor, copies: int, drawn: torch.Tensor) -> Callable:
    """Puts drawn hidden states in the place of a block's, and so many copies of what belongs to
    them, as positions and masks do, in the place of that."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor is hidden:
            return drawn
        belongs = tensor.ndim and len(tensor) == len(hidden)
        return torch.cat([tensor] * copies) if belongs else tensor

    return change


def _block_calls(model: PreTrainedModel, generator: torch.Generator) -> dict[str, tuple]:
    """What each sparse block is called with, by its path, for 16 random tokens or an image."""
    entry, seen = family(model), {}

    def noted(path: str):
        return lambda module, arguments, named: seen.update({path: (arguments, named)})

    parents = [path.rpartition(".")[0] for path in entry.modules(model, "expert")]
    # JetMoE's and MoLM's attention calls router and experts past the module that holds them.
    either = {path: path.rpartition(".")[0] for path in parents}
    with ExitStack() as undo:
        for path in {*either, *either.values()}:
            hook = model.get_submodule(path).register_forward_pre_hook(
                noted(path), with_kwargs=True)
            undo.enter_context(hook)
        if entry.modality == "image":
            size, channels = model.config.image_size, model.config.num_channels
            model(torch.randn(1, channels, size, size, generator=generator))
        else:
            tokens = torch.randint(model.config.vocab_size, (1, PROBE_TOKENS), generator=generator)
            given = {"labels": tokens} if entry.encoder_decoder else {}  # the decoder's input
            model(tokens, **given, use_cache=False)
    called = [path if path in seen else either[path] for path in parents]
    return {path: seen[path] for path in called}


def _noted(found: dict[str, Call], path: str):
    def hook(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        found[path] = Call(arguments, {}, output)

    return hook


@torch.no_grad()
def check_blocks(model: nn.Module, before: dict[str, Call]) -> None:
    """Ask every experts module and every block the same again; called by every rank.

    No token's output may differ by more than 1e-5 (bf16: 5 %) of the largest one. Of whole blocks,
    whose routers may choose otherwise where scores are next to equal, that goes for 99 % of the
    tokens; in bf16, where such are many, for two thirds of them, by 2 %. Raises StageFailed with
    the layer's path.
    """
    experts = family(model).modules(model, "expert") if before else {}
    for path, seen in before.items():
        module = model.get_submodule(path)
        weights = list(module.parameters())
        weight = weights[0]
        # ZeRO stage 3 gathers what a pass through the whole model needs, not one block alone.
        with GatheredParameters(weights, enabled=hasattr(weight, "ds_id")):
            arguments, named = _moved(seen.arguments, weight), _moved(seen.named, weight)
            output = _first(module(*arguments, **named)).float()
        expected = seen.output.to(weight.device)
        # A block that was initialised as the identity adds nothing.
        largest = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        by_token = (output - expected).abs().flatten(0, -2).amax(-1) / largest
        exact = weight.dtype == torch.float32
        if path in experts:
            what, share, allowed = "expert-parallel layer", 1.0, 1e-5 if exact else 0.05
        else:
            share, allowed = (0.99, 1e-5) if exact else (2 / 3, 0.02)
            what = "block with its router and all experts"
        difference = by_token.quantile(share)
        # All ranks raise together, for a rank that goes on alone would wait for ever. The largest
        # of a number and NaN may be the number.
        difference = difference.nan_to_num(nan=math.inf, posinf=math.inf)
        torch.distributed.all_reduce(difference, op=torch.distributed.ReduceOp.MAX)
        if not difference <= allowed:
            raise StageFailed(
                f"{path}: the {what} differs from the original by {difference:.1e} of its largest "
                "output; set expert_parallel to 1"
            )


def _first(output: torch.Tensor | tuple) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _moved(given: Any, weight: torch.Tensor) -> Any:
    """Arguments on the device of the weights, floating-point ones in their type."""
    return _changed(
        given, lambda t: t.to(weight) if t.is_floating_point() else t.to(weight.device)
    )


def _changed(given: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Arguments of a call with a change of every tensor among them."""
    if isinstance(given, torch.Tensor):
        return change(given)
    if isinstance(given, dict):
        return {name: _changed(value, change) for name, value in given.items()}
    return tuple(_changed(v, change) for v in given) if isinstance(given, tuple) else given
