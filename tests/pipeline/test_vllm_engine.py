"""Generations by vLLM through Ray Data: planned, refused, answered, resumed."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import vllm_stand_in
from smoke import ROOT, SMOKE
from test_plan import changed, plan_of
from test_vllm_itself import FAMILIES, for_vllm

from pipeline import vllm_engine
from pipeline.checks import check
from pipeline.evaluate import run_pass
from pipeline.gpu_memory import check_memory
from pipeline.job import Job, Outcome, run_stage
from pipeline.plan import Plan, build
from pipeline.store import Store
from pipeline.sweep import EvaluateResources
from pipeline.sweep_file import load
from stages.errors import BadInput
from stages.evaluate import stage
from stages.evaluate.base import Request
from stages.evaluate.engine import Engine
from stages.evaluate.shards import plan_shards, requests_from_table
from stages.evaluate.spec import EvaluateSpec
from stages.evaluate.techniques import SelfConsistency, applied
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY

VLLM = "generation_engine=vllm"
NAMES = ("refusal", "words", "questions")
SAMPLED = "{kind: self_consistency, samples: 2, temperature: 2.0}"
MODERN = ROOT / "sweeps" / "moe_rbench" / "modern.yaml"


@pytest.fixture
def there(monkeypatch):
    """As if vLLM were installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "vllm" or found(name))


def refused(*overrides: str) -> str:
    sweep = load(SMOKE, [VLLM, *overrides])
    with pytest.raises(BadInput) as caught:
        check(sweep, SMOKE)
    return str(caught.value)


def test_the_engine_makes_stale_what_it_writes_and_nothing_else(there):
    gpus = "resources.evaluate.gpus=2"
    texts = {f"evaluate/{label}-refusal" for label in
             ("tiny-none", "tiny-moe-none", "tiny-sft-seed0", "tiny-moe-sft-seed0")}
    assert changed(VLLM, base=(gpus,)) == texts | {"compare/smoke"}
    assert changed("resources.evaluate.expert_parallel=true", base=(gpus, VLLM)) == set()
    counted = "evaluations.refusal.technique={kind: expert_count, top_k: 1}"
    more = "evaluations.words={kind: refusal, harmful: [harmful], benign: [benign]}"
    nodes = plan_of(VLLM, gpus, counted, more).nodes
    # The dense partner is asked plainly, but by the engine that answers for the other.
    assert {nodes[f"evaluate/{m}-none-refusal"].spec.engine for m in ("tiny", "tiny-moe")} == {
        "transformers"}
    assert nodes["evaluate/tiny-none-words"].spec.engine == "vllm"


def test_what_vllm_cannot_do_is_refused_before_any_work(there, monkeypatch):
    told = refused()
    assert ("resources.evaluate.gpus: 0 is less than the whole GPU that vLLM takes; set it to 1 or "
            "more, or generation_engine to transformers") in told
    assert "resources.evaluate.cpus: 0.5 is less than the whole CPU" in refused(
        "resources.evaluate.cpus=0.5", "resources.evaluate.gpus=1")
    one = ("resources.evaluate.gpus=1",)
    check(load(SMOKE, [VLLM, *one]), SMOKE)
    assert "expert_parallel: needs several GPUs of an actor" in refused(
        *one, "resources.evaluate.expert_parallel=true")
    assert "vLLM would write nothing" in refused(
        *one, "evaluations.refusal.technique={kind: dola}")
    assert "temperature: vLLM takes up to 2, not 2.5" in refused(
        *one, "evaluations.refusal.technique={kind: self_consistency, temperature: 2.5}")
    told = refused(*one, "models.tiny-moe={source: 'tiny:llama_moe'}")
    assert ("generation_engine: tiny-moe is of the llama_moe architecture: it is a class of this "
            "project, which other programs lack; use transformers") in told
    assert ("tiny-moe is of the phimoe architecture: vLLM has no class of its own for it; use "
            "transformers") in refused(*one, "models.tiny-moe={source: 'tiny:phimoe'}")
    monkeypatch.undo()
    if importlib.util.find_spec("vllm") is None:
        assert "not installed; `pip install 'moe-reliability[vllm]'`" in refused(*one)
    sweep = load(SMOKE, ["resources.evaluate.expert_parallel=true"])
    with pytest.raises(BadInput, match="expert_parallel: acts in vLLM alone"):
        check(sweep, SMOKE)


def test_gpus_must_hold_a_model_and_divide_its_heads(there, tmp_path):
    store = Store(str(tmp_path))

    def memory(*overrides: str) -> None:
        # Its first evaluation that writes texts, on Mixtral-8x7B beside Mistral-7B.
        file = MODERN
        sweep = load(file, [VLLM, *overrides])
        check_memory(build(sweep, check(sweep, file)), store, file.parent, file)

    with pytest.raises(BadInput) as caught:
        memory("resources.evaluate.gpus=3", "resources.evaluate.gpu_memory_gb=80")
    line = next(text for text in str(caught.value).splitlines() if "mixtral-8x7b" in text)
    assert line == (
        f"{MODERN}: resources.evaluate.gpus: mixtral-8x7b has 32 attention heads, which vLLM "
        "cannot deal out evenly to 3 GPUs; set it to one of 1, 2, 4, 8, 16, 32")
    with pytest.raises(BadInput) as caught:
        memory("resources.evaluate.gpus=1", "resources.evaluate.gpu_memory_gb=40")
    # 93.4 GB of weights, 32 GB a GPU to spare: three would do, four divide the heads.
    assert ("mixtral-8x7b has 46.7 B parameters, 93.4 GB in bfloat16; 1 × 40 GB less a fifth "
            "cannot hold them; set it to 4") in str(caught.value)
    memory("resources.evaluate.gpus=4", "resources.evaluate.gpu_memory_gb=40")


def test_arguments_of_the_engine_follow_the_sweep():
    spec = EvaluateSpec(evaluation={"kind": "perplexity", "in_domain": ["d"]}, dtype="bfloat16")
    resources = EvaluateResources(gpus=4, cpus=2, workers=3, expert_parallel=True)
    moe = {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4}
    found = vllm_engine.engine_arguments(spec, resources, moe, 77)
    assert found == {
        "dtype": "bfloat16", "tensor_parallel_size": 4, "enable_expert_parallel": True,
        "max_model_len": 77, "generation_config": "vllm", "disable_log_stats": True}
    dense = {"model_type": "llama", "num_hidden_layers": 2}
    assert not vllm_engine.engine_arguments(spec, resources, dense, 77)["enable_expert_parallel"]


def ready(tmp_path: Path) -> tuple[Plan, Store]:
    """A plan with vLLM of the smoke sweep without fine-tunes, whose data and models are in a store.

    No GPU is asked for, which a sweep with vLLM may not do.
    """
    sweep = load(SMOKE, ["recipes={}", "evaluations.words={kind: refusal, harmful: [harmful], "
                         f"benign: [benign], max_new_tokens: 6, technique: {SAMPLED}}}",
                         "resources.evaluate={workers: 1, cpus: 1, shard_size: 4}"])
    contents = check(sweep, SMOKE)
    plan = build(sweep.model_copy(update={"generation_engine": "vllm"}), contents)
    store = Store(str(tmp_path / "store"))
    needed = plan.needs({f"evaluate/tiny-moe-none-{name}" for name in NAMES})
    for key in plan.nodes:  # in their order
        if key in needed and key.startswith(("data/", "model/")):
            outcome = run_stage(Job.of(plan.nodes[key], plan, store, SMOKE.parent))
            assert outcome.status == "done", outcome.message
    return plan, store


def answers(plan: Plan, store: Store, names: tuple[str, ...]) -> dict[str, Outcome]:
    """Outcomes of one pass over the evaluations of the Mixture-of-Experts model."""
    keys = [f"evaluate/tiny-moe-none-{name}" for name in names]
    outcomes = run_pass([Job.of(plan.nodes[key], plan, store, SMOKE.parent) for key in keys])
    return {name: outcomes[key] for name, key in zip(names, keys, strict=True)}


def responses(plan: Plan, store: Store) -> dict[Path, int]:
    """The stored files of what vLLM was asked, and how many responses are in each."""
    return {
        path: len(pd.read_parquet(path))
        for name in ("refusal", "words")
        for path in Path(
            store.path(plan.nodes[f"evaluate/tiny-moe-none-{name}"].folder)).glob("responses/*")
    }


def by_transformers(plan: Plan, store: Store, name: str, output: Path) -> pd.DataFrame:
    """The scores of the same evaluation, answered in this process."""
    node = plan.nodes[f"evaluate/tiny-moe-none-{name}"]
    inputs = {role: store.fetch(plan.nodes[key].folder) for role, key in node.inputs.items()}
    output.mkdir()
    stage.run(node.spec.model_copy(update={"engine": "transformers"}), inputs, output)
    return pd.read_parquet(output / "scores.parquet")


def test_one_pass_gives_each_engine_its_shards_and_a_failure_is_told(
        cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_engine, "build_processor", vllm_stand_in.build_processor)
    plan, store = ready(tmp_path)
    expected = {name: by_transformers(plan, store, name, tmp_path / name) for name in NAMES}
    folder = store.fetch(plan.nodes["model/tiny-moe"].folder)
    requests = requests_from_table(pq.read_table(tmp_path / "refusal" / "requests.parquet"))
    prompts = [vllm_engine.Interpreter(folder).prompt(request) for request in requests]
    lengths = [len(prompt) for prompt in prompts]
    odd = next(length for length in lengths if lengths.count(length) == 1)
    (folder / "fails").write_text(str(odd))
    outcomes = answers(plan, store, NAMES)
    assert outcomes["questions"].status == "done"  # answered by an actor with transformers
    assert outcomes["refusal"].status == outcomes["words"].status == "failed"
    assert outcomes["refusal"].message == (
        "vLLM did not answer 1 of the 4 requests of a shard, first "
        f"{requests[lengths.index(odd)].id}: ValueError: too odd; run again, what is stored stays")
    # Run again, the shards with the failures are asked anew, and nothing else.
    (folder / "fails").unlink()
    before, stored = (folder / "asked").read_text().splitlines(), responses(plan, store)
    assert {o.status for o in answers(plan, store, ("refusal", "words")).values()} == {"done"}
    again = [json.loads(line) for line in (folder / "asked").read_text().splitlines()]
    asked = sum(len(each["prompts"]) for each in again[len(before):])
    complete = responses(plan, store)
    assert stored.items() <= complete.items()
    assert 3 * len(requests) > sum(stored.values()) > 0
    assert sum(complete.values()) - sum(stored.values()) == asked
    assert sum(complete.values()) == 3 * len(requests)  # two samples of the words
    assert again[0]["arguments"]["tensor_parallel_size"] == 1
    for name in NAMES:  # greedy, and sampled with each request's own seed
        found = store.fetch(plan.nodes[f"evaluate/tiny-moe-none-{name}"].folder)
        pd.testing.assert_frame_equal(pd.read_parquet(found / "scores.parquet"), expected[name])


def test_an_engine_that_dies_again_and_again_fails_its_own_nodes_only(
        cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_engine, "build_processor", vllm_stand_in.build_processor)
    plan, store = ready(tmp_path)
    folder = store.fetch(plan.nodes["model/tiny-moe"].folder)
    dies = folder / "dies"
    dies.write_text("always")
    outcomes = answers(plan, store, ("refusal", "questions"))
    assert outcomes["questions"].status == "done"
    assert outcomes["refusal"].status == "failed"
    assert "the traceback is in" in outcomes["refusal"].message
    # Which requests wait when it dies is Ray's affair; none is tried more often than that.
    tried = Counter((folder / "asked").read_text().splitlines())
    assert tried and max(tried.values()) <= 1 + vllm_engine.RESTARTS
    # One that dies once is started anew and asked again.
    dies.write_text("once")
    assert answers(plan, store, ("refusal",))["refusal"].status == "done"
    assert not dies.exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_itself_answers_as_transformers_do(cluster, tmp_path, monkeypatch, family):
    """Where vLLM is installed, for CPUs too: greedy answers are the same but where the two best
    tokens are within 1e-4."""
    pytest.importorskip("vllm")
    monkeypatch.setitem(TINY, family, for_vllm(family))
    monkeypatch.setitem(vllm_engine.ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    arguments = vllm_engine.engine_arguments
    monkeypatch.setattr(vllm_engine, "engine_arguments",
                        lambda *given: arguments(*given) | {"enforce_eager": True})
    store, tokenizer = Store(str(tmp_path / "store")), tiny_tokenizer()
    with store.attempt("model/x@1") as (attempt, output):
        model = tiny_model(family, tokenizer, seed=0)
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(60, 70)]
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    store.commit("model/x@1", {"attempt": attempt})
    requests = [
        Request(f"r{n}", text, max_new_tokens=20, chat=n % 2 == 0, stop=("8",) if n % 3 else ())
        for n, text in enumerate(["Hello?", "x", "Once upon a time", "The quick fox", "", "1"])
    ]
    drawn = applied(SelfConsistency(kind="self_consistency", samples=2, temperature=2.0),
                    [Request("drawn", "Hello?", max_new_tokens=20)])
    spec = EvaluateSpec(evaluation={"kind": "perplexity", "in_domain": ["d"]}, shard_size=4)
    written = {}
    response = vllm_engine.Interpreter.response
    monkeypatch.setattr(
        vllm_engine.Interpreter, "response", lambda self, request, tokens: written.update(
            {request.id: list(tokens)}) or response(self, request, tokens))
    found = {}
    for _, answered in vllm_engine.answer(
            plan_shards([*requests, *drawn], 4), store, "model/x@1", spec, EvaluateResources()):
        assert not answered.failures
        found |= {each.id: each for each in answered.responses}
    assert written.keys() == found.keys() == {request.id for request in (*requests, *drawn)}
    assert written["drawn#sample0"] != written["drawn#sample1"]  # by seeds of their own
    engine = Engine(store.fetch("model/x@1"), threads=1)
    interpreter = vllm_engine.Interpreter(store.fetch("model/x@1"))
    for request, expected in zip(requests, engine.respond(requests), strict=True):
        if found[request.id] != expected:
            prompt, tokens = interpreter.prompt(request), written[request.id]
            assert_tie(engine, prompt, tokens)


def assert_tie(engine: Engine, prompt: list[int], tokens: list[int]) -> None:
    """The first token that is not the best one is within 1e-4 of it."""
    import torch

    with torch.inference_mode():
        logits = engine.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    behind = logits.amax(-1) - chosen
    assert float(behind[behind > 0][0]) < 1e-4
