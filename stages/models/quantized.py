"""Published weights of fewer bits (``quantization_config``): brought in as plain ones.

Training, attacks and float32 scoring need weights that they can differentiate and round by
themselves, so a folder in the store never holds others. Light to import.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from stages.errors import StageFailed

METHODS = ("mxfp4", "fp8")
"""What transformers makes plain weights of on a CPU (MXFP4 of GPT-OSS, FP8 of DeepSeek-V3)."""


def method(config: Mapping) -> str | None:
    """How the weights are quantized, from the content of ``config.json``; None for plain ones."""
    found = config.get("quantization_config")
    return found and str(found.get("quant_method"))


def refusal(config: Mapping) -> str | None:
    """Why a folder's weights cannot be made plain ones, as ``reason; remedy``, or None."""
    found = method(config)
    if found in (None, *METHODS):
        return None
    return (
        f"quantization_config: weights of {found} cannot be made plain ones here "
        f"({', '.join(METHODS)} can); take the model's bf16 weights"
    )


def dequantize(folder: Path) -> dict[str, str]:
    """Write plain weights, of the configuration's own dtype, in the place of quantized ones.

    What is to be noted of it; empty where nothing was quantized. MXFP4 is exact in bfloat16, FP8
    is rounded to it. Raises StageFailed where that cannot be done.
    """
    content = json.loads((folder / "config.json").read_text())
    found = method(content)
    if found is None:
        return {}
    if problem := refusal(content):
        raise StageFailed(problem)
    import torch
    from transformers import AutoConfig

    from stages.models.load import auto_class, from_folder

    config = AutoConfig.from_pretrained(folder)
    # Where an accelerator could compute with them as they are, they would be kept.
    config.quantization_config = {**config.quantization_config, "dequantize": True}
    dtype = config.dtype or torch.bfloat16
    state = from_folder(folder, quantized=True, config=config, dtype=dtype).state_dict()
    # The loaded model remembers its quantizer and would write what it read; a new one does not.
    del config.quantization_config
    with torch.device("meta"):
        plain = auto_class(config).from_config(config, dtype=dtype)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink(missing_ok=True)  # mapped into memory, so it must not be written over
    plain.save_pretrained(folder)
    return {"dequantized": f"{found} to {str(dtype).removeprefix('torch.')}"}
