"""What a recipe is for the dense partner of the Mixture-of-Experts model that shares it."""

from typing import Any

from stages.errors import BadInput
from stages.finetune.recipe import AUXILIARY_WEIGHTS, MOE_ROLES, Recipe, Trades


def moe_only(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe only a Mixture-of-Experts model has, where it is set: values by field, of
    roles those alone."""
    given = recipe.model_dump(mode="json")
    found = {
        name: given[name]
        for name in (*AUXILIARY_WEIGHTS, "alternate")
        if getattr(recipe, name) != Recipe.model_fields[name].default
    }
    if isinstance(recipe.adversarial, Trades) and recipe.adversarial.router_beta:
        found["adversarial.router_beta"] = recipe.adversarial.router_beta
    for section in ("router", "experts"):
        part = getattr(recipe, section).model_dump(mode="json", exclude_defaults=True)
        found |= {f"{section}.{name}": value for name, value in part.items()}
    adapted = recipe.lora.roles if recipe.lora else ()
    for field, roles in {
        "freeze": recipe.freeze, "train": recipe.train, "lora.roles": adapted,
    }.items():  # fmt: skip
        if named := [role for role in roles if role in MOE_ROLES]:
            found[field] = named
    return found


def for_dense(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's fields for a dense model, and what was left out of them, by field.

    A recipe is shared by a pair, so what only a Mixture-of-Experts model has is dropped for its
    dense partner; the run's evidence names it. Raises BadInput where nothing would be trained.
    """
    fields = {name: getattr(recipe, name) for name in Recipe.model_fields}
    for name in (*AUXILIARY_WEIGHTS, "alternate", "router", "experts"):
        fields[name] = Recipe.model_fields[name].default
    if isinstance(recipe.adversarial, Trades):
        fields["adversarial"] = recipe.adversarial.model_copy(update={"router_beta": 0.0})

    def dense(roles: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(role for role in roles if role not in MOE_ROLES)

    fields["freeze"], fields["train"] = dense(recipe.freeze), dense(recipe.train)
    if recipe.lora is not None:
        roles = dense(recipe.lora.roles)
        fields["lora"] = recipe.lora.model_copy(update={"roles": roles}) if roles else None
        left = roles or set(fields["train"]) - {"all"}
        fields["train"] = fields["train"] or ("all",)
    else:
        left = fields["train"]
    if not left:
        field = "lora.roles" if recipe.lora else "train"
        raise BadInput(
            f"{field}: names no part that a dense model has; name one, or name the models that the "
            "recipe is for under models"
        )
    return fields, moe_only(recipe)
