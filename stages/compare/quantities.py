"""What attacks and probes measured, by the names of their score columns.

The one place that knows these names, for images and for texts; tables, verdicts and figures ask it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from stages.evaluate.base import Evaluation

PARTS = {
    "attacks": ("image_attacks", "text_attacks"),
    "interventions": ("image_interventions", "expert_interventions"),
    "geometry": ("image_geometry", "router_geometry"),
    "lipschitz": ("image_lipschitz", "local_lipschitz"),
}
"""Part to the kinds of evaluation that play it."""
MOST_BUDGETS = 5
"""Budgets that stand in the headline table; the figure has all."""
SUBSTITUTIONS = {
    "next_ranked": "ranks K + 1 to 2K",
    "random": "random experts",
    "drop_first": "best expert left out",
    "drop_output": "no expert's output",
    "permuted": "experts permuted",
}


@dataclass(frozen=True)
class Quantity:
    """A row of the headline table: per example the mean of some score columns."""

    name: str
    group: str
    label: str
    part: str
    columns: tuple[str, ...]
    of_experts: bool = False
    fixed: bool = False
    """Not learned, so that a change from the untuned model says nothing."""
    among: str = ""
    """Of the examples alone for which this column is 1 in every model of the table."""


def quantities(part: str, evaluation: Evaluation, columns: Iterable[str]) -> list[Quantity]:
    """The rows of a part, from the score columns that are there."""
    columns = list(columns)
    made = {"attacks": _attacks, "interventions": _interventions, "geometry": _geometry,
            "lipschitz": _lipschitz}[part](evaluation, columns)  # fmt: skip
    there = (replace(q, columns=tuple(c for c in q.columns if c in columns)) for q in made)
    return [quantity for quantity in there if quantity.columns]


def of_images(evaluation: Evaluation) -> bool:
    """Whether an evaluation is on images."""
    return evaluation.kind.startswith("image_")


def attack_names(evaluation: Evaluation) -> dict[str, object]:
    """The attacks of an evaluation by the name that its score columns have."""
    if of_images(evaluation):
        return dict(evaluation.attacks)
    return {attack.label: attack for attack in evaluation.attacks}


def aimed_at_loss(evaluation: Evaluation) -> list[str]:
    """The attacks on the model's own loss, whose routing changes are a finding and not their aim:
    no controls, none that leaves the valid range, none whose loss is on the routes."""
    return [
        name
        for name, attack in attack_names(evaluation).items()
        if attack.kind not in ("noise", "paper", "transfer")
        and getattr(attack, "routing", "as_is") not in ("targeted", "joint")
    ]


def budgets(columns: Iterable[str]) -> list[str]:
    """The budgets of an attack on images, in units of 1/255, the smallest first."""
    found = [c.removeprefix("worst/") for c in columns if c.startswith("worst/")]
    return sorted(found, key=float)


def shares(columns: Iterable[str], substitution: str) -> list[str]:
    """The shares of the tokens for which an intervention was tried, the smallest first."""
    prefix = f"correct/{substitution}_"
    return sorted((c.removeprefix(prefix) for c in columns if c.startswith(prefix)), key=float)


def routing_change(evaluation: Evaluation, columns: list[str]) -> dict[str, tuple[str, ...]]:
    """The columns of the change of routes: under ``attack``, and its baselines under a ``random``
    perturbation of the same budget, by ``noise`` and by ``chance``."""
    names = aimed_at_loss(evaluation)
    if of_images(evaluation):
        sizes = budgets(columns)
        return {
            "attack": tuple(f"routing_change/{a}/{b}" for a in names for b in sizes),
            "random": tuple(f"routing_change_random/{b}" for b in sizes),
            "noise": ("routing_change_noise",),
            "chance": ("routing_change_chance",),
        }
    return {
        "attack": tuple(f"routing_change/{a}" for a in names),
        "random": tuple(f"routing_change_random/{a}" for a in names),
        "noise": ("noise",),
        "chance": ("chance",),
    }


def swapped(evaluation: Evaluation, columns: list[str], which: str) -> tuple[str, ...]:
    """The columns of the answers under swapped routes, ``which`` being ``clean_attacked`` or
    ``attacked_clean`` (input, routes). They are 1 where the answer is right; on images
    ``clean_attacked`` where it is the clean one, and right in ``clean_attacked_correct``."""
    if of_images(evaluation):
        return tuple(f"swap_{which}/{b}" for b in budgets(columns))
    return tuple(f"swap_{which}_routes/{a}" for a in aimed_at_loss(evaluation))


def _attacks(evaluation: Evaluation, columns: list[str]) -> Iterator[Quantity]:
    images, names = of_images(evaluation), aimed_at_loss(evaluation)
    sizes = budgets(columns)

    def quantity(name: str, group: str, label: str, of: tuple[str, ...], **fields) -> Quantity:
        return Quantity(name, group, label, "attacks", of, **fields)

    accuracy, experts = "Accuracy", {"of_experts": True}
    yield quantity("clean", accuracy, "clean", ("correct" if images else "clean",))
    worst = "worst case of attacks"
    if not images:
        yield quantity("robust", accuracy, worst, ("correct",))
    elif len(sizes) > 1:
        yield quantity("robust", accuracy, f"{worst}, mean of budgets", ("robust",))
    for size in _spread(sizes):
        yield quantity(f"robust/{size}", accuracy, f"{worst}, {size}/255", (f"worst/{size}",))
    yield quantity(
        "robust_common", accuracy, f"{worst}, where all models are right without attack",
        ("robust" if images else "correct",), among="correct" if images else "clean",
    )  # fmt: skip
    # Below 1 a perturbed token is, at the median distance, still nearest to its own embedding.
    for attack, given in attack_names(evaluation).items():
        if given.kind == "embedding_pgd":
            yield quantity(
                f"size/{attack}", "Size of attacks, in half distances to the nearest token",
                attack.replace("_", " "), (f"size/{attack}",),
            )  # fmt: skip
    change = "Changed by the attacks, mean"
    of = [f"prediction_change/{a}/{b}" for a in names for b in sizes]
    if not images:
        of = [f"changed/{a}" for a in names]
    yield quantity("prediction_change", change, "predictions", tuple(of))
    moved = routing_change(evaluation, columns)
    first = [c.replace("routing_change", "experts_first_changed", 1) for c in moved["attack"]]
    yield quantity(
        "first_expert_changed", change, "tokens' highest-weighted expert", tuple(first), **experts
    )
    for name, label in (
        ("attack", "routes (1 − IoU)"),
        ("random", "routes, random perturbation"),
        ("noise", "routes, same input again"),
        ("chance", "routes, independent choices"),
    ):
        yield quantity(
            f"routing_change/{name}", change, label, moved[name], **experts, fixed=name == "chance"
        )
    of = {"attacked_clean": "attacked input, clean routes"}
    if images:
        of |= {"clean_attacked_correct": "clean input, attacked routes",
               "clean_attacked": "the same, clean prediction kept"}  # fmt: skip
    else:
        of |= {"clean_attacked": "clean input, attacked routes"}
    for which, label in of.items():
        yield quantity(
            f"swap/{which}", "Accuracy with routes swapped", label,
            swapped(evaluation, columns, which), **experts,
        )  # fmt: skip


def _interventions(evaluation: Evaluation, columns: list[str]) -> Iterator[Quantity]:
    group = "Accuracy with other experts"
    yield Quantity("own", group, "as routed", "interventions", ("correct",), True)
    for name, label in SUBSTITUTIONS.items():
        if found := shares(columns, name):
            share = found[-1]
            label = label if share == "1" else f"{label}, share {share}"
            column = (f"correct/{name}_{share}",)
            yield Quantity(f"substitution/{name}", group, label, "interventions", column, True)


def _lipschitz(evaluation: Evaluation, columns: list[str]) -> Iterator[Quantity]:
    group = "Local Lipschitz constant (lower bound)"
    sizes = evaluation.sizes
    for suffix, radius in sizes.items():
        within = f", radius {radius:g}" if len(sizes) > 1 else ""
        for column, label, experts in (
            ("lipschitz", "routes free", False), ("lipschitz_frozen", "experts frozen", True)
        ):  # fmt: skip
            yield Quantity(
                column + suffix, group, label + within, "lipschitz", (column + suffix,), experts
            )
    group = "Lipschitz constant of a feed-forward block, mean (lower bound)"
    yield Quantity("block", group, "routes free", "lipschitz", ("block",))
    yield Quantity("block_frozen", group, "experts frozen", "lipschitz", ("block_frozen",), True)


def _geometry(evaluation: Evaluation, columns: list[str]) -> Iterator[Quantity]:
    group = "Disagreement of experts"
    for name, label in (
        ("disagreement", "the two best"),
        ("disagreement_next", "ranks K and K + 1"),
        ("disagreement_random", "random ones"),
    ):
        yield Quantity(name, group, label, "geometry", (name,), True)


def _spread(sizes: list[str]) -> list[str]:
    """At most ``MOST_BUDGETS`` of the budgets, evenly spread, the largest among them."""
    if len(sizes) <= MOST_BUDGETS:
        return sizes
    step = len(sizes) / MOST_BUDGETS
    return [sizes[round((i + 1) * step) - 1] for i in range(MOST_BUDGETS)]
