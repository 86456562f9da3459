"""Inference techniques against their definitions, and plain scoring untouched by them."""

import math

import pandas as pd
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from transformers import AutoModelForSequenceClassification

from stages.errors import StageFailed
from stages.evaluate.base import Request
from stages.evaluate.decoding import (
    MASKED,
    EarlyExits,
    LayerContrast,
    ModelContrast,
    Plain,
    Sampler,
    expert_count,
    jensen_shannon,
    layer_contrast,
    model_contrast,
    reversed_jensen_shannon,
)
from stages.evaluate.engine import Engine
from stages.evaluate.generate import generate
from stages.evaluate.out_of_distribution import OutOfDistribution
from stages.evaluate.scorer import score
from stages.evaluate.techniques import (
    Contrastive,
    DoLa,
    ExpertCount,
    SelfConsistency,
    applied,
    candidates,
)
from stages.models.classifier import register
from stages.models.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHOICES = [
    Request("a", "The sky is", (" blue", " green as grass")),
    Request("b", "Answer:", (" the cat", " the cow", " a dog")),
]
PROMPTS = [
    Request("g", "Once upon", max_new_tokens=8),
    Request("h", "Hello there, you", max_new_tokens=5),
]
DOLA = DoLa(kind="dola", candidate_layers=(1, 2, 3))


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


# --- divergences on toy distributions ---------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ((0.5, 0.5), (0.5, 0.5)),
        ((0.9, 0.1), (0.1, 0.9)),
        ((0.7, 0.2, 0.1), (0.1, 0.2, 0.7)),
        ((1.0, 0.0), (0.0, 1.0)),
        ((1 - 1e-12, 1e-12), (1e-12, 1 - 1e-12)),
    ],
)
def test_divergence_is_scipys(p, q):
    expected = jensenshannon(p, q) ** 2  # SciPy gives the distance, its square root, in nats
    assert float(jensen_shannon(*logs(p, q))) == pytest.approx(expected, abs=1e-12)


def test_the_published_codes_divergence_is_another_one_and_chooses_another_layer():
    last = logs((0.5, 0.499, 0.001))[0]
    # The first candidate lacks mass where the last layer has much, the second where it has little.
    early = logs((0.05, 0.9, 0.05), (0.5, 0.5 - 1e-9, 1e-9))
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))  # noqa: E731
    p = last.exp().tolist()
    for number, q in enumerate(early.exp().tolist()):
        mean = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        assert float(reversed_jensen_shannon(last, early)[number]) == pytest.approx(
            (kl(mean, p) + kl(mean, q)) / 2
        )
    early = logs((0.2, 0.799, 0.001), (0.5, 0.5 - 1e-250, 1e-250))
    assert int(jensen_shannon(last, early).argmax()) == 0
    assert int(reversed_jensen_shannon(last, early).argmax()) == 1


def test_a_tokens_score_is_the_gain_over_the_most_different_layer():
    last = logs((0.6, 0.3, 0.1))[0]
    early = logs((0.5, 0.3, 0.2), (0.1, 0.3, 0.6))  # the second differs more
    plain, chosen = layer_contrast(last, early, DoLa(kind="dola"))
    assert plain.tolist() == pytest.approx([math.log(6), 0, -math.log(6)])
    assert int(chosen) == 1
    # 0.1 is less than 0.4 of 0.6; 0.3 is not.
    cut, _ = layer_contrast(last, early, DoLa(kind="dola", relative_top=0.4))
    assert cut.tolist() == pytest.approx([math.log(6), 0, MASKED])


def test_contrast_of_two_models_by_hand():
    expert, amateur = logs((0.5, 0.4, 0.1)), logs((0.8, 0.1, 0.1))
    technique = Contrastive(kind="contrastive", amateur="a", alpha=0.5, beta=1.0)
    # 0.5² / 0.8 = 5/16 and 0.4² / 0.1 = 8/5, the third being too improbable: shares 25 : 128.
    expected = [math.log(25 / 153), math.log(128 / 153), MASKED]
    assert model_contrast(expert, amateur, technique)[0].tolist() == pytest.approx(expected)
    off = Contrastive(kind="contrastive", amateur="a", alpha=0, beta=0)
    assert torch.allclose(model_contrast(expert, amateur, off), expert)


def test_candidate_layers():
    high, low = DoLa(kind="dola"), DoLa(kind="dola", candidate_layers="low")
    assert candidates(high, 32, tied=False) == (16, 18, 20, 22, 24, 26, 28, 30)
    assert candidates(high, 30, tied=True) == (16, 18, 20, 22, 24, 26, 28)
    assert candidates(low, 8, tied=False) == (0, 2)
    assert candidates(low, 8, tied=True) == (2,)
    assert candidates(DoLa(kind="dola", candidate_layers=(3, 1)), 4, tied=True) == (1, 3)
    with pytest.raises(StageFailed, match="candidate_layers .* from 0 to 3"):
        candidates(DoLa(kind="dola", candidate_layers=(4,)), 4, tied=True)


# --- models -----------------------------------------------------------------------------------


def reversed_distance(p, q) -> float:
    mean = (p + q) / 2
    return float((mean * (mean / p).log()).mean() + (mean * (mean / q).log()).mean()) / 2


# How different two distributions are, and what stands before the head of an earlier layer: the
# paper's, and those of the authors' code.
DIFFERENCES = {
    "dola": (jensenshannon, lambda model, hidden: model.model.norm(hidden)),
    "dola_original": (reversed_distance, lambda model, hidden: hidden),
}


def reference_dola(
    model, context: str, choice: str, layers, kind="dola"
) -> tuple[float, list[int]]:
    """One sequence, hidden states as transformers gives them, norm and head by hand; the score and
    the layer chosen for each token."""
    difference, before_head = DIFFERENCES[kind]
    ids = TOKENIZER(context + choice, return_tensors="pt")["input_ids"]
    start = len(TOKENIZER(context)["input_ids"])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        total, chosen = 0.0, []
        for place in range(start, ids.shape[1]):
            last = model.lm_head(hidden[-1][0, place - 1]).log_softmax(-1)
            early = [
                model.lm_head(before_head(model, hidden[layer][0, place - 1])).log_softmax(-1)
                for layer in layers
            ]
            distance = [difference(last.exp(), each.exp()) for each in early]
            furthest = max(range(len(early)), key=lambda i: distance[i])
            chosen.append(layers[furthest])
            total += float(last[ids[0, place]] - early[furthest][ids[0, place]])
    return total, chosen


@pytest.mark.parametrize("kind", ["dola", "dola_original"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe"])
def test_dola_scores_equal_a_plain_loop(name, kind):
    model = tiny_model(name, TOKENIZER, seed=0)
    predictor = LayerContrast(model, DOLA.model_copy(update={"kind": kind}))
    for packed in (True, False):
        responses = score(model, TOKENIZER, CHOICES, predictor=predictor, packed=packed)
        for request, response in zip(CHOICES, responses, strict=True):
            context, layers = request.context, DOLA.candidate_layers
            found = [reference_dola(model, context, c, layers, kind) for c in request.choices]
            assert response.logprobs == pytest.approx([total for total, _ in found], abs=1e-4)
            assert response.layers == tuple(layer for _, chosen in found for layer in chosen)
    assert score(model, TOKENIZER, CHOICES)[0].layers == ()


def test_the_layer_contrasted_for_each_written_token_is_recorded():
    model = tiny_model("llama", TOKENIZER, seed=0)
    predictor = LayerContrast(model, DOLA)
    answered = generate(model, TOKENIZER, PROMPTS, predictor=predictor)
    for request, response in zip(PROMPTS, answered, strict=True):
        ids, chosen = TOKENIZER(request.context)["input_ids"], []
        for _ in range(response.tokens[0]):
            with torch.no_grad():
                inputs = {"input_ids": torch.tensor([ids])}
                scores = predictor.scores(inputs, torch.tensor([len(ids) - 1]))
            chosen.append(int(predictor.contrasted[0, 0]))
            ids.append(int(scores[0, 0].argmax()))
        assert response.layers == tuple(chosen) and chosen
    assert generate(model, TOKENIZER, PROMPTS)[0].layers == ()


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "gpt2", "granite", "opt", "cohere"])
def test_early_exits_go_through_the_models_own_head(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
    if name in ("gemma2", "granite", "cohere"):
        shape |= {"num_key_value_heads": 2, "intermediate_size": 64}
    if name == "gemma2":
        shape |= {"head_dim": 8, "final_logit_softcapping": 2.0}
    if name == "granite":
        shape |= {"logits_scaling": 3.0}
    if name == "opt":
        shape |= {"word_embed_proj_dim": 32, "ffn_dim": 64}
    config = AutoConfig.for_model(name, vocab_size=len(TOKENIZER), pad_token_id=0, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    exits = EarlyExits(model)  # compares the last layer's exit with the model's logits
    where = torch.tensor([1, 3])
    with torch.no_grad(), exits.recorded((0, 2), where) as hidden:
        model(torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    with torch.no_grad():
        early = {layer: exits.logits(state) for layer, state in hidden.items()}
        again = model(torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits
    assert early[0].shape == (1, 2, len(TOKENIZER))
    assert not torch.allclose(early[2], again[:, where])
    if name == "gemma2":
        assert early[2].abs().max() < 2.0


def greedy(model, request, scores) -> str:
    """Decoding without a cache, one prompt at a time."""
    ids = TOKENIZER(request.context)["input_ids"]
    answer = []
    for _ in range(request.max_new_tokens):
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor([ids + answer])}
            token = int(scores(inputs, torch.tensor([len(ids + answer) - 1]))[0, 0].argmax())
        if token == TOKENIZER.eos_token_id:
            break
        answer.append(token)
    return TOKENIZER.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("top", [0.0, 0.1])
def test_generation_under_a_technique_is_step_by_step_decoding(top):
    model, amateur = (tiny_model("llama", TOKENIZER, seed=seed) for seed in (0, 1))
    plain = [r.text for r in generate(model, TOKENIZER, PROMPTS)]
    dola = LayerContrast(model, DOLA.model_copy(update={"relative_top": top}))
    contrast = ModelContrast(
        model, amateur, Contrastive(kind="contrastive", amateur="a", alpha=top, beta=2.0)
    )
    for predictor in (dola, contrast):
        texts = [r.text for r in generate(model, TOKENIZER, PROMPTS, predictor=predictor)]
        assert texts == [greedy(model, request, predictor.scores) for request in PROMPTS]
        assert texts != plain


def test_contrastive_without_contrast_is_plain_scoring():
    model, amateur = (tiny_model("llama", TOKENIZER, seed=seed) for seed in (0, 1))
    off = ModelContrast(
        model, amateur, Contrastive(kind="contrastive", amateur="a", alpha=0, beta=0)
    )
    plain = score(model, TOKENIZER, CHOICES)
    for a, b in zip(plain, score(model, TOKENIZER, CHOICES, predictor=off), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    on = ModelContrast(model, amateur, Contrastive(kind="contrastive", amateur="a", alpha=0))
    contrasted = score(model, TOKENIZER, CHOICES, predictor=on)
    assert contrasted[0].logprobs != pytest.approx(plain[0].logprobs, abs=1e-2)


def test_an_amateur_may_have_other_rows_beyond_the_tokens():
    """As checkpoints of one tokenizer whose embeddings are filled up to other sizes."""
    model = tiny_model("llama", TOKENIZER, seed=0)
    amateur = tiny_model("llama", TOKENIZER, seed=1)
    technique = Contrastive(kind="contrastive", amateur="a")
    expected = score(model, TOKENIZER, CHOICES, predictor=ModelContrast(model, amateur, technique))
    amateur.resize_token_embeddings(len(TOKENIZER) + 8, mean_resizing=False)
    with torch.no_grad():
        amateur.lm_head.weight[len(TOKENIZER):] = 9.0
    found = score(model, TOKENIZER, CHOICES, predictor=ModelContrast(model, amateur, technique))
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "moduleformer"])
def test_expert_count_is_a_model_of_that_configuration(name):
    model = tiny_model(name, TOKENIZER, seed=0)
    before = score(model, TOKENIZER, CHOICES)
    config = model.config.to_dict()
    for count in (1, 2, 3, 4):
        names = ("k_att", "k_mlp") if name == "moduleformer" else ("num_experts_per_tok",)
        other = type(model)(type(model.config)(**(config | dict.fromkeys(names, count))))
        other.load_state_dict(model.state_dict())
        expected = score(other.eval(), TOKENIZER, CHOICES)
        with expert_count(model, ExpertCount(kind="expert_count", top_k=count)):
            found = score(model, TOKENIZER, CHOICES)
        assert found == expected
        assert (found == before) == (count == 2)
    assert score(model, TOKENIZER, CHOICES) == before


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])  # olmoe's head is this project's
def test_expert_count_acts_under_a_classification_head(name, tmp_path):
    config = tiny_model(name, TOKENIZER, seed=0).config
    config.num_labels = 3
    register(name)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    trained = config.num_experts_per_tok
    for count in (1, 2, 4):
        model.config.num_experts_per_tok = count
        model.save_pretrained(tmp_path / str(count))
        TOKENIZER.save_pretrained(tmp_path / str(count))
    evaluation = OutOfDistribution(
        in_distribution="a", out_of_distribution=("b",), template="nli", method="head",
        technique={"kind": "expert_count", "top_k": 1},
    )  # fmt: skip
    rows = pd.DataFrame(
        {"id": ["1", "2"], "premise": ["It rains.", "Ann sings."], "label": "neutral",
         "hypothesis": ["It is wet.", "A bird sings."]}
    )  # fmt: skip
    asked = evaluation.requests({"a": rows, "b": rows.assign(hypothesis="It is dry.")})
    engine = Engine(tmp_path / str(trained))
    plain = engine.respond(asked)
    for count in (1, 2, 4):
        technique = evaluation.technique.model_copy(update={"top_k": count})
        mixed = engine.respond([*asked[:2], *applied(technique, asked), *asked[2:]])
        found = mixed[2:-2]
        assert found == Engine(tmp_path / str(count)).respond(asked)
        assert (found == plain) == (count == trained)
        assert [*mixed[:2], *mixed[-2:]] == plain


def test_expert_count_is_refused_where_it_cannot_act(monkeypatch):
    dense, sparse = (tiny_model(name, TOKENIZER, seed=0) for name in ("llama", "mixtral"))
    one = ExpertCount(kind="expert_count", top_k=1)
    with pytest.raises(StageFailed, match="llama has no experts"), expert_count(dense, one):
        pass
    many = ExpertCount(kind="expert_count", top_k=5)
    with pytest.raises(StageFailed, match="5 is more than the 4"), expert_count(sparse, many):
        pass
    for name in ("switch_transformers", "jetmoe", "phimoe"):
        model = tiny_model(name, TOKENIZER, seed=0)
        refused = pytest.raises(StageFailed, match=f"{name} .*number per token cannot be set")
        with refused, expert_count(model, one):
            pass
    router = sparse.model.layers[0].mlp.gate
    forward = type(router).forward
    monkeypatch.setattr(  # a router that looks its number up somewhere else
        type(router), "forward", lambda self, x: (setattr(self, "top_k", 2), forward(self, x))[1]
    )
    with pytest.raises(StageFailed, match="does not choose 1"), expert_count(sparse, one):
        score(sparse, TOKENIZER, CHOICES)


# --- sampling ---------------------------------------------------------------------------------


def test_drawn_tokens_follow_the_distribution():
    logits = torch.tensor([0.0, math.log(2), math.log(5)])
    sampler = Sampler(1.0, 0, "q")
    drawn = torch.bincount(torch.tensor([sampler.draw(logits) for _ in range(8000)]), minlength=3)
    assert (drawn / 8000).tolist() == pytest.approx([0.125, 0.25, 0.625], abs=0.02)
    cold = Sampler(0.01, 0, "q")
    assert {cold.draw(logits) for _ in range(50)} == {2}


def test_samples_depend_on_seed_and_request_alone():
    model = tiny_model("llama", TOKENIZER, seed=0)
    hot = SelfConsistency(kind="self_consistency", samples=3, temperature=2.0)
    asked = applied(hot, PROMPTS)
    assert [r.id for r in asked] == [f"{id}#sample{n}" for id in "gh" for n in range(3)]
    first = generate(model, TOKENIZER, asked, sampling=hot)
    assert len({r.text for r in first[:3]}) == 3
    alone = [generate(model, TOKENIZER, [r], sampling=hot)[0] for r in reversed(asked)]
    assert alone[::-1] == first
    other = hot.model_copy(update={"seed": 1})
    assert generate(model, TOKENIZER, asked, sampling=other) != first


# --- the engine -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, family, seed in (("moe", "mixtral", 0), ("dense", "llama", 0), ("small", "llama", 1)):
        tiny_model(family, TOKENIZER, seed=seed).save_pretrained(root / name)
        TOKENIZER.save_pretrained(root / name)
    return root


TECHNIQUES = [
    DOLA,
    DoLa(kind="dola_original", candidate_layers=(1, 2, 3)),
    Contrastive(kind="contrastive", amateur="small"),
    ExpertCount(kind="expert_count", top_k=1),
]


def test_techniques_share_a_model_and_leave_plain_scoring_bit_for_bit(folders):
    requests = [*CHOICES, *PROMPTS]
    plain = Engine(folders / "moe").respond(requests)
    engine = Engine(folders / "moe", amateurs={"small": folders / "small"})
    asked = [request for t in (None, *TECHNIQUES) for request in applied(t, requests)]
    mixed = asked[::2] + asked[1::2]
    answered = dict(zip(map(repr, mixed), engine.respond(mixed), strict=True))
    by_technique = [
        [answered[repr(request)] for request in applied(t, requests)] for t in (None, *TECHNIQUES)
    ]
    assert by_technique[0] == plain
    assert engine.respond(requests) == plain
    for responses in by_technique[1:]:
        assert [r.id for r in responses] == [r.id for r in plain]
        assert responses[0].logprobs != plain[0].logprobs
    assert by_technique[1] != by_technique[3]


def test_an_amateur_of_another_tokenizer_is_refused(folders, tmp_path):
    other = tiny_tokenizer()
    other.add_tokens(["novel"])
    tiny_model("llama", other, seed=0).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    engine = Engine(folders / "dense", amateurs={"small": tmp_path})
    with pytest.raises(StageFailed, match="small has another tokenizer"):
        engine.respond(applied(TECHNIQUES[2], CHOICES))


def test_plain_is_the_default(folders):
    model = tiny_model("mixtral", TOKENIZER, seed=0)
    assert score(model, TOKENIZER, CHOICES, predictor=Plain(model)) == score(
        model, TOKENIZER, CHOICES
    )
