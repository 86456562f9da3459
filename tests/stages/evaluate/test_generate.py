"""Batched greedy decoding is ``generate`` of one prompt at a time."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stages.evaluate import generate as module
from stages.evaluate.base import Request
from stages.evaluate.decode_cache import grouped_heads, make_room
from stages.evaluate.generate import generate
from stages.models.tiny import tiny_model, tiny_tokenizer

REQUESTS = [
    Request("chat", "Hello?", max_new_tokens=9, chat=True),
    Request("short", "x", max_new_tokens=24),
    Request("long", "The quick brown fox jumps over the lazy dog", max_new_tokens=6),
    Request("middle", "Once upon a time", max_new_tokens=24),
    Request("empty", "", max_new_tokens=5),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(params=["llama", "mixtral", "qwen2_moe"])
def model(request, tokenizer):
    model = tiny_model(request.param, tokenizer, seed=0)
    # Some bytes end a text too, so that prompts of a batch end at different times.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(60, 90)]
    return model


def one_at_a_time(model, tokenizer, request: Request) -> tuple[list[int], bool]:
    """Generated tokens without the end token, and whether there was one."""
    text = request.context
    if request.chat:
        text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(text or tokenizer.bos_token, return_tensors="pt")
    config = GenerationConfig(do_sample=False, max_new_tokens=request.max_new_tokens)
    output = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
    )
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    ended = tokens[-1] in model.generation_config.eos_token_id
    return (tokens[:-1], True) if ended else (tokens, False)


@pytest.mark.parametrize("batch_tokens", [1, 80, 4096])
def test_equals_generate_of_each_prompt(model, tokenizer, batch_tokens):
    responses = generate(model, tokenizer, REQUESTS, batch_tokens=batch_tokens)
    assert [response.id for response in responses] == [request.id for request in REQUESTS]
    endings = set()
    for request, response in zip(REQUESTS, responses, strict=True):
        tokens, finished = one_at_a_time(model, tokenizer, request)
        assert response.text == tokenizer.decode(tokens, skip_special_tokens=True), request.id
        assert (response.tokens, response.finished) == ((len(tokens),), finished), request.id
        endings.add((len(tokens), finished))
    assert len(endings) > 2, "the prompts of this test must end at different times"
    assert {finished for _, finished in endings} == {True, False}


def test_ended_prompts_leave_the_batch(tokenizer, monkeypatch):
    model = tiny_model("llama", tokenizer, seed=0)
    rows = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **kw: rows.append(len(kw["input_ids"])) or forward(**kw)
    )
    generate(model, tokenizer, [Request(str(n), "x", max_new_tokens=n) for n in (1, 2, 4)])
    assert rows == [3, 2, 1, 1]


def test_sampling_defaults_of_the_checkpoint_do_not_act(model, tokenizer):
    expected = generate(model, tokenizer, REQUESTS)
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=3, min_length=20
    )
    assert generate(model, tokenizer, REQUESTS) == expected


def test_without_a_chat_template_the_context_is_as_it_is(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    plain = Request("q", "Hello?", max_new_tokens=9)
    chat = Request("q", "Hello?", max_new_tokens=9, chat=True)
    assert generate(model, tokenizer, [chat]) == generate(model, tokenizer, [plain])


def test_a_prompt_longer_than_the_model_loses_its_left(model, tokenizer):
    model.config.max_position_embeddings = 20
    long = generate(model, tokenizer, [Request("q", "0123456789abcdefghij", max_new_tokens=8)])
    short = generate(model, tokenizer, [Request("q", "89abcdefghij", max_new_tokens=8)])
    assert long == short


def test_models_whose_tokens_depend_on_their_batch_decode_alone(model, tokenizer, monkeypatch):
    sizes = []
    decode = module._decode
    monkeypatch.setattr(
        module,
        "_decode",
        lambda *args: sizes.append(len(args[2])) or decode(*args),
    )
    monkeypatch.setattr(module, "independent", lambda model: False)
    generate(model, tokenizer, REQUESTS)
    assert sizes == [1] * len(REQUESTS)


def test_a_stop_text_ends_an_answer_and_is_left_out(tokenizer):
    model = tiny_model("llama", tokenizer, seed=0)
    free = generate(model, tokenizer, [Request("q", "Once upon", max_new_tokens=30)])[0]
    stop = free.text[5:7]
    first = free.text.index(stop)
    request = Request("q", "Once upon", max_new_tokens=30, stop=("never to be seen", stop))
    stopped = generate(model, tokenizer, [request, Request("r", "x", max_new_tokens=9)])[0]
    assert stopped.text == free.text[:first]
    assert stopped.finished
    assert stopped.tokens[0] < 30


SHOTS = "Q: What is it?\nA: A stone.\n\nQ: And that?\nA: A river.\n\n"


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_a_common_beginning_is_read_once(family, tokenizer, monkeypatch):
    """Where attention has windows (gpt-oss) or layers carry a state (Qwen3-Next), it is not."""
    model = tiny_model(family, tokenizer, seed=0)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    asked = ["Q: Who?\nA:", "Q: Where is the long river?\nA:", "Q: W"]
    requests = [Request(a, SHOTS + a, max_new_tokens=12) for a in asked]
    expected = [one_at_a_time(model, tokenizer, request) for request in requests]
    read = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **kw: read.append(kw["input_ids"].numel()) or forward(**kw)
    )
    found = generate(model, tokenizer, requests)
    for response, (tokens, finished) in zip(found, expected, strict=True):
        assert response.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert response.finished == finished
    longest = max(map(len, asked))
    if family in ("gpt_oss", "qwen3_next"):
        assert max(read) >= len(SHOTS) + len(asked[2])
    else:
        # One token per byte; "Q: W" is common too, but for the token that "Q: W" itself needs.
        assert read[:2] == [len(SHOTS) + 3, 3 * (longest - 3)]


def test_a_step_copies_no_keys_and_repeats_no_heads(tokenizer):
    """The cache is the same memory from step to step, and attention that of transformers."""
    from transformers.cache_utils import DynamicCache

    model = tiny_model("llama", tokenizer, seed=0)
    config = model.config
    assert config.num_attention_heads > config.num_key_value_heads
    ids = torch.tensor([tokenizer("abcdef")["input_ids"], tokenizer("uvwxyz")["input_ids"]])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0

    def run(cache, prepared):
        logits = []
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            prepared(cache)
            grown, new = mask, ids[:, :1]
            for _ in range(3):
                grown = torch.cat([grown, grown.new_ones(2, 1)], dim=1)
                out = model(new, attention_mask=grown, past_key_values=cache)
                logits.append(out.logits)
                new = out.logits[:, -1:].argmax(-1)
        return torch.cat(logits, dim=1)

    expected = run(DynamicCache(config=config), lambda cache: None)
    cache, places = DynamicCache(config=config), []

    def prepared(cache):
        make_room(cache, 3)
        places.extend(layer.keys.data_ptr() for layer in cache.layers)

    with grouped_heads():
        found = run(cache, prepared)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    kept = [layer.keys[1:] for layer in cache.layers]
    cache.batch_select_indices(torch.tensor([1]))
    for layer, keys in zip(cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
