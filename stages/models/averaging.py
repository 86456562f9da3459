"""What an ensemble of image classifiers says: the mean of its members' probabilities."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import ImageClassifierOutput

# Shape letters: B images, M members, L labels.


@dataclass
class EnsembleOutput(ImageClassifierOutput):
    """``logits`` (B, L) are the logarithms of the averaged probabilities."""

    member_logits: torch.FloatTensor | None = None
    """Of each member, (B, M, L)."""


def averaged(logits_BML: torch.Tensor, labels: torch.Tensor | None = None) -> EnsembleOutput:
    """The ensemble's output from its members'; its loss, for labels (B,), is the mean of theirs."""
    members = logits_BML.shape[1]
    mean_BL = logits_BML.log_softmax(-1).logsumexp(1) - math.log(members)
    loss = None
    if labels is not None:
        loss = F.cross_entropy(logits_BML.flatten(0, 1), labels.repeat_interleave(members))
    return EnsembleOutput(loss=loss, logits=mean_BL, member_logits=logits_BML)
