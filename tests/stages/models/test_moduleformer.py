"""MoLM's architecture: checkpoints in the released layout are read, computed and written back."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from stages.errors import BadInput
from stages.evaluate.base import Request
from stages.evaluate.engine import Engine
from stages.models.load import load
from stages.models.moduleformer import ModuleFormerForCausalLM, stick_breaking
from stages.models.tiny import tiny_tokenizer

D, INNER, FEED, HEADS, EXPERTS, CHOSEN, GATE = 16, 8, 12, 2, 4, 2, 6
CONFIG = {
    "architectures": ["ModuleFormerForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_moduleformer.ModuleFormerForCausalLM"},
    "model_type": "moduleformer",
    "vocab_size": 300,
    "n_embd": D,
    "n_layer": 2,
    "n_head": HEADS,
    "att_hidden": INNER,
    "ffd_hidden": FEED,
    "gating_size": GATE,
    "n_att_experts": EXPERTS,
    "k_att": CHOSEN,
    "n_mlp_experts": EXPERTS,
    "k_mlp": CHOSEN,
    "activation_function": "gelu_new",
    "history_length": 32,
    "block_size": 32,
}
TOKENS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder as it is released, with random weights, and those weights."""
    folder, draw = tmp_path_factory.mktemp("released"), torch.Generator().manual_seed(0)
    state = {}

    def add(name, *shape):
        state[name] = torch.randn(*shape, generator=draw) / math.sqrt(shape[-1])

    add("transformer.wte.weight", 300, D)
    add("lm_head.weight", 300, D)
    for norm in ("ln_f", *(f"h.{i}.ln_{n}" for i in range(2) for n in (1, 2))):
        add(f"transformer.{norm}.weight", D)
        add(f"transformer.{norm}.bias", D)
    for i in range(2):
        for block, inner in (("attn.q_proj", INNER), ("mlpf", FEED)):
            path = f"transformer.h.{i}.{block}"
            add(f"{path}.experts.weight", EXPERTS, D, inner)  # in, out
            add(f"{path}.output_experts.weight", EXPERTS, inner, D)
            add(f"{path}.gate.w_gate.0.weight", GATE, D)
            add(f"{path}.gate.w_gate.0.bias", GATE)
            add(f"{path}.gate.w_gate.3.weight", EXPERTS, GATE)
        for name in ("k_proj", "v_proj"):
            add(f"transformer.h.{i}.attn.{name}.weight", INNER, D)
            add(f"transformer.h.{i}.attn.{name}.bias", INNER)
        state[f"transformer.h.{i}.attn.mask"] = torch.tril(torch.ones(64, 64, dtype=torch.int8))
        state[f"transformer.h.{i}.attn.cum_weight"] = torch.tril(torch.ones(64, 64), -1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tiny_tokenizer().save_pretrained(folder)
    return folder, state


def by_hand(state, tokens):
    """Logits of one text, token by token, expert by expert, key by key."""
    x = state["transformer.wte.weight"][tokens]

    def norm(x, name):
        return F.layer_norm(x, (D,), state[f"{name}.weight"], state[f"{name}.bias"])

    def chosen(row, path):
        gate = f"{path}.gate.w_gate"
        inner = F.gelu(state[f"{gate}.0.weight"] @ row + state[f"{gate}.0.bias"])
        weights, experts = (state[f"{gate}.3.weight"] @ inner).softmax(0).topk(CHOSEN)
        return zip(weights.tolist(), experts.tolist(), strict=True)

    for i in range(2):
        path = f"transformer.h.{i}.attn"
        normed, added = norm(x, f"transformer.h.{i}.ln_1"), torch.zeros_like(x)
        keys, values = (
            (normed @ state[f"{path}.{n}.weight"].T + state[f"{path}.{n}.bias"]).view(-1, HEADS, 4)
            for n in ("k_proj", "v_proj")
        )
        for t, row in enumerate(normed):
            for weight, e in chosen(row, f"{path}.q_proj"):
                query = (row @ state[f"{path}.q_proj.experts.weight"][e]).view(HEADS, 4)
                heads = []
                for head in range(HEADS):
                    left, value = 1.0, torch.zeros(4)
                    for j in range(t, -1, -1):  # from the token itself back
                        share = torch.sigmoid(query[head] @ keys[j, head] / 2.0)
                        value += left * share * values[j, head]
                        left = left * (1 - share)
                    heads.append(value)
                output = torch.cat(heads) @ state[f"{path}.q_proj.output_experts.weight"][e]
                added[t] += weight * output
        x = x + added
        path = f"transformer.h.{i}.mlpf"
        normed, added = norm(x, f"transformer.h.{i}.ln_2"), torch.zeros_like(x)
        for t, row in enumerate(normed):
            for weight, e in chosen(row, path):
                inner = F.gelu(row @ state[f"{path}.experts.weight"][e], approximate="tanh")
                added[t] += weight * (inner @ state[f"{path}.output_experts.weight"][e])
        x = x + added
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


@torch.no_grad()
def test_released_weights_compute_what_the_released_code_describes(released):
    folder, state = released
    model = load(folder)
    assert type(model) is ModuleFormerForCausalLM  # not the code that auto_map names
    logits = model(TOKENS).logits
    for row, tokens in zip(logits, TOKENS, strict=True):
        torch.testing.assert_close(row, by_hand(state, tokens), atol=1e-5, rtol=1e-5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS], dim=1)
    mask = (torch.arange(12) >= 3).long().expand(2, 12)
    left = model(padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(left, logits, atol=1e-5, rtol=1e-5)
    first = model(TOKENS[:, :5], use_cache=True)
    rest = model(TOKENS[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, logits[:, 5:], atol=1e-5, rtol=1e-5)


def test_a_stick_of_three_keys_is_broken_from_the_last_one():
    # One query whose logits are 0, ln 3 and 0: shares 1/2, 3/4 and 1/2, from the last key back.
    query = torch.tensor([[1.0, 0, 0, 0]])
    keys = torch.zeros(3, 4)
    keys[1, 0] = 2 * math.log(3.0)
    weights = stick_breaking(query, keys, torch.ones(1, 3, dtype=torch.bool))
    assert weights[0].tolist() == pytest.approx([0.5 * 0.25 * 0.5, 0.75 * 0.5, 0.5])
    unseen = stick_breaking(query, keys, torch.tensor([[True, True, False]]))
    assert unseen[0].tolist() == pytest.approx([0.5 * 0.25, 0.75, 0.0])


def test_it_is_saved_in_the_released_layout_and_read_again(released, tmp_path):
    folder, state = released
    load(folder).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    kept = {name: t for name, t in state.items() if not name.endswith(("mask", "cum_weight"))}
    assert saved.keys() == kept.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept.items())
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(TOKENS).logits, load(folder)(TOKENS).logits)


def test_an_evaluation_scores_and_continues_a_text(released):
    engine, tokenizer = Engine(released[0]), tiny_tokenizer()
    asked = [Request("a", "one two", (" three", " four")), Request("b", "one", max_new_tokens=4)]
    scored, written = engine.respond(asked)
    model = load(released[0])
    for word, logprob in zip((" three", " four"), scored.logprobs, strict=True):
        prompt, whole = (tokenizer(t)["input_ids"] for t in ("one two", f"one two{word}"))
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(len(prompt), len(whole))
        expected = sum(logprobs[place - 1, whole[place]].item() for place in places)
        assert logprob == pytest.approx(expected, abs=1e-4)
    ids = torch.tensor([tokenizer("one")["input_ids"]])
    for _ in range(4):
        with torch.no_grad():
            best = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    new = tokenizer.decode(ids[0, -4:], skip_special_tokens=True)
    assert written.text.strip() == new.strip()


@pytest.mark.parametrize(
    "fields",
    [{"k_att": 1}, {"gate_type": "gmm"}, {"sample_topk": 1}, {"n_head": 1, "att_hidden": D}],
)
def test_what_it_cannot_compute_is_refused(released, tmp_path, fields):
    for file in released[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | fields))
    with pytest.raises(BadInput, match="is not known here; use a released MoLM"):
        load(tmp_path)
