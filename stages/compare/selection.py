"""Which models of a sweep H1 and H2 compare, by their cards or as the sweep names them."""

from stages.compare.spec import CompareSpec, Hypotheses, Pair
from stages.models.card import ModelCard

SIZE_TOLERANCE = 0.05
"""FLOPs per token that differ by no more than this share count as equal."""


class NotTested(Exception):
    """Why a hypothesis has no verdict."""


def equal_flops(
    spec: CompareSpec, cards: dict[str, ModelCard], recipe: str, evaluation: str
) -> list[Pair]:
    """The pairs of equal FLOPs, of those whose models are scored under a recipe.

    Raises NotTested where there is none.
    """
    asked = (spec.hypotheses or Hypotheses()).equal_flops
    pairs, others = [], []
    for pair in spec.pairs:
        if not spec.has(recipe, evaluation, pair.moe, pair.dense):
            continue
        both = [cards.get(model) for model in (pair.moe, pair.dense)]
        if asked is not None:
            if pair.name in asked:
                pairs.append(pair)
        elif None in both:
            others.append(f"{pair.name} lacks a checkpoint")
        elif _equal(*both):
            pairs.append(pair)
        else:
            ratio = both[0].flops_per_token / both[1].flops_per_token
            others.append(f"{pair.name}: the MoE takes {ratio:.2f} times the FLOPs")
    if not pairs:
        why = "; ".join(others) or "none is scored under this recipe"
        raise NotTested(f"no pair has equal FLOPs per token ({why})")
    return pairs


def expert_series(
    spec: CompareSpec, cards: dict[str, ModelCard], recipe: str, evaluation: str
) -> dict[str, int]:
    """The models that differ in the number of experts alone, with those, the fewest first.

    Raises NotTested where there are no two.
    """
    moes = scored_moes(spec, recipe, evaluation)
    experts = {name: cards[name].experts for name in moes if name in cards}
    asked = (spec.hypotheses or Hypotheses()).series
    if asked is not None:
        lacks = [name for name in asked if name not in experts]
        if lacks:
            raise NotTested(f"no checkpoint of {', '.join(lacks)}")
        chosen = list(asked)
    else:
        groups: list[list[str]] = []
        for name in experts:
            group = next((g for g in groups if _alike(cards[g[0]], cards[name])), None)
            groups.append([name]) if group is None else group.append(name)
        chosen = max(groups, default=[], key=lambda names: len({experts[n] for n in names}))
    series = dict(sorted(((name, experts[name]) for name in chosen), key=lambda item: item[1]))
    if len(set(series.values())) < 2:
        raise NotTested("no two MoE models of the sweep differ in the number of experts alone")
    return series


def scored_moes(spec: CompareSpec, recipe: str, evaluation: str) -> list[str]:
    """The MoE models that an evaluation scores under a recipe."""
    return [
        model for model, architecture in spec.models.items()
        if architecture == "moe" and spec.has(recipe, evaluation, model)
    ]  # fmt: skip


def _alike(one: ModelCard, other: ModelCard) -> bool:
    """Two models that differ, as their cards tell, in the number of experts alone."""
    same = ("family", "layers", "moe_layers", "top_k")
    return all(getattr(one, f) == getattr(other, f) for f in same) and _equal(one, other)


def _equal(one: ModelCard, other: ModelCard) -> bool:
    """Equal FLOPs per token, within the tolerance."""
    return abs(one.flops_per_token / other.flops_per_token - 1) <= SIZE_TOLERANCE
