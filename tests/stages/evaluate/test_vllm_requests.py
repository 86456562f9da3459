"""What vLLM is asked, and that its tokens make the responses that our own decoding gives."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stages.errors import StageFailed
from stages.evaluate.base import Request
from stages.evaluate.decoding import Sampler
from stages.evaluate.engines import by_vllm, lacks, takes
from stages.evaluate.generate import generate
from stages.evaluate.harness import Harness, HarnessTask, LmEval
from stages.evaluate.safety import Refusal
from stages.evaluate.spec import EvaluateSpec
from stages.evaluate.stage import run
from stages.evaluate.techniques import SelfConsistency, applied, sample_seed
from stages.evaluate.truthfulness import MultipleChoice
from stages.evaluate.vllm_requests import Interpreter
from stages.models.families import FAMILIES
from stages.models.tiny import tiny_model, tiny_tokenizer

REQUESTS = [
    Request("chat", "Hello?", max_new_tokens=9, chat=True),
    Request("ends", "x", max_new_tokens=24),
    Request("stops", "Once upon a time", max_new_tokens=24, stop=("8", "x")),
    Request("empty", "", max_new_tokens=5),
    Request("too long", "word " * 100, max_new_tokens=9),
]
SAMPLING = SelfConsistency(kind="self_consistency", samples=2, temperature=0.5, seed=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model some of whose bytes end a text, and its folder."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), tiny_tokenizer()
    model = tiny_model("llama", tokenizer, seed=0)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(60, 90)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


def obeying(model, prompt: list[int], sampling: dict, tokenizer) -> list[int]:
    """What an engine does that is told so: ``generate`` of transformers, one prompt at a time, to
    the token that ends it or completes a stop text."""
    assert sampling["temperature"] == 0 and sampling["ignore_eos"]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=sampling["max_tokens"],
        eos_token_id=sampling["stop_token_ids"], pad_token_id=0,
    )  # fmt: skip
    tokens = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
    tokens = tokens.tolist()
    for count in range(1, len(tokens) + 1):
        if any(stop in tokenizer.decode(tokens[:count]) for stop in sampling["stop"]):
            return tokens[:count]
    return tokens


def test_an_engine_that_does_as_it_is_told_gives_the_responses_of_our_own(tiny):
    model, tokenizer, folder = tiny
    interpreter = Interpreter(folder)
    expected = generate(model, tokenizer, REQUESTS)
    for request, response in zip(REQUESTS, expected, strict=True):
        prompt, sampling = interpreter.prompt(request), interpreter.sampling(request)
        assert len(prompt) + request.max_new_tokens <= model.config.max_position_embeddings
        tokens = obeying(model, prompt, sampling, tokenizer)
        assert interpreter.response(request, tokens) == response, request.id
    assert len(expected[-1].text) > 0
    found = {each.id: each for each in expected}
    assert {each.finished for each in expected} == {True, False}
    assert found["stops"].finished and not set("8x") & set(found["stops"].text)


def test_end_tokens_and_stop_texts_end_an_answer_and_are_no_part_of_it(tiny):
    _, tokenizer, folder = tiny
    interpreter = Interpreter(folder)
    a, b, end = tokenizer("a b", add_special_tokens=False)["input_ids"][0], 100, 60
    plain = Request("plain", "x", max_new_tokens=4)
    for tokens, count, finished in (
        ([a, b], 2, False), ([a, b, end], 2, True), ([end], 0, True), ([a, end, b], 3, False),
    ):  # fmt: skip
        response = interpreter.response(plain, tokens)
        assert (response.tokens, response.finished) == ((count,), finished)
    word = tokenizer("12. 3", add_special_tokens=False)["input_ids"]
    stopped = interpreter.response(Request("s", "x", max_new_tokens=9, stop=(".",)), word)
    assert (stopped.text, stopped.finished, stopped.tokens) == ("12", True, (len(word),))


def test_greedy_is_temperature_zero_and_samples_carry_seeds_of_their_own(tiny):
    _, tokenizer, folder = tiny
    interpreter = Interpreter(folder)
    assert interpreter.sampling(Request("g", "x", max_new_tokens=7, stop=("\n", "Q:"))) == {
        "temperature": 0.0, "seed": 0, "max_tokens": 7, "ignore_eos": True,
        "stop_token_ids": sorted({tokenizer.eos_token_id, *range(60, 90)}),
        "stop": ["\n", "Q:"], "detokenize": True, "skip_special_tokens": False,
    }  # fmt: skip
    asked = applied(SAMPLING, [Request("q", "x", max_new_tokens=7)])
    drawn = [interpreter.sampling(request) for request in asked]
    assert [each["temperature"] for each in drawn] == [0.5, 0.5]
    seeds = [each["seed"] for each in drawn]
    assert seeds == [Sampler(0.5, 3, f"q#sample{n}").generator.initial_seed() for n in (0, 1)]
    assert seeds[0] != seeds[1] and seeds[0] == sample_seed(3, "q#sample0") < 2**63


def refusal(**technique) -> Refusal:
    return Refusal(harmful=("h",), benign=("b",), technique=technique or None)


def test_vllm_writes_plain_and_sampled_texts_of_checkpoints_and_nothing_else():
    assert by_vllm(refusal())
    assert by_vllm(refusal(kind="self_consistency"))
    assert not by_vllm(refusal(kind="dola"))
    assert not by_vllm(refusal(kind="contrastive", amateur="small"))
    assert not by_vllm(refusal(kind="expert_count", top_k=1))
    assert not by_vllm(MultipleChoice(dataset="d"))
    mixed = Harness(version="1", digest="d", tasks=tuple(
        HarnessTask(name=kind, output_types=(kind,), measures=())
        for kind in ("generate_until", "multiple_choice")))  # fmt: skip
    harness = LmEval(task="t", harness=mixed)
    assert by_vllm(harness) and not harness.generates
    text = Request("r", "x", max_new_tokens=3)
    assert takes(text)
    assert all(map(takes, applied(SAMPLING, [text])))
    assert not any(map(takes, applied(refusal(kind="dola").technique, [text])))
    for other in (
        {"choices": ("a",)}, {"window": 5}, {"head": True}, {"procedure": "{}"}, {"model": "judge"},
    ):  # fmt: skip
        assert not takes(Request("r", "x", **other)), other


def test_architectures_that_vllm_lacks_say_why():
    assert lacks(FAMILIES["llama"]) == lacks(FAMILIES["mixtral"]) == ""
    assert "class of this project" in lacks(FAMILIES["llama_moe"])
    assert "encoder-decoder" in lacks(FAMILIES["switch_transformers"])
    named = {name for name, entry in FAMILIES.items() if entry.no_vllm}
    assert named == {"aria_text", "axk2", "bailing_hybrid", "dots1", "flint", "jetmoe", "minimax",
                     "phimoe", "solar_open"}  # fmt: skip
    assert all(lacks(FAMILIES[name]).startswith("vLLM has no class") for name in named)


def test_architectures_that_vllm_lacks_are_those_of_its_registry():
    """Where vLLM is installed."""
    registry = pytest.importorskip("vllm").ModelRegistry
    classes = {name: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name) for name in FAMILIES}
    there = set(registry.get_supported_archs())
    for name, entry in FAMILIES.items():
        if classes[name] and not entry.no_export and entry.modality == "text":
            assert bool(entry.no_vllm) == (classes[name] not in there), name


def test_without_ray_there_is_no_vllm(tmp_path):
    with pytest.raises(StageFailed, match="engine: vllm runs under Ray"):
        run(EvaluateSpec(evaluation=refusal(), engine="vllm"), {}, tmp_path)
