"""What an attack on a classifier climbs: losses of logits, one per example."""

import torch
import torch.nn.functional as F

from stages.errors import StageFailed


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of logits (B, labels) and labels (B,), shape (B,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The largest other logit minus the label's, (B,): positive where the prediction is wrong."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (others.amax(1, keepdim=True) - own)[:, 0]


def difference_of_logits_ratio(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The margin over the distance of the largest and the third logit, (B,).

    Blind to the scale of the logits (arXiv 2003.01690). Raises StageFailed below three labels.
    """
    ordered = _sorted(logits, 3)
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def targeted_ratio(
    logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The target's logit minus the label's over a distance of the largest ones, (B,).

    arXiv 2003.01690. Raises StageFailed below four labels.
    """
    ordered = _sorted(logits, 4)
    gain = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]
    return gain / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)


def _sorted(logits: torch.Tensor, least: int) -> torch.Tensor:
    if logits.shape[1] < least:
        raise StageFailed(
            f"the difference-of-logits ratio needs {least} labels, the model has "
            f"{logits.shape[1]}; set loss: margin"
        )
    return logits.topk(least, dim=1).values


LOSSES = {"ce": cross_entropy, "dlr": difference_of_logits_ratio, "margin": margin}
