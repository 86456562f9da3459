"""Heads in float32 on models in bfloat16: what they give is what float32 makes of the last hidden
states, and nothing else of a model changes."""

import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.evaluate.base import Request
from stages.evaluate.decoding import EarlyExits
from stages.evaluate.engine import Engine
from stages.evaluate.scorer import score
from stages.evaluate.techniques import Contrastive, DoLa, applied
from stages.models.classifier import register
from stages.models.families import FAMILIES
from stages.models.float32_head import with_float32_head
from stages.models.load import load
from stages.models.roles import head_of
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY

TOKENIZER = tiny_tokenizer()
IDS = torch.tensor([[5, 6, 7, 8]])
REQUESTS = [
    Request("a", "Answer:", ("A", "B")),
    Request("b", "The sky is", (" blue", " green as grass")),
]


def write(folder, seed=0, tied=False):
    """A model whose logits are about 15, and those of A and B nearly equal."""
    model = tiny_model("llama", TOKENIZER, seed=seed)
    if not tied:
        model.config.tie_word_embeddings = False
        drawn = model.lm_head.weight.detach()
        weight = drawn * 15 / drawn.norm(dim=1).mean()
        a, b = TOKENIZER("AB")["input_ids"]
        weight[b] = weight[a]
        weight[b, 0] *= 1 + 2**-7  # the next number in bfloat16
        model.lm_head.weight = torch.nn.Parameter(weight)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"))


@torch.no_grad()
def test_logits_are_those_of_a_float32_head_on_the_hidden_states(folder):
    plain, model = load(folder, dtype="bfloat16"), Engine(folder, dtype="bfloat16").model
    hidden = plain.model(IDS).last_hidden_state
    logits = model(IDS).logits
    assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
    expected = linear(hidden.float(), plain.lm_head.weight.float())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert 10 < expected.abs().amax() < 100
    # Of 259 tokens no two are alike, and in bfloat16 many are.
    last = expected[0, -1]
    assert len(last.unique()) == len(last) == 259
    assert len(plain(IDS).logits[0, -1].unique()) < 240


def test_close_choices_do_not_tie(folder):
    a, b = Engine(folder, dtype="bfloat16").respond(REQUESTS)[0].logprobs
    half = score(load(folder, dtype="bfloat16"), TOKENIZER, REQUESTS[:1])[0].logprobs
    full = Engine(folder).respond(REQUESTS)[0].logprobs
    assert half[0] == half[1]
    assert a != b and (a > b) == (full[0] > full[1])


def test_an_embedding_that_is_tied_to_the_head_stays_as_it_is(tmp_path):
    folder = write(tmp_path, tied=True)
    plain, model = load(folder, dtype="bfloat16"), Engine(folder, dtype="bfloat16").model
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    assert model.lm_head.weight.dtype == torch.float32
    rest = dict(plain.named_parameters())
    own = {n: p for n, p in model.named_parameters() if n != "lm_head.weight"}
    assert own.keys() == rest.keys()
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, rest[n]) for n, p in own.items())
    with torch.no_grad():
        assert torch.equal(plain.model(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_model_in_float32_is_left_untouched(folder, tmp_path):
    for place in (folder, write(tmp_path, tied=True)):
        plain, model = load(place), Engine(place).model
        assert not model.lm_head._forward_pre_hooks
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert Engine(place).respond(REQUESTS) == score(plain, TOKENIZER, REQUESTS)


def half_of(name, tmp_path):
    """A tiny model of a family as it is loaded in bfloat16."""
    if name in TINY:
        model = tiny_model(name, TOKENIZER, seed=0)
    else:
        shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
        if name == "opt":
            shape |= {"word_embed_proj_dim": 32, "ffn_dim": 64}
        elif name not in ("gpt2", "gpt_neox"):
            shape |= {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
        shape |= {"gemma2": {"final_logit_softcapping": 0.5}, "granite": {"logits_scaling": 3.0},
                  "cohere": {"logit_scale": 0.25}}.get(name, {})  # fmt: skip
        config = AutoConfig.for_model(name, vocab_size=len(TOKENIZER), pad_token_id=0, **shape)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    return load(tmp_path, dtype="bfloat16")


AFTER_THE_HEAD = {
    "gemma2": lambda logits: 0.5 * torch.tanh(logits / 0.5),
    "granite": lambda logits: logits / 3,
    "cohere": lambda logits: logits / 4,
}
DENSE = ("cohere", "gemma2", "gpt2", "gpt_neox", "granite", "opt")


@pytest.mark.parametrize(
    "name", [*sorted(n for n in TINY if FAMILIES[n].modality == "text"), *DENSE]
)
@torch.no_grad()
def test_every_family_asks_its_head_in_float32(name, tmp_path):
    model = half_of(name, tmp_path)
    inputs = {"input_ids": IDS, "use_cache": False}
    if FAMILIES[name].encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    hidden = []
    hook = head_of(model).register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    before = model(**inputs).logits
    hook.remove()
    weight, bias = head_of(model).weight, getattr(head_of(model), "bias", None)
    expected = linear(hidden[0].float(), weight.float(), None if bias is None else bias.float())
    expected = AFTER_THE_HEAD.get(name, lambda logits: logits)(expected)
    logits = with_float32_head(model)(**inputs).logits
    assert before.dtype == hidden[0].dtype == model.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert 1e-5 < (before.float() - logits).abs().max() < 0.1


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
@torch.no_grad()
def test_earlier_layers_go_through_the_same_head(name, tmp_path):
    exits = EarlyExits(with_float32_head(half_of(name, tmp_path)))
    with exits.recorded((1,), torch.tensor([1, 3])) as hidden:
        exits.model(IDS, use_cache=False)
    expected = linear(exits.norm(hidden[1]).float(), head_of(exits.model).weight)
    expected = AFTER_THE_HEAD.get(name, lambda logits: logits)(expected)
    torch.testing.assert_close(exits.logits(hidden[1]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "olmoe"])  # olmoe's head is this project's
@torch.no_grad()
def test_classification_heads_compute_in_float32(name, tmp_path):
    config = tiny_model(name, TOKENIZER, seed=0).config
    config.num_labels = 3
    register(name)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    engine = Engine(tmp_path, dtype="bfloat16")
    (response,) = engine.respond([Request("a", "A good film", head=True)])
    model = engine.head.model
    hidden = model.model(TOKENIZER("A good film", return_tensors="pt")["input_ids"])[0][0, -1]
    assert hidden.dtype == torch.bfloat16
    weight = load(tmp_path).score.weight.bfloat16().float()
    assert response.outputs == pytest.approx(linear(hidden.float(), weight).tolist(), abs=1e-6)


def test_techniques_ask_such_heads(folder, tmp_path):
    amateur = write(tmp_path, seed=1)
    engine = Engine(folder, dtype="bfloat16", amateurs={"small": amateur})
    dola = DoLa(kind="dola", candidate_layers=(1, 2))
    contrast = Contrastive(kind="contrastive", amateur="small", alpha=0)
    for technique in (dola, contrast):
        a, b = engine.respond(applied(technique, REQUESTS))[0].logprobs
        assert a != b
    heads = [model.lm_head.weight.dtype for model in engine.predictors[contrast].models]
    assert heads == [torch.float32] * 2
