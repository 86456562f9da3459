"""Tiny model folders that several test modules make their twins of."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stages.models.size import measure
from stages.models.tiny import tiny_tokenizer


def llama_folder(folder: Path, seed: int = 0, **changes) -> Path:
    """A Llama of 4 layers with its tokenizer and card; ``changes`` are configuration fields."""
    tokenizer = tiny_tokenizer()
    fields = {
        "vocab_size": len(tokenizer),
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
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**fields | changes))
    return save(model, folder)


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
