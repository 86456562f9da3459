"""Verdicts on the five hypotheses about experts and robustness, at the scale of the sweep.

H1 to H5 are this project's reading of what *On the Adversarial Robustness of Mixture of Experts*
(arXiv 2210.10253) suggests. A verdict is about the models of the sweep and about nothing else.

**Decision rule**, fixed before any result. A hypothesis is one to three *claims*, each a statistic
on one side of a value (``contrast.py``). Every claim has a two-sided p-value. If all statistics lie
on the side claimed, the hypothesis has the largest of the p-values (all claims must hold:
intersection-union test, Berger 1982, Technometrics 24:295). If some lie on the other side, it has
the smallest p-value among those, times the number of claims (one false claim refutes: Bonferroni).
These p-values are Holm-corrected over all hypotheses of the table. Below 5 % the verdict is
*supported* or *refuted*, by side; otherwise *undecided*. What lacks an input is *not tested*, with
the reason, and is left out of the correction.

Where dropping the experts' whole output does no harm, exchanging them or their routes does none
either, and that would say nothing. H3 and H5 therefore have a *premise*, that this drop costs more
than ``margin``: it is one more claim without which nothing is supported, and which refutes nothing.
Where it is not shown, H3 and H5 are undecided (or refuted by another claim), with the reason.

The claims, each a mean over the models named, seeds and examples:

- H1, pairs of equal FLOPs: robust accuracy (worst case over attacks; mean over budgets), MoE minus
  dense, above 0; local Lipschitz constant, MoE over dense (ratio of means), below 1.
- H2, models that differ in the number of experts E alone: least-squares slope of robust accuracy
  over log2(E), that is per doubling, above 0.
- H3, all MoE models: change of routes (1 - IoU; attacks on the loss, mean over budgets) minus
  ``far`` times that under a random perturbation of the same budget, above 0; the same for the noise
  floor; share of clean predictions that change under the routes of the attacked input (texts:
  accuracy lost), below ``margin``; premise: the same without any expert's output, above ``margin``.
  What independent choices would give is told beside it and is no claim: at .75 and more, nothing
  can lie far above it.
- H4, all MoE models: Pearson's correlation over examples of loss rise under attack and routing
  term (averaged and tested on Fisher's scale), above 0.
- H5, all MoE models: accuracy lost with ranks K + 1 to 2K instead of 1 to K, below ``margin``; that
  minus the accuracy lost with random experts, below 0; premise: accuracy lost without any expert's
  output, above ``margin``.

Experts that were made of one dense block start alike, so that what H3 to H5 say of routes and
experts may be so before any training. Of upcycled models each of their claims stands twice: about
the trained model, and, as another premise, about its change from the same model untuned on the same
examples (on Fisher's scale in H4). Nothing is supported unless both are shown; the change refutes
nothing. Without untuned scores they are not tested.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from stages.compare.claim import MATTER, Claim
from stages.compare.claims import Claims
from stages.compare.measured import Measured
from stages.compare.selection import NotTested
from stages.compare.spec import UNTUNED
from stages.compare.table import number
from stages.models.card import ModelCard
from stages.statistics import CONFIDENCE, holm

TITLES = {
    "H1": "MoE beats dense at equal FLOPs: more robust, and less steep",
    "H2": "Robust accuracy grows with the number of experts at fixed K",
    "H3": "Attacks change the routes far more than random perturbations do, yet the attacked "
    "routes do the clean input no harm",
    "H4": "Loss under attack rises with the routing term",
    "H5": "Second-best experts cost little, random experts more",
}
SUPPORTED, REFUTED, UNDECIDED, NOT_TESTED = "supported", "refuted", "undecided", "not tested"


def decide(claims: Sequence[Claim]) -> tuple[float, str]:
    """The hypothesis' p-value before Holm's correction, and the verdict that it would be."""
    stated = [claim for claim in claims if not claim.premise]
    contrary = [claim.found.p_value for claim in stated if not claim.holds]
    if contrary:
        return min(1.0, len(stated) * min(contrary)), REFUTED
    if not all(claim.holds for claim in claims):
        return 1.0, UNDECIDED
    return max(claim.found.p_value for claim in claims), SUPPORTED


def trivial(claims: Sequence[Claim]) -> str:
    """Why little follows from claims that hold: a premise that is not shown."""
    for claim in claims:
        shown = claim.holds and claim.found.p_value < 1 - CONFIDENCE
        if not claim.premise or shown:
            continue
        if claim.premise == MATTER:
            beside = "not shown to be more" if claim.holds else "no more"
            return (
                f"{MATTER}: dropping them all costs {number(claim.found.value)} ({claim.label}), "
                f"{beside} than the margin of {claim.found.null:g}, so that little harm by other "
                "experts or routes says nothing"
            )
        side = "above" if claim.above else "below"
        return (
            f"{claim.premise}: {claim.label} {number(claim.row()['value'], signed=True)}, not "
            f"shown to be {side} {claim.found.null:g}, so that it may be no work of the training"
        )
    return ""


def judge(measured: Measured, cards: dict[str, ModelCard]) -> pd.DataFrame:
    """One row per recipe, hypothesis and claim; none unless the sweep asks for verdicts.

    Columns: ``recipe``, ``hypothesis``, ``title``, ``verdict``, ``p_value`` and ``p_holm`` (of the
    hypothesis), ``compared`` (a sentence), ``reason`` (of *not tested*, and where the experts are
    not shown to matter), ``caution`` (a line each); and of each claim ``claim``, ``side`` (``>`` or
    ``<``), ``null``, ``value``, ``ci_low``, ``ci_high``, ``p_claim``, ``detectable``, ``ratio``,
    ``n``, ``documents``, ``seeds``.
    """
    spec = measured.spec
    if spec.hypotheses is None:
        return pd.DataFrame()
    tuned = [recipe for recipe in spec.recipes if recipe != UNTUNED]
    rows = []
    for recipe in tuned or [UNTUNED]:
        of_recipe = Claims(measured, cards, recipe)
        for name, title in TITLES.items():
            row = {"recipe": recipe, "hypothesis": name, "title": title}
            try:
                claims, compared, cautions = of_recipe.of(name)
            except NotTested as reason:
                rows.append(row | _untested(str(reason)))
                continue
            p_value, verdict = decide(claims)
            row |= {"verdict": verdict, "p_value": p_value, "compared": compared,
                    "reason": "" if verdict == REFUTED else trivial(claims),
                    "caution": "\n".join(cautions)}  # fmt: skip
            rows += [row | claim.row() for claim in claims]
    table = pd.DataFrame(rows)
    first = ~table.duplicated(["recipe", "hypothesis"])
    table["p_holm"] = pd.Series(holm(table.loc[first, "p_value"]), table.index[first])
    table["p_holm"] = table.groupby(["recipe", "hypothesis"])["p_holm"].transform("first")
    table.loc[table["p_holm"] >= 1 - CONFIDENCE, "verdict"] = UNDECIDED
    return table


def _untested(reason: str) -> dict:
    texts = dict.fromkeys(("compared", "caution", "claim", "side"), "")
    numbers = ("p_value", "null", "value", "ci_low", "ci_high", "p_claim", "detectable")
    counts = dict.fromkeys(("n", "documents", "seeds"), 0)
    return (
        {"verdict": NOT_TESTED, "reason": reason, "ratio": False}
        | texts | dict.fromkeys(numbers, np.nan) | counts
    )  # fmt: skip
