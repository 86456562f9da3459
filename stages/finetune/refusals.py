"""Recipes that cannot act: found from the recipe and what is known of the model.

The planner asks before any compute, with the facts that it has; the loop asks again with those of
the loaded model, before it trains. Light to import.
"""

from collections.abc import Iterator

from stages.data.templates import TEMPLATES
from stages.finetune.dense import moe_only
from stages.finetune.recipe import AUXILIARY_WEIGHTS, ImageAdversary, Recipe
from stages.models.families import FAMILIES
from stages.models.sources import Facts

CAPACITY = {"switch_transformers": "expert_capacity", "nllb-moe": "expert_capacity"}
"""Architectures with a capacity, and the attribute of their router that holds it."""
Problem = tuple[str, str]
"""A field of the recipe, and ``reason; remedy``."""


def contradictions(recipe: Recipe) -> Iterator[Problem]:
    """Knobs that exclude each other or have nothing to act on, whatever the model."""
    if (recipe.steps is None) == (recipe.epochs is None):
        found = "is missing" if recipe.steps is None else "stands beside epochs"
        yield "steps", f"{found}; set either steps or epochs"
    if recipe.warmup_steps and recipe.warmup_ratio:
        yield "warmup_ratio", "stands beside warmup_steps; keep one"
    if recipe.steps is not None and recipe.warmup_steps > recipe.steps:
        reason = f"{recipe.warmup_steps} is more than the {recipe.steps} steps; lower it"
        yield "warmup_steps", reason
    if recipe.head == "classification":
        yield from _unheaded(recipe)
    for field in ("train", "freeze", "lora.roles"):
        roles = _roles(recipe, field)
        if len(set(roles)) < len(roles):
            yield field, "names a role twice; name each once"
    if "all" in recipe.train and len(recipe.train) > 1:
        yield "train", "names all and more; keep all or the others"
    if recipe.train != ("all",) and recipe.freeze:
        yield "freeze", "stands beside train, from which it follows; keep one"
    if recipe.lora is not None and recipe.freeze:
        yield "freeze", "stands beside lora, which freezes all weights already; remove it"
    for role in _roles(recipe, "lora.roles"):
        if recipe.trains(role):
            yield "lora.roles", f"{role} is named in train as well; keep one"
    trained = recipe.trained_roles()
    if not trained:
        yield "freeze", "names every role; leave one to be trained"
    if recipe.router.learning_rate is not None and not recipe.trains("router"):
        yield "router.learning_rate", "cannot act on a frozen router; train it or remove the rate"
    if recipe.router.initial == "random" and "router" not in trained:
        yield "router.initial", "random leaves a frozen router untrained; train it, or pretrained"
    if recipe.alternate is not None and recipe.lora is not None:
        yield "alternate", "stands beside lora; keep one"
    elif recipe.alternate is not None and not ("router" in trained and trained - {"router"}):
        yield "alternate", "needs a trained router and another trained part; mend train or freeze"
    if recipe.router.capacity is not None and recipe.router.assignment != "top_k":
        yield "router.capacity", "cannot act beside assignment, where no expert is full; keep one"
    if recipe.load_loss_weight and not recipe.router.noise:
        yield "load_loss_weight", "is a probability over router.noise; set that, such as 1/E"
    for field in AUXILIARY_WEIGHTS:
        if getattr(recipe, field) and trained == {"head"}:
            yield field, "cannot reach the head, which alone is trained; set it to 0"


def _unheaded(recipe: Recipe) -> Iterator[Problem]:
    """What a classification head cannot be trained on, or with."""
    first = TEMPLATES.get(recipe.data[0].template)
    for index, train in enumerate(recipe.reads):
        place = f"data.{index}" if index < len(recipe.data) else "validation"
        template, field = TEMPLATES.get(train.template), f"{place}.template"
        if train.template is None:
            yield field, "is missing, and gives the head its labels; name one, or remove head"
        elif template and first and tuple(template.labels) != tuple(first.labels):
            yield field, "has other labels than the first train set's; a head has one set of them"


READS_ROUTERS_ITSELF = ("llama_moe", "moduleformer", "phimoe")
"""Architectures whose routers an adapter stands around without effect, or in the way."""


def inapplicable(recipe: Recipe, facts: Facts) -> Iterator[Problem]:
    """Knobs that this Mixture-of-Experts or dense model does not have.

    The recipe of a dense model that shares it with a partner must have passed ``for_dense``.
    """
    if facts.architecture == "dense":
        for field in moe_only(recipe):
            yield field, "only Mixture-of-Experts models have it; remove it"
    if facts.family is None:  # a download would tell; the loop asks again
        return
    entry = FAMILIES[facts.family]
    if recipe.dropout.residual and not entry.residual:
        yield "dropout.residual", f"{facts.family} has none that can be set; remove it"
    if recipe.dropout.attention is not None and not entry.attention_dropout:
        yield "dropout.attention", f"{facts.family} has none that can be set; remove it"
    if recipe.load_loss_weight and entry.is_moe and entry.modality == "text" and not entry.packs:
        yield "load_loss_weight", f"{facts.family} is trained on padded sequences; remove it"
    if recipe.adversarial is not None:
        images = isinstance(recipe.adversarial, ImageAdversary)
        if images != (entry.modality == "image"):
            kinds = "pgd or trades" if entry.modality == "image" else "freelb"
            yield "adversarial", f"{facts.family} reads {entry.modality}s; use {kinds}"
    if recipe.head == "classification" and entry.encoder_decoder:
        yield "head", f"{facts.family} models write their answers; remove it"
    if recipe.head == "classification" and entry.modality == "image":
        yield "head", f"{facts.family} models have one; remove it"
    if facts.architecture == "dense":
        return
    if "router" in _roles(recipe, "lora.roles") and facts.family in READS_ROUTERS_ITSELF:
        reason = f"{facts.family} reads its routers' weights itself, past an adapter"
        yield "lora.roles", f"{reason}; remove router"
    for field in ("train", "freeze", "lora.roles"):
        if "shared_expert" in _roles(recipe, field) and not entry.shared_expert:
            yield field, f"{facts.family} models have no shared experts; remove shared_expert"
    top_k = recipe.router.top_k
    if top_k is not None and facts.experts is not None and top_k > facts.choice:
        of = "experts of a member" if facts.members > 1 else "experts"
        yield "router.top_k", f"{top_k} is more than the {facts.choice} {of}; lower it"
    elif top_k is not None and top_k == facts.top_k:
        yield "router.top_k", f"{top_k} is the model's own; remove it"
    if entry.index is not None and entry.no_weighing:
        for field in ("router.top_k", "router.assignment"):
            if field in moe_only(recipe):
                yield field, f"{facts.family} {entry.no_weighing}; remove it"
    if recipe.router.capacity is not None and entry.model_type not in CAPACITY:
        reason = f"{facts.family} has no capacity that can be set ({', '.join(CAPACITY)} have)"
        yield "router.capacity", f"{reason}; remove it"
    if entry.index is None:
        unseen = {"experts.drop"}
        if not entry.router_decides_top_k:
            unseen.add("router.top_k")
        if not (entry.auxiliary_loss or entry.chooses_largest):
            unseen.add("auxiliary_loss_weight")
        for field in moe_only(recipe):
            if field in unseen:
                yield field, f"{facts.family} chooses its experts inside its blocks; remove it"


def misplaced(recipe: Recipe, expert_parallel: int) -> Iterator[Problem]:
    """Knobs that cannot act where experts are spread over several workers."""
    if expert_parallel > 1 and "expert" in _roles(recipe, "lora.roles"):
        yield "lora.roles", (
            f"expert cannot be adapted while {expert_parallel} workers share the experts; set "
            "expert_parallel to 1"
        )


def _roles(recipe: Recipe, field: str) -> tuple[str, ...]:
    if field == "lora.roles":
        return recipe.lora.roles if recipe.lora else ()
    return getattr(recipe, field)
