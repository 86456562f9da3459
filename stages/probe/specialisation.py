"""How purely experts serve one feature of what they are given: tables of expert against feature.

An expert is monosemantic for a feature (part of text, class of image) where all tokens that it is
chosen for have one value of it. The idea that specialisation is this, and not an even load, is that
of arXiv 2510.23671; the measures here are definitions of this project. ``purity`` turns round the
domain specialisation of OLMoE (arXiv 2409.02060), which is a domain's share that goes to an expert.

Light to import: no torch. Shape letters: T tokens, E experts, F values of a feature.
"""

import numpy as np


def table(chosen: np.ndarray, feature: np.ndarray, values: int) -> np.ndarray:
    """How often each expert was chosen for a token of each value, (E, F) integers.

    ``chosen`` booleans (T, E), ``feature`` (T,) numbers from 0 to F - 1.
    """
    return chosen.astype(int).T @ np.eye(values, dtype=int)[feature]


def information(tables: np.ndarray) -> np.ndarray:
    """The share of a feature's entropy that the expert tells, I(E; F) / H(F), of tables (…, E, F).

    0 where experts and feature have nothing to do with each other, 1 where every expert serves one
    value; the mutual information is scikit-learn's ``mutual_info_score``. NaN where the feature has
    one value. Few tokens make it too large: compare it with that of a permuted feature.
    """
    total = tables.sum((-2, -1), keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        joint = tables / total
        whole = _entropy(joint.sum(-2))
        rest = _entropy(joint.reshape(*joint.shape[:-2], -1)) - _entropy(joint.sum(-1))
        return np.where(whole > 0, (whole - rest) / whole, np.nan)


def purity(tables: np.ndarray) -> np.ndarray:
    """The share of choices whose token has the commonest value of its expert, of (…, E, F)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return tables.max(-1).sum(-1) / tables.sum((-2, -1))


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """In nats, over the last dimension."""
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return -(probabilities * logs).sum(-1)
