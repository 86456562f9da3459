"""Packed scoring is scoring each choice alone, and both are a plain loop over full logits."""

import dataclasses
import inspect

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from stages.errors import BadInput
from stages.evaluate.base import Request
from stages.evaluate.scorer import Encoded, build_tree, encode, packable_length, score
from stages.models import families
from stages.models.tiny import tiny_model, tiny_tokenizer

FAMILIES = ("llama", "mixtral", "qwen2_moe")
REQUESTS = [
    Request("lengths", "The sky is", (" blue", " a very long story indeed", " x")),
    Request(
        "shared prefixes", "Answer:", (" the cat", " the cow", " a dog", " the", " the cat sat")
    ),
    Request("single tokens", "Text: dull\nSentiment: ", ("a", "b", "c")),
    Request("empty", "", ("abc", "abd")),
    Request("spaces only", "  ", ("abc", "x")),
    Request("chat", "Hello?", ("Hi.", "No."), chat=True),
    Request("chat words", "Sentiment:", (" good", " bad", " "), chat=True),
    Request("one choice", "A passage that is somewhat longer than the others.", (" Yes",)),
]


ROLES = "{% for m in messages %}{% if m.role == 'user' %}"
TEMPLATES = {
    # An answer begins with a blank, and a prompt ends without one.
    "[INST] Is it? [/INST] {}": ROLES + (
        "[INST] {{ m.content }} [/INST]{% else %}{{ ' ' + m.content }}</s>{% endif %}{% endfor %}"),
    # The prompt opens a thought; answers stand after it.
    "<u>Is it?<a>{}": ROLES + (
        "<u>{{ m.content }}{% else %}<a>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<a><think>\n{% endif %}"),
    # Harmony: the prompt ends before the name of a channel.
    ("<|start|>user<|message|>Is it?<|end|><|start|>assistant<|channel|>final"
     "<|message|>{}"): ROLES + (
        "<|start|>user<|message|>{{ m.content }}<|end|>{% else %}<|start|>assistant<|channel|>final"
        "<|message|>{{ m.content }}<|return|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"),
}


@pytest.mark.parametrize("text", TEMPLATES)
def test_choices_stand_where_a_chat_template_puts_an_answer(text):
    """Whatever its prompts for generation end with; a judge's words are taken as they are."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[text]

    def read(request):
        return [tokenizer.decode(choice.tokens) for choice in encode(tokenizer, request, 999)]

    for choices in (("Yes", "No"), (" Yes", " No")):
        assert read(Request("a", "Is it?", choices, chat=True)) == [
            text.format("Yes"), text.format("No")]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "So"}],
        tokenize=False, add_generation_prompt=True)
    assert read(Request("a", "Is it?", (" safe",), chat=True, reply="So")) == [asked + " safe"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tokenizer):
    return tiny_model(request.param, tokenizer, seed=0)


def naive(model, context: list[int], choice: list[int]) -> float:
    """The definition: one sequence, all logits, the sum over the choice's tokens."""
    with torch.no_grad():
        logprobs = model(torch.tensor([context + choice])).logits[0].log_softmax(-1)
    return sum(logprobs[len(context) + i - 1, token].item() for i, token in enumerate(choice))


def byte_pair(request: Request, tokenizer) -> list[tuple[list[int], list[int]]]:
    """Context and choices of a request as tokens, for a tokenizer of one token per byte."""
    context = request.context
    if request.chat:
        context = f"<|im_start|>user\n{context}<|im_end|>\n<|im_start|>assistant\n"
    head = tokenizer(context.rstrip())["input_ids"] or [tokenizer.bos_token_id]
    tail = context[len(context.rstrip()) :]
    choices = request.choices
    if request.id == "chat words":  # the assistant's turn begins without the blank
        choices = ("good", "bad", " ")
    return [(head, tokenizer(tail + choice)["input_ids"]) for choice in choices]


def assert_logprobs(responses, expected, tolerance=1e-5):
    for response, values in zip(responses, expected, strict=True):
        assert response.logprobs == pytest.approx(values, abs=tolerance), response.id


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("row_tokens", [1, 60, 4096])
def test_equals_a_plain_loop(model, tokenizer, packed, row_tokens):
    responses = score(model, tokenizer, REQUESTS, packed=packed, row_tokens=row_tokens)
    pairs = [byte_pair(request, tokenizer) for request in REQUESTS]
    assert [r.id for r in responses] == [r.id for r in REQUESTS]
    assert [r.tokens for r in responses] == [tuple(len(t) for _, t in p) for p in pairs]
    assert_logprobs(responses, [[naive(model, c, t) for c, t in p] for p in pairs])


def test_a_question_does_not_depend_on_its_neighbours(model, tokenizer):
    together = score(model, tokenizer, REQUESTS)
    alone = [score(model, tokenizer, [request])[0] for request in REQUESTS]
    backwards = score(model, tokenizer, REQUESTS[::-1])[::-1]
    assert_logprobs(together, [response.logprobs for response in alone])
    assert_logprobs(together, [response.logprobs for response in backwards])


def test_choices_share_the_context_and_their_first_tokens():
    context = [1, 2, 3]
    choices = [context + c for c in ([7, 8, 5], [6], [7, 4, 9])]
    tree = build_tree(0, {i: Encoded(tokens, 3) for i, tokens in enumerate(choices)})
    # Last tokens are never read, so the tree is 1 2 3 7 with the children 4 and 8 of the 7.
    assert tree.tokens == [1, 2, 3, 7, 4, 8]
    assert tree.depths == [0, 1, 2, 3, 4, 4]
    assert tree.ends == [6, 6, 6, 6, 5, 6]
    assert sorted(tree.targets) == [
        (2, 6, 1), (2, 7, 0), (2, 7, 2), (3, 4, 2), (3, 8, 0), (4, 9, 2), (5, 5, 0),
    ]  # fmt: skip


def test_a_pass_reads_the_context_once_and_only_the_needed_logits(tokenizer, monkeypatch):
    model = tiny_model("llama", tokenizer, seed=0)
    calls = []
    forward = model.forward

    def recorded(*args, input_ids, logits_to_keep=0, **kwargs):
        output = forward(*args, input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)
        calls.append((input_ids.shape[1], output.logits.shape[1]))
        return output

    recorded.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", recorded)
    score(model, tokenizer, [Request("q", "x" * 50, ("a", "b", "c")), Request("r", "yy", ("dd",))])
    # 50 tokens of the first context and nothing of its choices; 2 + 1 of the second question.
    assert calls == [(53, 3)]


def merging_tokenizer():
    """Merges "lo", "wor" and "ld" wherever they meet, even over a cut; no beginning token."""
    symbols = ["<s>", *"helowrd: ", "lo", "wo", "wor", "ld"]
    merges = [("l", "o"), ("w", "o"), ("wo", "r"), ("l", "d")]
    backend = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")


def test_choices_that_change_the_context_tokens_are_cut_as_lm_eval_does():
    tokenizer = merging_tokenizer()
    model = tiny_model("llama", tiny_tokenizer(), seed=0)
    request = Request("merge", "hel", ("lo wor", "o", "d:h"))

    def ids(*symbols):
        return tokenizer.convert_tokens_to_ids(list(symbols))

    # After the three tokens of "hel" the harness scores what "hello wor" and "held:h" have left.
    # "helo" has three tokens itself, so what the choice adds is the merged one.
    expected = [
        naive(model, ids("h", "e", "l"), ids("lo", " ", "wor")),
        naive(model, ids("h", "e"), ids("lo")),
        naive(model, ids("h", "e", "ld"), ids(":", "h")),
    ]
    for packed in (True, False):
        response = score(model, tokenizer, [request], packed=packed)[0]
        assert response.logprobs == pytest.approx(expected, abs=1e-5)
        assert response.tokens == (3, 1, 2)


def test_empty_context_without_a_beginning_token_starts_at_the_end_token():
    tokenizer = merging_tokenizer()
    assert tokenizer.bos_token is None
    model = tiny_model("llama", tiny_tokenizer(), seed=0)
    response = score(model, tokenizer, [Request("q", "", ("hello",))])[0]
    tokens = tokenizer("hello")["input_ids"]
    assert response.logprobs[0] == pytest.approx(naive(model, [0], tokens), abs=1e-5)


def test_a_context_longer_than_the_model_loses_its_left(tokenizer):
    model = tiny_model("llama", tokenizer, seed=0)
    model.config.max_position_embeddings = 10
    response = score(model, tokenizer, [Request("q", "0123456789abcdef", ("xy", "zzzz"))])[0]
    ids = {text: tokenizer(text)["input_ids"] for text in ("789abcdef", "9abcdef", "xy", "zzzz")}
    expected = [
        naive(model, ids["789abcdef"], ids["xy"]),
        naive(model, tokenizer("9abcdef")["input_ids"], ids["zzzz"]),
    ]
    assert response.logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("choice", "count"), [("", 0), ("0123456789ab", 12)])
def test_a_choice_without_a_score_is_refused(tokenizer, choice, count):
    model = tiny_model("llama", tokenizer, seed=0)
    model.config.max_position_embeddings = 10
    with pytest.raises(BadInput, match=f"request q7: choice {choice!r} has {count} tokens"):
        score(model, tokenizer, [Request("q7", "Why?", (" because", choice))])


def small(name: str, tokenizer, **fields):
    config = AutoConfig.for_model(
        name, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=2, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_soft_capping_and_sliding_windows_are_the_models_own(tokenizer):
    # Gemma 2 caps its logits and runs on the eager attention; a window of 12 tokens is narrower
    # than some of the questions, which are then scored one choice at a time.
    model = small("gemma2", tokenizer, sliding_window=12, final_logit_softcapping=2.0)
    assert packable_length(model) == 12
    requests = [r for r in REQUESTS if not r.chat]
    pairs = [byte_pair(request, tokenizer) for request in requests]
    lengths = {len(context + choice) for pair in pairs for context, choice in pair}
    assert min(lengths) < 12 < max(lengths)
    expected = [[naive(model, c, t) for c, t in pair] for pair in pairs]
    assert_logprobs(score(model, tokenizer, requests), expected)


def test_a_family_whose_experts_have_a_capacity_is_never_packed(tokenizer, monkeypatch):
    model = tiny_model("mixtral", tokenizer, seed=0)
    assert packable_length(model) > 0
    entry = dataclasses.replace(families.FAMILIES["mixtral"], capacity=True)
    monkeypatch.setitem(families.FAMILIES, "mixtral", entry)
    assert packable_length(model) == 0


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("falcon", {"alibi": True}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_positions_that_depend_on_the_row_are_never_packed(name, fields):
    shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}

    def length(**fields):
        config = AutoConfig.for_model(name, **shape, **fields)
        return packable_length(AutoModelForCausalLM.from_config(config))

    assert length() > 0
    assert length(**fields) == 0


def test_a_stored_wish_for_router_logits_is_no_hindrance(tokenizer):
    model = tiny_model("mixtral", tokenizer, seed=0)
    expected = score(model, tokenizer, REQUESTS[:2])
    model.config.output_router_logits = True
    assert score(model, tokenizer, REQUESTS[:2]) == expected


def test_bfloat16_log_softmax_is_in_float32(tokenizer):
    model = tiny_model("llama", tokenizer, seed=0).to(torch.bfloat16)
    request = Request("q", "Answer:", ("a", "b"))
    with torch.no_grad():
        logits = model(tokenizer("Answer:", return_tensors="pt")["input_ids"]).logits[0, -1]
    expected = logits.float().log_softmax(-1)[tokenizer("ab")["input_ids"]].tolist()
    response = score(model, tokenizer, [request], packed=False)[0]
    assert response.logprobs == pytest.approx(expected, abs=1e-6)


def test_same_numbers_as_lm_evaluation_harness(model, tokenizer):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    peer = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    # The harness has no chat turns in a request and fails on a context of spaces only.
    requests = [r for r in REQUESTS if not r.chat and r.id != "spaces only"]
    instances = [
        Instance("loglikelihood", {}, (r.context, choice), i)
        for r in requests
        for i, choice in enumerate(r.choices)
    ]
    values = iter(value for value, _ in peer.loglikelihood(instances, disable_tqdm=True))
    expected = [[next(values) for _ in request.choices] for request in requests]
    assert_logprobs(score(model, tokenizer, requests), expected, tolerance=1e-4)
