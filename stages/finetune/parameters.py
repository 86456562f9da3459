"""Which parameters a recipe trains, in which group of the optimiser, and whose turn it is.

Parts are named by their role in ``stages/models/families.py``. All of it is set before DeepSpeed
takes the model, so that ZeRO partitions what is trained and nothing else.
"""

from collections import Counter

import torch
from transformers import PretrainedConfig, PreTrainedModel

from stages.errors import StageFailed
from stages.finetune.recipe import Alternate, Recipe
from stages.finetune.schedules import epoch
from stages.models.families import family
from stages.models.roles import roles


def trained_roles(model: PreTrainedModel) -> dict[str, str]:
    """The role of each parameter as recipes name it: a shared expert's gate belongs to it."""
    as_recipe = {"shared_expert_gate": "shared_expert"}
    return {name: as_recipe.get(role, role) for name, role in roles(model).items()}


def freeze(model: PreTrainedModel, recipe: Recipe) -> None:
    """Set ``requires_grad`` of every parameter as the recipe says; adapters come later.

    Raises StageFailed when a role that the recipe names has no parameters in this model.
    """
    entry, role_of = family(model), trained_roles(model)
    adapted = recipe.lora.roles if recipe.lora else ()
    for role in (*recipe.train, *recipe.freeze, *adapted):
        if role != "all" and role not in role_of.values():
            tied = role == "head" and model.config.tie_word_embeddings
            reason = "its head is tied to the embedding" if tied else "it has no such part"
            raise StageFailed(
                f"{role}: this {model.config.model_type} has no parameters of that role "
                f"({reason}); remove it from the recipe's train, freeze and lora.roles"
            )
    for name, parameter in model.named_parameters():
        trained = recipe.trains(role_of[name]) and not entry.has_no_gradient(name)
        parameter.requires_grad_(trained)


def groups(model: PreTrainedModel, recipe: Recipe) -> list[dict]:
    """The optimiser's parameter groups: one, or the routers apart where the recipe treats them so.

    ``part`` tells them apart, also where DeepSpeed splits a group further.
    """
    role_of = trained_roles(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if recipe.router.learning_rate is None and recipe.alternate is None:
        return [{"params": list(trained.values()), "name": "all", "part": "all"}]
    routers = [p for name, p in trained.items() if role_of[name] == "router"]
    rest = [p for name, p in trained.items() if role_of[name] != "router"]
    rate = recipe.router.learning_rate or recipe.learning_rate
    others = [{"params": rest, "name": "backbone", "part": "backbone"}] if rest else []
    return [*others, {"params": routers, "name": "router", "part": "router", "lr": rate}]


def count(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Numbers of trained and frozen parameters by role."""
    role_of, found = trained_roles(model), {"trained": Counter(), "frozen": Counter()}
    for name, parameter in model.named_parameters():
        key = "trained" if parameter.requires_grad else "frozen"
        found[key][role_of[name]] += parameter.numel()
    return {key: dict(counter) for key, counter in found.items()}


class Turns:
    """Routers and the rest in turns. Who waits has a gradient of 0, so that clipping does not see
    it, and the optimiser passes it over, so that its moments stay as well: exactly as if it were
    frozen, at every stage of ZeRO.
    """

    def __init__(self, recipe: Alternate, of: list[dict]):
        self.recipe = recipe
        self.part = ""
        for group in of:
            for parameter in group["params"]:
                parameter.register_hook(self._zero_unless(group["part"]))

    def _zero_unless(self, part: str):
        return lambda gradient: gradient if part == self.part else torch.zeros_like(gradient)

    def skip_waiting(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimiser (the innermost one, under ZeRO) pass over who waits."""

        hidden: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

        def hide(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            for group in optimizer.param_groups:
                if self.part and group["part"] != self.part:
                    for parameter in group["params"]:
                        hidden.append((parameter, parameter.grad))
                        parameter.grad = None

        def restore(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            # DeepSpeed keeps what it offloads to the CPU and writes into it again.
            for parameter, gradient in hidden:
                parameter.grad = gradient
            hidden.clear()

        optimizer.register_step_pre_hook(hide)
        optimizer.register_step_post_hook(restore)

    def start(self, recipe: Recipe, rows: int, step: int) -> None:
        """Say whose turn an optimiser step is."""
        by_epoch = self.recipe.every == "epoch"
        turn = epoch(recipe, rows, step) if by_epoch else step // self.recipe.every
        other = "router" if self.recipe.first == "backbone" else "backbone"
        self.part = other if turn % 2 else self.recipe.first


def drawn_width(config: PretrainedConfig) -> float:
    """Standard deviation with which an architecture draws its weights."""
    names = ("initializer_range", "init_std", "initializer_factor")  # in transformers' order
    return next(getattr(config, name) for name in names if hasattr(config, name))


@torch.no_grad()
def draw_routers(model: PreTrainedModel, seed: int) -> float:
    """Draw all router weights anew, as the family initialises them; the L2 norm of the change.

    A matrix is normal with the width that the configuration names, a bias 0, also one of the choice
    alone; weights that no gradient reaches stay otherwise.
    """
    width = drawn_width(model.config)
    generator = torch.Generator().manual_seed(seed)
    entry, role_of, squares = family(model), trained_roles(model), 0.0
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        drawn = role_of.get(name) == "router" and not entry.has_no_gradient(name)
        if not (drawn or entry.biases_choice(name)):
            continue
        fresh = torch.zeros_like(weight)
        if drawn and weight.ndim > 1:
            fresh.normal_(0.0, width, generator=generator)
        squares += (fresh - weight).square().sum().item()
        weight.copy_(fresh)
    return squares**0.5
