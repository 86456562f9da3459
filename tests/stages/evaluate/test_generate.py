"""Batched greedy decoding is ``generate`` of one prompt at a time."""

import pytest
from transformers import GenerationConfig

from stages.evaluate import generate as module
from stages.evaluate.base import Request
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
