"""Where vLLM is installed, for CPUs too: it loads exported folders, with transformers' logits."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from pipeline.export import export
from pipeline.store import Store
from pipeline.sweep import EvaluateResources
from stages.evaluate.base import Request
from stages.evaluate.spec import EvaluateSpec
from stages.evaluate.techniques import SelfConsistency, applied
from stages.evaluate.vllm_requests import Interpreter
from stages.models.size import measure
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY

FAMILIES = ("llama", "mixtral", "olmoe", "qwen2_moe")
TEXTS = ("Hello?", "Once upon a time", "The quick fox")
DRAWN = 2000


def for_vllm(family: str) -> dict:
    """What vLLM asks of a tiny shape: heads of 32 or more on the CPU, and of OLMoE a head that does
    not share the embedding, as in all released ones."""
    return TINY[family] | {"num_attention_heads": 2, "num_key_value_heads": 1,
                           "tie_word_embeddings": family != "olmoe"}


@pytest.fixture
def exported(tmp_path, monkeypatch, request):
    """The folder that ``export`` writes of a tiny model."""
    family = request.param
    monkeypatch.setitem(TINY, family, for_vllm(family))
    store, tokenizer = Store(str(tmp_path / "store")), tiny_tokenizer()
    with store.attempt("model/x@1") as (attempt, output):
        model = tiny_model(family, tokenizer, seed=0)
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        measure(model, "tiny").write(output)
    store.commit("model/x@1", {"attempt": attempt, "commit": None})
    export(store, "model/x@1", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("exported", FAMILIES, indirect=True)
def test_vllm_itself_loads_an_exported_folder_and_draws_as_its_logits_say(exported, monkeypatch):
    """All next-token log-probabilities of some texts; drawn tokens follow them, and their seeds."""
    vllm = pytest.importorskip("vllm")
    from pipeline.vllm_engine import engine_arguments

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    # In this process: the engine's own would find no place for the tests' modules.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    interpreter = Interpreter(exported)
    spec = EvaluateSpec(evaluation={"kind": "perplexity", "in_domain": ["d"]})
    arguments = engine_arguments(spec, EvaluateResources(), interpreter.config, 64)
    engine = vllm.LLM(str(exported), max_logprobs=-1, enforce_eager=True, **arguments)
    model = AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float32, use_safetensors=True).eval()

    def answers(requests: list[Request], **more) -> list:
        asked = [vllm.SamplingParams(**interpreter.sampling(each) | more) for each in requests]
        prompts = [{"prompt_token_ids": interpreter.prompt(each)} for each in requests]
        return [answer.outputs[0] for answer in
                engine.generate(prompts, asked, use_tqdm=False)]

    asked = [Request(text, text, max_new_tokens=1) for text in TEXTS]
    expected = {}
    for request, answer in zip(asked, answers(asked, logprobs=-1), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([interpreter.prompt(request)])).logits[0, -1]
        expected[request.id] = logits.double()
        found = {token: each.logprob for token, each in answer.logprobs[0].items()}
        assert len(found) == len(logits)
        found = torch.tensor([found[token] for token in range(len(logits))], dtype=torch.double)
        assert float((found - logits.double().log_softmax(-1)).abs().max()) < 1e-4

    drawn = applied(SelfConsistency(kind="self_consistency", samples=DRAWN, temperature=1.5),
                    [Request("drawn", TEXTS[0], max_new_tokens=1)])
    tokens = [answer.token_ids[0] for answer in answers(drawn)]
    # The seeds are the requests' own: order and neighbours change nothing.
    some = drawn[100:0:-1]
    assert [answer.token_ids[0] for answer in answers(some)] == tokens[100:0:-1]
    assert fit(tokens, expected[TEXTS[0]], 1.5) > 1e-3
    assert fit(tokens, expected[TEXTS[0]], 1.0) < 1e-6  # so many draws tell temperatures apart


def fit(tokens: list[int], logits: torch.Tensor, temperature: float) -> float:
    """p-value of Pearson's test that tokens were drawn at a temperature.

    Tokens that are expected fewer than five times are one class.
    """
    expected = len(tokens) * (logits / temperature).softmax(-1).numpy()
    counts = np.bincount(tokens, minlength=len(expected))
    common = expected >= 5
    classes = [[*each[common], each[~common].sum()] for each in (counts, expected)]
    assert math.isclose(sum(classes[1]), len(tokens))
    return float(stats.chisquare(*classes).pvalue)
