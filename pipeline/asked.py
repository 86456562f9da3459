"""What a sweep asks for: which models and evaluations belong to which recipe. Light to import."""

from pathlib import Path

from pipeline.sweep import UNTUNED, Sweep, model_spec
from pipeline.sweep_file import located
from stages.attack.image_spec import Surrogate
from stages.models.sources import Facts, describe
from stages.models.spec import SourceSpec
from stages.models.vision_spec import VisionSpec


def sweep_recipes(sweep: Sweep) -> dict[str, tuple[int, ...]]:
    """Recipe names with the seeds that each is run for; an untuned model has one, 0.

    One that nothing is scored on is left out: others may come after it.
    """
    untuned = {UNTUNED: (0,)} if sweep.untuned else {}
    seeds = untuned | {name: sweep.seeds for name in sweep.recipes}
    return {name: of for name, of in seeds.items() if recipe_evaluations(sweep, name)}


def recipe_models(sweep: Sweep, name: str) -> tuple[str, ...]:
    """The models that a recipe fine-tunes (or, untuned, leaves as they are), in their order."""
    members = dict.fromkeys(m for pair in sweep.pairs for m in (pair.moe, pair.dense))
    chosen = None if name == UNTUNED else sweep.recipes[name].models
    return tuple(m for m in members if chosen is None or m in chosen)


def recipe_evaluations(sweep: Sweep, name: str) -> tuple[str, ...]:
    """The evaluations that a recipe's checkpoints (or the untuned models) are scored on."""
    recipe = sweep.recipes.get(name)
    if recipe is not None and recipe.evaluations is not None:
        return recipe.evaluations
    headed = recipe is not None and recipe.head == "classification"
    return tuple(e for e, each in sweep.evaluations.items() if each.asks_head == headed)


def surrogate(sweep: Sweep, recipe: str, model: str, asked: Surrogate) -> str | None:
    """The model that a transfer attack on a model after a recipe is made on.

    The named one; of another seed, where none is named, the model itself. Else (and untuned, where
    there is no other seed), where none is named or it is the model itself, its partner in the first
    pair whose models the recipe both has; without such a pair the partner in the first one, if any.
    """
    if asked.other_seed and recipe != UNTUNED:
        return asked.model or model
    if asked.model not in (None, model):
        return asked.model
    partners = [pair.dense if model == pair.moe else pair.moe for pair in sweep.pairs
                if model in (pair.moe, pair.dense)]
    there = [name for name in partners if name in recipe_models(sweep, recipe)]
    return next(iter([*there, *partners]), None)


def drawn(sweep: Sweep, name: str) -> bool:
    """Whether a model, or the one that it is made of, begins with random weights."""
    spec, dense = model_spec(sweep, name)
    return drawn(sweep, dense) if dense else isinstance(spec, VisionSpec)


def facts_of(sweep: Sweep, name: str, folder: Path) -> Facts:
    """What is known of a model of a checked sweep, whose file lies in ``folder``."""
    spec, dense = model_spec(sweep, name)
    if isinstance(spec, SourceSpec):
        spec = spec.model_copy(update={"source": located(spec.source, folder)})
    return describe(spec, facts_of(sweep, dense, folder) if dense else None)
