"""The classification head that a fine-tune starts with."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from transformers import PretrainedConfig, PreTrainedModel

from stages.errors import StageFailed
from stages.finetune.parameters import drawn_width
from stages.models.classifier import architecture, is_classifier
from stages.models.load import auto_class, filled


def head_config(
    config: PretrainedConfig, labels: Sequence[str], pad_token_id: int
) -> PretrainedConfig:
    """The configuration of a language model with a head for the labels in its stead.

    ``pad_token_id`` is taken where it has none: the head is read before the padding.
    """
    changed = deepcopy(config)
    changed.id2label = dict(enumerate(labels))
    changed.label2id = {label: number for number, label in enumerate(labels)}
    changed.tie_word_embeddings = False  # there is nothing left to tie
    if changed.pad_token_id is None:
        changed.pad_token_id = pad_token_id
    changed.architectures = [architecture(config)]
    return changed


def with_head(
    model: PreTrainedModel, labels: Sequence[str], pad_token_id: int, seed: int
) -> PreTrainedModel:
    """The model with a head of shape (labels, hidden size), drawn as the architecture draws its
    weights; a classifier of the same labels is returned as it is.

    Raises StageFailed for a classifier of other labels.
    """
    if is_classifier(model.config):
        present = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
        if present != tuple(labels):
            raise StageFailed(
                f"head: the model classifies into {', '.join(present)}, the train sets into "
                f"{', '.join(labels)}; start from another model or use another template"
            )
        return model
    config = head_config(model.config, labels, pad_token_id)
    with torch.device("meta"):
        empty = auto_class(config).from_config(config)
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(empty.score.weight.shape, generator=generator) * drawn_width(config)
    body = model.base_model.state_dict(prefix=f"{model.base_model_prefix}.")
    wanted = dict(model.base_model.named_parameters())
    headed = filled(type(empty), config, body | {"score.weight": score})
    for name, parameter in headed.base_model.named_parameters():
        parameter.requires_grad_(wanted[name].requires_grad)
    return headed
