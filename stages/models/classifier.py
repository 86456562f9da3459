"""Classification heads: the body of a language model with one linear output per label on top of it.

The output is read at the last token of a text, as transformers' models for sequence classification
of decoders do. For a family that has none there, the same head is put on its body here.
"""

from collections.abc import Mapping

from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

SUFFIX = "ForSequenceClassification"


def is_classifier(config: PretrainedConfig | Mapping) -> bool:
    """Whether a configuration, or the content of ``config.json``, is of a classifier."""
    given = isinstance(config, Mapping)
    architectures = config.get("architectures") if given else config.architectures
    return bool(architectures) and architectures[0].endswith(SUFFIX)


def architecture(config: PretrainedConfig) -> str:
    """What ``architectures`` calls the classifier of a decoder family."""
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
    if known is not None:
        return known
    language_model = AutoModelForCausalLM._model_mapping[type(config)]
    return language_model.__name__.replace("ForCausalLM", SUFFIX)


def register(model_type: str) -> None:
    """Make ``AutoModelForSequenceClassification`` know the classifiers of a decoder family."""
    config, known = CONFIG_MAPPING[model_type], AutoModelForSequenceClassification._model_mapping
    if config not in known:
        language_model = AutoModelForCausalLM._model_mapping[config]
        family = language_model.__mro__[1]  # its own PreTrainedModel
        # transformers looks into the module of a class for what its experts can do.
        # Of a family that also sees, the PreTrainedModel has another configuration.
        names = ("base_model_prefix", "config_class", "__module__")
        same = {n: getattr(language_model, n) for n in names}
        made = type(architecture(config()), (GenericForSequenceClassification, family), same)
        # Without exist_ok, transformers passes over a class for a configuration of its own.
        AutoModelForSequenceClassification.register(config, made, exist_ok=True)
