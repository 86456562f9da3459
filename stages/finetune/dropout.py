"""Dropout where transformers' models have none, or keep their own, in training.

Everything here is a context manager around forward passes, so no model is changed for good.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from stages.errors import StageFailed
from stages.models.families import family
from stages.models.routing import replaced

Watch = Callable[[str, torch.Tensor], None]
"""Told the knob's name and an output after dropout."""


@contextmanager
def output_dropout(name: str, modules: list[nn.Module], p: float, watch: Watch) -> Iterator[None]:
    """Dropout with probability ``p`` on the output of each module (the first of a tuple)."""

    def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        first = F.dropout(output[0] if isinstance(output, tuple) else output, p)
        watch(name, first)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    with ExitStack() as undo:
        for module in modules:
            undo.enter_context(module.register_forward_hook(hook))
        yield


@contextmanager
def sum_dropout(
    name: str, methods: list[tuple[nn.Module, str]], p: float, watch: Watch
) -> Iterator[None]:
    """Dropout with probability ``p`` on what each method of a module adds up by ``index_add``,
    whatever it does with the sum before it returns."""

    def dropping(method: Callable) -> Callable:
        def inside(*args: Any) -> Any:
            with _SumDropout(name, p, watch):
                return method(*args)

        return inside

    with ExitStack() as undo:
        for module, method in methods:
            undo.enter_context(replaced(module, method, dropping(getattr(module, method))))
        yield


class _SumDropout(TorchFunctionMode):
    def __init__(self, name: str, p: float, watch: Watch):
        self.name, self.p, self.watch = name, p, watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.index_add:
            result = F.dropout(result, self.p)
            self.watch(self.name, result)
        return result


@contextmanager
def attention_dropout(modules: list[nn.Module], p: float) -> Iterator[None]:
    """The attention modules' own dropout with probability ``p``."""
    before = [module.attention_dropout for module in modules]
    for module in modules:
        module.attention_dropout = p
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.attention_dropout = own


@contextmanager
def watched_attention(
    modules: dict[str, nn.Module], watch: Callable[[str, float], None]
) -> Iterator[None]:
    """Each module's path and the probability of every dropout of attention weights that runs in it
    (0 outside training) are told to ``watch``."""

    def noting(path: str, forward: Callable) -> Callable:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with _SeenDropout(path, watch):
                return forward(*args, **kwargs)

        return inside

    with ExitStack() as undo:
        for path, module in modules.items():
            undo.enter_context(replaced(module, "forward", noting(path, module.forward)))
        yield


class _SeenDropout(TorchFunctionMode):
    def __init__(self, path: str, watch: Callable[[str, float], None]):
        self.path, self.watch = path, watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.watch(self.path, given.get("dropout_p", 0.0))
        # Attention weights have four axes, outputs that a block drops as well have three.
        elif func is F.dropout and args[0].ndim == 4:
            self.watch(self.path, given["p"] if given["training"] else 0.0)
        return func(*args, **given)


def attention_modules(model: PreTrainedModel) -> list[str]:
    """Paths of the modules whose ``attention_dropout`` their forward pass reads in training."""
    return [path for path, m in model.named_modules() if hasattr(m, "attention_dropout")]


def residual_modules(model: PreTrainedModel) -> list[str]:
    """Paths of the attention and feed-forward blocks whose outputs the residual stream takes up.

    That it does is tried out on the first layer: without both outputs it must be the identity, and
    half an output must count half. Raises StageFailed where that does not hold.
    """
    paths = family(model).residual_blocks(model)
    difference = _not_additive(model, *paths[:2])
    if not difference <= 1e-4:
        raise StageFailed(
            f"dropout.residual: cannot act on {model.config.model_type}: its blocks are not "
            f"plainly added to the residual stream ({difference:.1e}); remove it"
        )
    return paths


@torch.no_grad()
def _not_additive(model: PreTrainedModel, attention: str, feed_forward: str) -> float:
    """How far the first layer is from ``input + attention + feed_forward``, of the largest part."""
    seen: dict[str, torch.Tensor] = {}
    factors: dict[str, float] = {}

    def scale(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple):
            if isinstance(output, tuple):
                return (output[0] * factors[path], *output[1:])
            return output * factors[path]

        return hook

    def keep(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        seen["input"] = args[0] if args else kwargs["hidden_states"]
        seen["output"] = output[0] if isinstance(output, tuple) else output

    def difference(attention_factor: float, feed_forward_factor: float) -> torch.Tensor:
        factors.update({attention: attention_factor, feed_forward: feed_forward_factor})
        model(input_ids=torch.arange(8)[None].to(model.device), use_cache=False)
        return seen["output"] - seen["input"]

    layer = model.get_submodule(attention.rpartition(".")[0])
    with ExitStack() as undo:
        for path in (attention, feed_forward):
            undo.enter_context(model.get_submodule(path).register_forward_hook(scale(path)))
        undo.enter_context(layer.register_forward_hook(keep, with_kwargs=True))
        identity = difference(0.0, 0.0).abs().max()
        whole, half = difference(0.0, 1.0), difference(0.0, 0.5)
        only_attention, less = difference(1.0, 0.0), difference(0.5, 0.0)
    errors = [identity, (half - whole / 2).abs().max(), (less - only_attention / 2).abs().max()]
    return (torch.stack(errors).max() / torch.stack([whole, only_attention]).abs().max()).item()
