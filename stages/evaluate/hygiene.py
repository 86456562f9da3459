"""What an attack must show before its numbers mean anything.

After the checklist of arXiv 1902.06705. A check that fails does not remove a number: it marks it,
because a model that looks robust under an attack that does not work is not.
"""

from collections.abc import Iterable, Sequence

import numpy as np

WITHOUT_BOUND = "unbounded"
"""Name of the check that must break all."""
SLACK = 0.02
"""Share of the examples that may contradict a check."""


def check(
    attack: str, name: str, value: float, passed: bool, n: int, meaning: str
) -> dict[str, object]:
    """One row of the report: the measured ``value`` over ``n`` examples, and what it says."""
    return {
        "attack": attack, "check": name, "value": float(value), "passed": bool(passed), "n": n,
        "meaning": meaning,
    }  # fmt: skip


def more_effort(
    attack: str, name: str, base: np.ndarray, more: np.ndarray
) -> dict[str, object]:
    """More effort must not find what the attack missed; both are booleans of success (n,)."""
    gained = float((more & ~base).mean())
    return check(
        attack, name, gained, gained <= SLACK, len(base),
        f"share of examples that only {name} break",
    )  # fmt: skip


def monotone(attack: str, successes: Sequence[np.ndarray]) -> dict[str, object]:
    """What a smaller budget breaks a larger one breaks too; success (n,) by ascending budget."""
    lost = max(
        float((small & ~large).mean())
        for small, large in zip(successes, successes[1:], strict=False)
    )
    return check(
        attack, "monotone", lost, lost <= SLACK, len(successes[0]),
        "largest share of examples that a larger budget loses",
    )  # fmt: skip


def unbounded(attack: str, success: np.ndarray) -> dict[str, object]:
    """Without a bound everything can be broken."""
    rate = float(success.mean())
    return check(
        attack, WITHOUT_BOUND, rate, rate == 1.0, len(success),
        "share of examples broken without a bound; must be all",
    )  # fmt: skip


def not_weaker(
    attack: str, other: str, success: np.ndarray, reference: np.ndarray
) -> dict[str, object]:
    """An attack with more knowledge breaks what one with less does, example by example."""
    missed = float((reference & ~success).mean())
    return check(
        attack, f"not weaker than {other}", missed, missed <= SLACK, len(success),
        f"share of examples that only {other} breaks",
    )  # fmt: skip


def gradients(attack: str, zero: np.ndarray) -> dict[str, object]:
    """A gradient that is exactly zero is masked, not small."""
    share = float(zero.mean())
    return check(
        attack, "gradients", share, share <= SLACK, len(zero),
        "share of gradients that are exactly zero",
    )  # fmt: skip


def at_worst(checks: Iterable[dict]) -> dict[str, object]:
    """Of one check at several budgets, the row with the largest value: where most examples
    contradict it."""
    return max(checks, key=lambda row: row["value"])


def failures(checks: Iterable[dict]) -> str:
    """The failed checks in words, each with the attacks that fail it and, of each, the worst value;
    empty where none fails. Several seeds' checks may be given together."""
    worst: dict[str, dict[str, dict]] = {}
    for row in checks:
        if not row["passed"]:
            of_check = worst.setdefault(row["check"], {})
            known = of_check.get(row["attack"], row)
            # Of what must break all, the worst is what breaks the fewest.
            worse = min if row["check"] == WITHOUT_BOUND else max
            of_check[row["attack"]] = worse(known, row, key=lambda found: found["value"])
    return "; ".join(
        f"{check} (" + ", ".join(f"{a}: {r['value']:.2f} of {r['n']}" for a, r in of.items()) + ")"
        for check, of in worst.items()
    )
