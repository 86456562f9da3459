"""Loading a model folder: safetensors only, and never with weights that it does not hold."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.initialization import no_init_weights

from stages.errors import StageFailed
from stages.models import (  # noqa: F401 - register themselves
    gpt_neox_moe,
    llama_moe,
    moduleformer,
    nllb_moe,
    vision_ensembles,
    vision_heads,
    vision_moe,
)
from stages.models.classifier import is_classifier, register
from stages.models.families import FAMILIES, family
from stages.models.images import ImageProcessor, load_processor
from stages.models.quantized import method


def auto_class(config: PretrainedConfig | Mapping) -> type:
    """The class of transformers that makes a model of a configuration: a language model, a
    classifier where the configuration's ``architectures`` say so, or an image classifier."""
    entry = family(config)
    if entry.modality == "image":
        return AutoModelForImageClassification
    if is_classifier(config):
        register(entry.model_type)
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if entry.encoder_decoder else AutoModelForCausalLM


def load(
    folder: Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    max_memory: Mapping[int | str, int] | None = None,
    offload: Path | None = None,
) -> PreTrainedModel:
    """The language or vision model of a Hugging Face folder, in evaluation mode.

    ``dtype`` names a torch type, ``device`` a torch device; ``auto`` spreads the layers over all
    accelerators that this process sees, or over the devices of ``max_memory`` (bytes by device
    number or ``cpu``). What fits on none of them is read from the folder ``offload`` at each pass.
    Raises StageFailed when the model's folder cannot be read, lacks weights of its architecture
    (transformers would draw them at random and go on), holds quantized ones, or does not fit and
    there is no ``offload``; and when a weight is of less precision than the one asked for.
    """
    model = from_folder(
        folder,
        dtype=getattr(torch, dtype),
        device_map=device,
        max_memory=max_memory and dict(max_memory),
        offload_folder=offload,
    )
    _check_dtypes(model, getattr(torch, dtype), folder)
    if device == "auto" and offload is None:
        check_fits(model, folder)
    with torch.device("meta"):
        fresh = type(model)(model.config)
    # Loading forgets which parameters are not meant to be trained (biases of a router's choice).
    for parameter, meant in zip(model.parameters(), fresh.parameters(), strict=True):
        parameter.requires_grad_(meant.requires_grad)
    return model.eval()


def from_folder(folder: Path, *, quantized: bool = False, **options) -> PreTrainedModel:
    """What ``from_pretrained`` makes of a folder's safetensors with these options. Raises
    StageFailed when it cannot be read, lacks weights of its architecture, or holds quantized ones
    where these are not expected."""
    try:
        content = json.loads((folder / "config.json").read_text())
        if (found := method(content)) and not quantized:
            raise StageFailed(
                f"{folder}: its weights are quantized ({found}); name it as the source of a model, "
                "which brings plain ones"
            )
        kind = auto_class(content)
        model, report = kind.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise StageFailed(f"{folder}: cannot be loaded as a model: {_one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise StageFailed(
            f"{folder}: {len(missing)} weights of {model.config.model_type} are missing from its "
            f"safetensors, first {missing[0]}; it is incomplete or of another architecture"
        )
    return model


def _check_dtypes(model: PreTrainedModel, asked: torch.dtype, folder: Path) -> None:
    """Raise StageFailed where weights are neither of the asked type nor in float32, in which some
    architectures keep a few (Hunyuan its routers, ERNIE the biases of the choice)."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (asked, torch.float32):
            raise StageFailed(
                f"{folder}: {name} is of {parameter.dtype} where {asked} was asked for; report "
                "this as a defect"
            )


def check_fits(model: PreTrainedModel, folder: Path) -> None:
    """Raise StageFailed where a part of a model that was spread lies on no accelerator."""
    homes = _homes(model)
    if homes & {"cpu", "disk"}:
        raise StageFailed(
            f"{folder}: does not fit on the accelerators of one worker ({', '.join(sorted(homes))} "
            "would hold a part of it); take more of them, `gpus` in the sweep's resources"
        )


def _homes(model: PreTrainedModel) -> set[str]:
    """Where the parts of a model lie that was loaded with a device map."""
    return {str(place) for place in getattr(model, "hf_device_map", {}).values()}


def spread(model: PreTrainedModel) -> bool:
    """Whether a model's layers lie on several devices."""
    return len(_homes(model)) > 1


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; without a padding token of its own it pads with the
    end-of-text token. Raises StageFailed when there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise StageFailed(f"{folder}: cannot load a tokenizer: {_one_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_input(folder: Path) -> Tokenizer | ImageProcessor:
    """What turns data into the input of a folder's model: a tokenizer, or an image processor.

    Raises StageFailed when there is none.
    """
    return load_processor(folder) if reads_images(folder) else load_tokenizer(folder)


def reads_images(folder: Path) -> bool:
    """Whether a folder holds a vision model."""
    file = folder / "config.json"
    # A classifier of texts or a judge may be of an architecture that is not in the registry.
    name = json.loads(file.read_text()).get("model_type") if file.is_file() else None
    return name in FAMILIES and FAMILIES[name].modality == "image"


def filled(
    kind: type[PreTrainedModel], config: PretrainedConfig, state: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """A model in evaluation mode whose weights are copies of ``state``, which names all of them."""
    with no_init_weights():  # drawing them first takes longer than all the rest
        model = kind(config)
    model.tie_weights()
    model.load_state_dict(state)
    return model.eval()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
