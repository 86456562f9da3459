import pytest
import torch
from transformers import AutoTokenizer

from stages.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["Plain words.", " two  spaces\n\ttab", "naïve 東京 🙂", ""])
def test_text_goes_through_one_token_per_byte_and_back(reloaded, text):
    tokens = reloaded(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert reloaded.decode(tokens, clean_up_tokenization_spaces=False) == text


def test_every_byte_has_a_token_and_the_special_ones_come_first(reloaded):
    assert len(reloaded) == 259
    assert reloaded("<|im_start|>a<|im_end|>")["input_ids"][::2] == [1, 2]
    special = (reloaded.bos_token_id, reloaded.eos_token_id, reloaded.pad_token_id)
    assert special == (1, 2, 2)


def test_the_chat_template_marks_the_turns(reloaded):
    text = reloaded.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two, other = (tiny_model("mixtral", tiny_tokenizer(), s).state_dict() for s in (0, 0, 1))
    assert torch.rand(1) == expected
    assert all(torch.equal(one[name], two[name]) for name in one)
    name = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(one[name], other[name])
