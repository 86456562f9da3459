"""Tiny model folders that several test modules make their twins of."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.models.size import measure
from stages.models.tiny import tiny_tokenizer


def dense_model(family: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A dense model of 4 layers, with biases and norms that are not those of its initialisation.

    ``changes`` are configuration fields.
    """
    fields = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.125,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if family in ("qwen3", "mistral"):
        fields["head_dim"] = 16
    if family == "mistral":
        fields["sliding_window"] = None
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def dense_folder(folder: Path, family: str = "llama", seed: int = 0, **changes) -> Path:
    """The folder of a ``dense_model``, with its tokenizer and card."""
    return save(dense_model(family, seed, **changes), folder)


def llama_folder(folder: Path, seed: int = 0, **changes) -> Path:
    """A Llama of 4 layers with its tokenizer and card; ``changes`` are configuration fields."""
    return dense_folder(folder, "llama", seed, **changes)


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    measure(model, "test").write(folder)
    return folder


def plain(folder: Path) -> PreTrainedModel:
    """The model as a user of transformers loads it, without this project."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """Logits (3, 40, vocabulary) on fixed random tokens that no probe text holds."""
    tokens = torch.randint(3, 259, (3, 40), generator=torch.Generator().manual_seed(7))
    return plain(folder)(tokens).logits
