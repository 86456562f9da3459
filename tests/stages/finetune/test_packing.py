"""Sequences of one row do not see each other in the dense families that are trained so."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.finetune.batches import Example
from stages.finetune.export import padded_logits, training_logits
from stages.models.families import FAMILIES

DENSE = [n for n, f in FAMILIES.items() if f.packs and not f.is_moe]
SHAPE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.125,
    "pad_token_id": 2,
}


def examples():
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 99, (length,), generator=draw) for length in (5, 9, 7, 12)]
    return [Example(tuple(row.tolist()), 2) for row in rows]


def test_the_partners_of_published_mixtures_are_among_them():
    named = {"llama", "gpt_neox", "olmo", "olmo2", "qwen2", "qwen3", "mistral", "gemma", "gemma2"}
    assert named <= set(DENSE) and not {"opt", "falcon"} & set(DENSE)


@pytest.mark.parametrize("name", DENSE)
def test_packed_rows_give_the_logits_of_padded_ones(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE, **({"head_dim": 16} if "gemma" in name else {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    packed, padded = training_logits(model, examples()), padded_logits(model, examples())
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
    assert padded.std() > 0.05
