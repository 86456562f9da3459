import json
import shutil
import subprocess
import sys

import pytest

from stages.data.packs import PACKS
from stages.models.sources import Facts, check, content, describe
from stages.models.spec import EveryNth, LastN, SourceSpec, UpcycleSpec, WidenSpec
from stages.models.tiny_shapes import TINY
from tests.stages.models.tiny_folders import llama_folder

CONFIG = {"model_type": "llama", "num_hidden_layers": 30, "intermediate_size": 1536}
DENSE = Facts("dense", "llama", layers=30, experts=0, top_k=0, moe_layers=(), config=CONFIG)


def facts_of(**config):
    return Facts("dense", config["model_type"], config.get("num_hidden_layers"), config=config)


def test_planning_imports_neither_torch_nor_transformers():
    code = (
        "import sys, stages.models.sources, stages.models.stage\n"
        "print([m for m in ('torch', 'transformers', 'safetensors') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.strip() == "[]", printed.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pak:smollm2", "m.source: unknown scheme 'pak' (nearest: pack)"),
        ("smollm2", "m.source: unknown scheme 'smollm2'"),
        ("pack:smolm2", "m.source: unknown model pack 'smolm2' (nearest: smollm2)"),
        ("tiny:mixtrl", "m.source: unknown tiny family 'mixtrl' (nearest: mixtral)"),
        ("hub:owner/name", "m.source: 'hub:owner/name' is not hub:OWNER/NAME@REVISION"),
        ("hub:name@main", "m.source: 'hub:name@main' is not hub:OWNER/NAME@REVISION"),
        ("file:/no/such/folder", "m.source: folder /no/such/folder does not exist"),
    ],
)
def test_wrong_sources_are_named(source, message):
    assert check(SourceSpec(source=source), "m").startswith(message)


@pytest.mark.parametrize("source", ["pack:smollm2", "hub:a-b/c.d@refs/pr/3", "tiny:qwen2_moe"])
def test_right_sources_pass(source):
    assert check(SourceSpec(source=source), "m") is None


def test_a_folder_needs_a_known_configuration_and_safetensors(tmp_path):
    def reason():
        return check(SourceSpec(source=f"file:{tmp_path}"), "m")

    assert "has no config.json" in reason()
    config = tmp_path / "config.json"
    config.write_text("{")
    (tmp_path / "pytorch_model.bin").touch()
    assert "has no *.safetensors" in reason()
    (tmp_path / "model.safetensors").touch()
    assert "config.json: Expecting property name" in reason()
    config.write_text(json.dumps({"architectures": ["X"]}))
    assert "config.json: model_type None is not a known architecture" in reason()
    config.write_text(json.dumps({"model_type": "lama"}))
    assert "model_type 'lama' is not a known architecture (nearest: llama)" in reason()
    config.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    assert reason() is None


@pytest.mark.parametrize(
    ("spec", "dense", "message"),
    [
        (UpcycleSpec(experts=2, top_k=3), DENSE, "m.top_k: 3 is more than the 2 experts"),
        (
            UpcycleSpec(layers=(4, 30)),
            DENSE,
            "m.layers: 30 is no layer of the dense model; use 0 to 29",
        ),
        (UpcycleSpec(layers=(-1,)), Facts(), "m.layers: -1 is no layer"),
        (UpcycleSpec(layers=(4, 4)), DENSE, "m.layers: names a layer twice"),
        (WidenSpec(layers=()), DENSE, "m.layers: is empty"),
        (WidenSpec(layers=(30,)), DENSE, "m.layers: 30 is no layer"),
        (UpcycleSpec(), facts_of(model_type="gpt2"), "m: its dense model is of the gpt2 arch"),
        (WidenSpec(), facts_of(model_type="gpt2"), "m: its dense model is of the gpt2 arch"),
        (WidenSpec(), Facts("moe", "mixtral", 4), "m: its dense model is a Mixture-of-Experts"),
        (UpcycleSpec(layers=EveryNth(every=31)), DENSE, "m.layers.every: 31 is more than the"),
        (UpcycleSpec(layers=LastN(last=31)), DENSE, "m.layers.last: 31 is more than the dense"),
        (UpcycleSpec(rescale=True), DENSE, "m.rescale: the weights of whole copies sum to 1"),
        (UpcycleSpec(router="centroid"), DENSE, "m.router: copies all have the same centroid"),
        (UpcycleSpec(router="zero"), Facts(), "m.router: zero sends every token to the same 2"),
        (
            UpcycleSpec(experts_from="random_split", drop=0.5),
            DENSE,
            "m.drop: the experts of a split share no neuron",
        ),
        (
            UpcycleSpec(experts_from="clustered_split", experts=7),
            DENSE,
            "m.experts: 7 does not divide the 1536 neurons of a feed-forward block",
        ),
        (UpcycleSpec(drop=1e-4), DENSE, "m.drop: 0.0001 of 1536 neurons is none; raise it"),
        (
            UpcycleSpec(layers=(1,)),
            facts_of(model_type="olmo2", num_hidden_layers=4),
            "m.layers: no architecture has the norms of olmo2 and both",
        ),
        (
            UpcycleSpec(),
            facts_of(model_type="llama", mlp_bias=True),
            "m: its dense model has mlp_bias, which mixtral cannot hold",
        ),
        (
            UpcycleSpec(layers=(1,)),
            facts_of(model_type="mistral", num_hidden_layers=4, sliding_window=9),
            "m: its dense model attends to a sliding window of 9 in some layers, which qwen2_moe",
        ),
    ],
)
def test_wrong_twins_are_named(spec, dense, message):
    assert check(spec, "m", dense).startswith(message)


def test_right_twins_pass():
    assert check(UpcycleSpec(layers=(0, 29), experts=2), "m", DENSE) is None
    assert check(UpcycleSpec(layers=(99,)), "m", Facts()) is None  # a hub model not yet seen
    assert check(WidenSpec(), "m", DENSE) is None
    split = {"experts_from": "random_split", "experts": 8}
    assert check(UpcycleSpec(**split, rescale=True, router="centroid"), "m", DENSE) is None
    assert check(UpcycleSpec(**split, top_k=8, router="zero"), "m", DENSE) is None
    assert check(UpcycleSpec(layers=(1,)), "m", facts_of(model_type="olmo2")) is None
    window = facts_of(model_type="mistral", num_hidden_layers=4, sliding_window=9)
    assert check(UpcycleSpec(layers=LastN(last=4)), "m", window) is None


def test_facts_without_weights(tmp_path):
    def facts(source):
        return describe(SourceSpec(source=source))

    assert facts("pack:smollm2") == DENSE
    assert facts("tiny:llama") == Facts("dense", "llama", 4, 0, 0, ())
    assert facts("tiny:mixtral") == Facts("moe", "mixtral", 4, 4, 2, (0, 1, 2, 3))
    assert facts("tiny:qwen2_moe") == Facts("moe", "qwen2_moe", 4, 4, 2, (1, 3))
    assert facts("hub:a/b@main") == Facts()
    # Of released models, without a network, what is entered in known.py.
    assert facts("hub:mistralai/Mixtral-8x7B-v0.1@main") == Facts(
        "moe", "mixtral", 32, 8, 2, tuple(range(32)))
    switch = facts("hub:google/switch-base-32@main")
    assert (switch.family, switch.layers, switch.experts, switch.top_k) == (
        "switch_transformers", 24, 32, 1)
    assert switch.reads_first and facts("hub:google-t5/t5-base@main").reads_first
    assert facts("hub:EleutherAI/pythia-1.4b@main") == Facts("dense", "gpt_neox", 24, 0, 0, ())
    assert facts("hub:ibm/MoLM-700M-4B@main") == Facts("moe", "moduleformer")
    assert facts("hub:llama-moe/LLaMA-MoE-v1-3_5B-2_8@main") == Facts("moe", "llama_moe")
    assert facts("hub:ibm/MoLM-700M-8B@main") == Facts()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe", "num_experts": 8}))
    assert facts(f"file:{tmp_path}") == Facts("moe", "olmoe", None, 8, None, None)
    some = describe(UpcycleSpec(layers=(4, 9), experts=8), DENSE)
    assert some == Facts("moe", "qwen2_moe", 30, 8, 2, (4, 9))
    every = describe(UpcycleSpec(), DENSE)
    assert (every.family, every.moe_layers) == ("mixtral", tuple(range(30)))
    assert describe(UpcycleSpec(), Facts()) == Facts("moe", None, None, 4, 2, None)
    assert describe(UpcycleSpec(layers=EveryNth(every=10)), DENSE).moe_layers == (9, 19, 29)
    assert describe(UpcycleSpec(layers=LastN(last=2)), DENSE).moe_layers == (28, 29)
    for name, layers, family in (
        ("qwen3", (1,), "qwen3_moe"),
        ("qwen2", "all", "qwen2_moe"),
        ("olmo2", "all", "flex_olmo"),
        ("gpt_neox", "all", "gpt_neox_moe"),
        ("mistral", (0, 1, 2), "mixtral"),
    ):
        dense = facts_of(model_type=name, num_hidden_layers=3)
        assert describe(UpcycleSpec(layers=layers), dense).family == family
    assert describe(WidenSpec(), DENSE) == DENSE


def test_a_widened_model_is_split_by_the_neurons_that_it_then_has():
    wide = describe(WidenSpec(top_k=2, layers=(0, 1, 2)), DENSE)
    assert wide.config["intermediate_size"] == 1536 + 154  # 3 × 1536 / 30 = 153.6
    split = UpcycleSpec(experts_from="random_split", experts=8)
    assert check(split, "m", DENSE) is None
    assert "does not divide the 1690 neurons" in check(split, "m", wide)


def test_facts_of_tiny_models_are_those_of_their_cards(tmp_path):
    from stages.models.card import ModelCard
    from stages.models.stage import run

    for name in TINY:
        spec = SourceSpec(source=f"tiny:{name}")
        (tmp_path / name).mkdir()
        run(spec, {}, tmp_path / name)
        card = ModelCard.read(tmp_path / name)
        shown = Facts(
            card.architecture, card.family, card.layers, card.experts, card.top_k, card.moe_layers
        )
        assert describe(spec) == shown


def test_the_digest_follows_the_content_and_not_the_place(tmp_path):
    folder = llama_folder(tmp_path / "one", hidden_size=256, intermediate_size=1024)
    weights = folder / "model.safetensors"
    assert weights.stat().st_size > 2**22  # large enough to be sampled

    def digest(path):
        return content(SourceSpec(source=f"file:{path}"))

    before = digest(folder)
    assert digest(shutil.copytree(folder, tmp_path / "two")) == before
    data = bytearray(weights.read_bytes())
    for at in range(10**5, len(data), 10**5):
        data[at] ^= 1
    weights.write_bytes(data)
    trained = digest(folder)
    (folder / "config.json").write_text("{}")
    assert len({before, trained, digest(folder)}) == 3
    assert content(SourceSpec(source="tiny:llama")) is None
    assert content(SourceSpec(source="pack:smollm2")) == PACKS["smollm2"].sha256
