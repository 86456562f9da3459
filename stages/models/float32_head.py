"""Heads that compute in float32 on a model of lower precision.

Logits in bfloat16 have eight significant bits: near 15 they are 1/16 apart, so that close choices
come out exactly equal, and the more often the larger a model's logits are.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.models.roles import head_of


def with_float32_head(model: PreTrainedModel) -> PreTrainedModel:
    """The same language model or classifier of texts, whose head has float32 weights and inputs.

    The head gets weights of its own, of equal values: an input embedding that it shared them with
    stays as it is, as does all the rest. What an architecture does to its logits (scaling, soft
    caps) is then in float32 too. A model in float32 is left untouched.
    """
    if model.dtype == torch.float32:
        return model
    head = head_of(model)
    for name, weight in list(head.named_parameters()):
        setattr(head, name, nn.Parameter(weight.detach().float(), weight.requires_grad))
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    return model
