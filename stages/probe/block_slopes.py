"""How steep each feed-forward block is at its own inputs: found slopes, each a lower bound of the
Lipschitz constant of the neighbourhood, of l2 norms.

Shape letters: T tokens, D hidden size.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.attack.embeddings import STEP, project
from stages.models.dense import DENSE
from stages.models.families import family
from stages.models.routes import Weigh, imposed, routed

Draw = Callable[[int, torch.Size], torch.Tensor]
"""The number of a start and the shape (…, T, D) of a block's inputs, to normal numbers of it."""


def feed_forward(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The feed-forward blocks, with experts and without, by their path in the order of the layers;
    none of a family in which they are not told apart or choose their experts themselves."""
    entry = family(model)
    if entry.is_moe and entry.index is not None:
        paths = [path.rpartition(".")[0] for path in entry.router.split()]
    elif entry.model_type in DENSE:
        paths = [DENSE[entry.model_type].block.format("*")]
    else:
        return {}
    patterns = [re.escape(path).replace(r"\*", r"[^.]+") for path in paths]
    named = re.compile("|".join(patterns))
    return {path: module for path, module in model.named_modules() if named.fullmatch(path)}


def block_slopes(
    model: PreTrainedModel,
    run: Callable[[], object],
    draw: Draw,
    *,
    radius: float,
    steps: int,
    restarts: int,
    samples: int,
    inputs: int = 1,
    weigh: Weigh | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """By block the steepest slope (…, T) of each of the tokens that ``run`` shows the model, as the
    router chooses (``free``, and ``random``, of so many random directions) and, of a block with
    experts where ``weigh`` tells how to weigh them anew, with each token kept at its experts
    (``frozen``).

    ``radius`` is in median norms of what the block is given of each of the ``inputs`` of the batch,
    whose tokens follow each other.
    """
    given: dict[str, torch.Tensor] = {}
    modules = feed_forward(model)
    with ExitStack() as undo, torch.no_grad():
        for path, module in modules.items():
            hook = module.register_forward_pre_hook(
                lambda module, args, path=path: given.__setitem__(path, args[0].detach())
            )
            undo.callback(hook.remove)
        with routed(model) as routes:
            run()
    sparse = {routing.layer for routing in routes}
    found = {}
    for path, module in modules.items():
        hidden = given[path]
        norms = hidden.norm(dim=-1).view(inputs, -1)
        median = norms.median(1, keepdim=True).values.expand_as(norms)
        length = radius * median.reshape(*hidden.shape[:-1], 1)

        def outputs(at: torch.Tensor, module: nn.Module = module) -> torch.Tensor:
            made = module(at)
            return made[0] if isinstance(made, tuple) else made

        def kept(at: torch.Tensor, outputs: Callable = outputs) -> torch.Tensor:
            with routed(model, imposed(routes, weigh=weigh)):
                return outputs(at)

        ways = {"free": outputs}
        if path in sparse and weigh is not None:
            ways["frozen"] = kept
        found[path] = {
            name: steepest_tokens(function, hidden, length, draw, steps=steps, restarts=restarts)
            for name, function in ways.items()
        }
        directions = (draw(restarts + number, hidden.shape) for number in range(samples))
        found[path]["random"] = random_tokens(outputs, hidden, length, directions)
    return found


@torch.no_grad()
def random_tokens(
    function: Callable[[torch.Tensor], torch.Tensor],
    clean: torch.Tensor,
    radius: torch.Tensor | float,
    directions: Iterable[torch.Tensor],
) -> torch.Tensor:
    """The largest of the slopes (…, T) to the ends of the ``directions`` (…, T, D), all of which
    are made as long as the radius, as in ``steepest_tokens``."""
    here, best = function(clean), clean.new_zeros(clean.shape[:-1])
    for direction in directions:
        direction = direction.to(clean)
        delta = radius * direction / direction.norm(dim=-1, keepdim=True)
        slopes = (function(clean + delta) - here).norm(dim=-1) / delta.norm(dim=-1)
        best = torch.maximum(best, slopes)
    return best


def steepest_tokens(
    function: Callable[[torch.Tensor], torch.Tensor],
    clean: torch.Tensor,
    radius: torch.Tensor | float,
    draw: Draw,
    *,
    steps: int,
    restarts: int,
) -> torch.Tensor:
    """The largest ‖f(x + d) - f(x)‖ / ‖d‖ that ascent finds for each token (…, T), ‖d‖ at most
    ``radius``, one for all or (…, T, 1); a token's output may depend on that token alone."""
    with torch.no_grad():
        here = function(clean)
    best = clean.new_zeros(clean.shape[:-1])
    for start in range(restarts):
        delta = draw(start, clean.shape).to(clean)
        delta = radius * delta / delta.norm(dim=-1, keepdim=True)
        for step in range(steps + 1):
            delta.requires_grad_(step < steps)
            slopes = (function(clean + delta) - here).norm(dim=-1) / delta.norm(dim=-1)
            best = torch.maximum(best, slopes.detach())
            if step == steps:
                break
            gradient = torch.autograd.grad(slopes.sum(), delta)[0]
            unit = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            delta = project(delta.detach() + STEP * radius / steps * unit, radius, "l2")
    return best
