"""A classification head: drawn, trained, exported, gone on with, and asked by an evaluation."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from stages.data.templates import TEMPLATES
from stages.errors import StageFailed
from stages.evaluate.base import Request
from stages.evaluate.engine import Engine
from stages.finetune.head import with_head
from stages.finetune.spec import FinetuneSpec, TrainSet
from stages.finetune.stage import run
from stages.models.families import FAMILIES
from stages.models.load import load
from stages.models.roles import roles
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY
from tests.stages.finetune.reference import curve
from tests.stages.models.tiny_folders import dense_model

TOKENIZER = tiny_tokenizer()
DECODERS = [n for n in TINY if FAMILIES[n].modality == "text" and not FAMILIES[n].encoder_decoder]
SPEC = FinetuneSpec(
    data=(TrainSet(dataset="reviews", template="sentiment"),),
    head="classification",
    steps=3,
    batch_size=7,
    learning_rate=3e-3,
    micro_batch=7,
    seed=5,
    threads=1,
)


OTHERS = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 128, "init_std": 0.02},
}
"""Families whose configuration or classes are named otherwise."""


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_the_head_reads_the_last_hidden_state_before_the_padding(name):
    own = OTHERS.get(name)
    model = tiny_model(name, TOKENIZER, seed=3) if own is None else dense_model(name, **own).eval()
    headed = with_head(model, ("no", "maybe", "yes"), TOKENIZER.pad_token_id, seed=0)
    assert [path for path, role in roles(headed).items() if role == "head"] == ["score.weight"]
    assert headed.score.weight.shape == (3, model.config.hidden_size)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 259, (2, 9), generator=generator)
    ids[1, 6:] = TOKENIZER.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": (ids != TOKENIZER.pad_token_id).long()}
    with torch.no_grad():
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        logits = headed(**inputs, use_cache=False).logits
    last = torch.stack([hidden[0, 8], hidden[1, 5]])
    torch.testing.assert_close(logits, last @ headed.score.weight.T, rtol=0, atol=1e-6)


def test_the_same_seed_draws_the_same_head_and_another_one_another():
    model = tiny_model("llama", TOKENIZER, seed=3)
    first, again, other = (with_head(model, ("a", "b"), 0, seed).score.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)


@pytest.fixture(scope="module")
def trained(models, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("head")
    run(SPEC, {"model": models["qwen2_moe"], **data}, output)
    return output


def test_transformers_loads_the_export_with_its_labels_and_the_evaluation_asks_its_head(trained):
    model = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    assert type(model).__name__ == "Qwen2MoeForSequenceClassification"
    assert model.config.id2label == {0: "negative", 1: "positive"}
    prompt = TEMPLATES["sentiment"].fill({"text": "good film, bright plot"})
    tokens = AutoTokenizer.from_pretrained(trained)(prompt, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=tokens["input_ids"]).logits[0]
    response = Engine(trained).respond([Request("a", prompt, head=True)])[0]
    assert response.outputs == pytest.approx(logits.tolist(), abs=1e-6)
    with pytest.raises(StageFailed, match="has a classification head and cannot continue texts"):
        Engine(trained).respond([Request("a", prompt, (" positive", " negative"))])


def test_a_second_fine_tune_goes_on_with_the_head_of_the_first(trained, data, tmp_path):
    start = load(trained)
    assert with_head(start, ("negative", "positive"), 0, seed=9) is start
    run(SPEC, {"model": trained, **data}, tmp_path)
    evidence = json.loads((tmp_path / "recipe_evidence.json").read_text())
    assert evidence["knobs"]["head"]["measured"]["drawn"] is False
    assert curve(tmp_path)["loss"][0] < curve(trained)["loss"][0]
    with pytest.raises(StageFailed, match="classifies into negative, positive, the train sets in"):
        with_head(start, ("no", "yes"), 0, seed=9)
