"""Randomly initialised models with a byte tokenizer: no download, a few thousand parameters."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from stages.models.families import family
from stages.models.load import auto_class
from stages.models.roles import roles
from stages.models.tiny_shapes import TINY

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte after three special tokens, with a small chat template."""
    symbols = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def tiny_model(name: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """The tiny model of a family, its weights drawn from the seed."""
    shape = TINY[name]
    width = next(shape[field] for field in ("hidden_size", "d_model", "n_embd") if field in shape)
    config = AutoConfig.for_model(
        name,
        **shape,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        # As wide as SmolLM2's for its size; smaller, and a model hardly depends on its layers.
        initializer_range=width**-0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, dtype=torch.float32).eval()
        _draw_routers(model, config.initializer_range)
        return model


@torch.no_grad()
def _draw_routers(model: PreTrainedModel, std: float) -> None:
    """Fill what some architectures start at zero: routers, and their biases of the choice."""
    entry, role_of = family(model), roles(model)
    for name, tensor in model.state_dict().items():
        drawn = tensor.is_meta or tensor.any()
        if (entry.biases_choice(name) or role_of.get(name) == "router") and not drawn:
            tensor.normal_(std=std)
