"""Loading a model folder: safetensors only, and never with weights that it does not hold."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.initialization import no_init_weights

from stages.errors import StageFailed


def load(
    folder: Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model of a Hugging Face folder, in evaluation mode.

    ``dtype`` names a torch type. Raises StageFailed when the folder cannot be read, or lacks
    weights of its architecture (transformers would draw them at random and go on).
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            device_map=device,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise StageFailed(f"{folder}: cannot be loaded as a model: {_one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise StageFailed(
            f"{folder}: {len(missing)} weights of {model.config.model_type} are missing from its "
            f"safetensors, first {missing[0]}; it is incomplete or of another architecture"
        )
    return model.eval()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; without a padding token of its own it pads with the
    end-of-text token. Raises StageFailed when there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise StageFailed(f"{folder}: cannot load a tokenizer: {_one_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
