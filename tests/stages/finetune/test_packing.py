"""Sequences of one row do not see each other in the dense families that are trained so, and those
of one padded batch not in recurrent ones."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.finetune.batches import Example, micro_batch, pack
from stages.finetune.export import padded_logits, training_logits
from stages.models.families import FAMILIES
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY

DENSE = [n for n, f in FAMILIES.items() if f.packs and not f.is_moe]
RECURRENT = [n for n in TINY if FAMILIES[n].recurrent]
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


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_carry_their_state_into_a_packed_row_and_nothing_over_padding(name):
    """Neither into the logits nor, however short a sequence beside others, into the gradient."""
    model, device = tiny_model(name, tiny_tokenizer(), seed=3), torch.device("cpu")
    passes = []
    for batches in ([examples()], [[example] for example in examples()]):
        model.zero_grad()
        logits = []
        for batch in batches:
            part = micro_batch(batch, model.config, device)
            out = model(**part.arguments, use_cache=False).logits[part.answers]
            torch.nn.functional.cross_entropy(out, part.targets, reduction="sum").backward()
            logits.append(out.detach())
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        passes.append((torch.cat(logits), gradients))
    (together, gradients), (alone, expected) = passes
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    for path, gradient in expected.items():
        # What is small beside the rest is a sum of larger parts, with their rounding.
        assert (gradients[path] - gradient).norm() <= 1e-4 * gradient.norm() + 2e-6, path
    with torch.no_grad():
        row, _ = pack(examples(), device)
        packed = model(**row, use_cache=False).logits[0]
    assert (packed - alone).abs().max() > 1e-2
