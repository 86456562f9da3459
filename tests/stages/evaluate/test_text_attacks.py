"""Attacks on labelled texts, end to end on a tiny model whose routes are recorded."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from stages.attack.wordnet import digest
from stages.errors import StageFailed
from stages.evaluate.text_attacking import Attacker, Attempt, common, variants
from stages.models.routes import imposed
from stages.models.tiny import tiny_model
from tests.stages.attack.dictionary import write_dictionary
from tests.stages.evaluate.attacked_texts import (
    ATTACKS,
    TEXTS,
    engine_of,
    prepending_tokenizer,
    scores_of,
    shop,
    spec,
)


@pytest.fixture(scope="module")
def data():
    return shop()


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    return {name: engine_of(name, tmp_path_factory.mktemp(name)) for name in ("mixtral", "llama")}


@pytest.fixture(scope="module")
def scores(engines, data):
    return scores_of(engines["mixtral"], spec(), data)


def test_an_example_is_robust_where_every_attack_fails(scores, engines, data):
    under = scores[[f"correct/{a.label}" for a in spec().attacks]]
    assert scores["correct"].tolist() == under.min(axis=1).tolist()
    # What was wrong without an attack is not robust to one that leaves it right.
    assert (under.to_numpy() <= scores[["clean"]].to_numpy()).all()
    assert scores["clean"].sum() > scores["correct"].sum()
    answers = engines["mixtral"].respond(
        [r.__class__(r.id, f"Text: {text}\nSentiment:", (" negative", " positive"))
         for r, text in zip(spec().requests(data), TEXTS, strict=True)])
    right = [float((a.logprobs[1] > a.logprobs[0]) == (label == "positive"))
             for a, label in zip(answers, data["shop"]["label"], strict=True)]
    assert scores["clean"].tolist() == right


def test_budgets_are_kept_and_effort_is_counted(scores):
    assert scores["edits/gcg"].between(0, 2).all()
    for name in ("deep_word_bug", "homoglyphs", "word_neighbours"):
        assert scores[f"edits/{name}"].between(0, 2).all()
        assert scores[f"gradients/{name}"].eq(0).all()
    # A byte tokenizer has no whole words to put in.
    assert scores["edits/word_neighbours"].eq(0).all()
    # 4 steps, 2 restarts; the last iterates are asked as well.
    assert scores["gradients/embedding_pgd"].eq(8).all()
    assert scores["queries/embedding_pgd"].eq(10).all()
    assert scores["gradients/gcg"].le(3).all()


def test_perturbations_are_measured_in_half_distances_to_the_nearest_token(scores, engines):
    table = engines["mixtral"].model.get_input_embeddings().weight.detach()
    distances = torch.cdist(table, table).fill_diagonal_(torch.inf)
    radius = 0.5 * table.norm(dim=1).median() / (distances.amin(1).median() / 2)
    sizes = scores["size/embedding_pgd"]
    # No token is moved further than the radius.
    assert sizes.le(radius.item() * (1 + 1e-4)).all() and sizes.max() > 0.5 * radius.item()
    assert scores["size/gcg"].eq(0).all()
    # Told of every attack on embeddings and of no other.
    told = {m.name: m for m in spec().metrics() if m.name.startswith(("size/", "margin/"))}
    assert sorted(told) == ["margin/embedding_pgd", "margin/routes",
                            "size/embedding_pgd", "size/routes"]
    for name in ("size/embedding_pgd", "margin/embedding_pgd"):
        metric = told[name]
        mean = metric.value(metric.statistics(scores).sum(0))
        assert mean == pytest.approx(scores[name].mean())
        assert not metric.of_experts
    # A wrong label is ahead where the answer is wrong.
    right = scores["correct/embedding_pgd"] == 1
    assert ((scores["margin/embedding_pgd"] < 0) == right)[scores["clean"] == 1].all()
    assert not told["margin/embedding_pgd"].higher_is_better


def test_routes_change_more_the_more_they_are_aimed_at(scores):
    assert scores["noise"].lt(0.05).all()
    # 2 of 4 experts: overlap 0, 1/3 or 1 with probability 1/6, 4/6 and 1/6.
    assert np.allclose(scores["chance"], 1 - (4 / 6 / 3 + 1 / 6))
    aimed = scores["routing_change/routes"].mean()
    assert aimed > scores["routing_change_random/routes"].mean() > 0
    assert aimed > scores["routing_change/embedding_pgd"].mean() > 0
    layers = [c for c in scores if c.startswith("routing_change/gcg/")]
    assert len(layers) == 4
    assert np.allclose(scores[layers].mean(axis=1), scores["routing_change/gcg"])
    # Rounding to bfloat16 sends few tokens elsewhere, and more than another batch does.
    assert scores["noise_bfloat16"].between(1e-6, 0.2).any()
    assert scores["noise_bfloat16"].mean() > scores["noise"].mean()
    # Tokens before the text see nothing of it, so that they change less.
    untouched = scores["routing_change_untouched/routes"]
    assert (untouched < scores["routing_change/routes"]).all() and (untouched > 0).any()
    same = scores[[f"routing_change{kind}/homoglyphs" for kind in ("", "_untouched")]]
    assert np.allclose(same.iloc[:, 0], same.iloc[:, 1])


def test_what_is_compared_of_the_routes_by_hand(engines, data, scores):
    """All tokens of the prompt, the replaced ones too, and none of the labels' words; the noise of
    another batch likewise."""
    attacker = Attacker(spec(), engines["mixtral"].model, engines["mixtral"].tokenizer)
    for row, found in zip(spec().rows(data["shop"]), scores.to_dict("records"), strict=True):
        question = attacker.question(row, row["text"])
        clean = Attempt(attacker.victim.table[question.tokens], question, row["text"], 0)
        made = attacker.attempt(spec().attacks[2], row, clean)
        replaced = made.question.tokens != question.tokens
        length = len(question.tokens)
        assert replaced.sum() == found["edits/gcg"]
        (_, before), (_, after) = attacker._asked(clean), attacker._asked(made)
        assert len(before[0].experts) > length
        changes, untouched, kept, firsts = [], [], [], []
        for one, other in zip(before, after, strict=True):
            pairs = zip(one.experts[:length].tolist(), other.experts[:length].tolist(), strict=True)
            chosen = torch.tensor([1 - len({*a} & {*b}) / len({*a} | {*b}) for a, b in pairs])
            changes.append(chosen.mean().item())
            pairs = zip(one.experts[:length].tolist(), other.experts[:length].tolist(), strict=True)
            kept.append(np.mean([len({*a} & {*b}) / 2 for a, b in pairs]))
            largest = [each.experts.gather(1, each.weights.argmax(1, keepdim=True))[:length, 0]
                       for each in (one, other)]  # fmt: skip
            firsts.append((largest[0] != largest[1]).float().mean().item())
            untouched.append(chosen[~replaced].mean().item())
        assert found["routing_change/gcg"] == pytest.approx(np.mean(changes), abs=1e-6)
        assert found["experts_kept/gcg"] == pytest.approx(np.mean(kept), abs=1e-6)
        assert found["experts_first_changed/gcg"] == pytest.approx(np.mean(firsts), abs=1e-6)
        assert found["routing_change_untouched/gcg"] == pytest.approx(
            np.mean(untouched), abs=1e-6)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            _, rounded = attacker._asked(clean)
        kept = [np.mean([1 - len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(
            one.experts[:length].tolist(), other.experts[:length].tolist(), strict=True)])
            for one, other in zip(before, rounded, strict=True)]
        assert found["noise_bfloat16"] == pytest.approx(np.mean(kept), abs=1e-6)
    assert scores["edits/gcg"].max() > 0


def test_routes_are_exchanged_in_one_layer_at_a_time(engines, data, scores):
    """Against the tiny model asked by hand under the other text's routes."""
    from stages.evaluate.text_attacking import Attacker

    attacker = Attacker(spec(), engines["mixtral"].model, engines["mixtral"].tokenizer)
    layer = "model.layers.2.mlp"
    for row, found in zip(spec().rows(data["shop"]), scores.to_dict("records"), strict=True):
        clean = Attempt(attacker.victim.table[attacker.question(row, row["text"]).tokens],
                        attacker.question(row, row["text"]), row["text"], 0)
        made = attacker.attempt(spec().attacks[0], row, clean)
        _, now = attacker._asked(made)
        for name, layers in (("", None), (f"/{layer}", {layer})):
            answer, _ = attacker.victim.routes(
                clean.embedded[None], clean.question, imposed(now, layers=layers))
            expected = float(attacker.labels[int(answer.argmax())] == row["label"])
            assert found[f"swap_clean_attacked_routes/embedding_pgd{name}"] == expected
    names = {metric.name for metric in spec().curves(scores)}
    assert f"swap_attacked_clean_experts/gcg/{layer}" in names
    assert not [c for c in scores if c.startswith("swap_") and "homoglyphs/" in c]


def test_a_dense_model_has_no_numbers_on_routes(engines, data):
    dense = scores_of(engines["llama"], spec(attacks=ATTACKS[:1]), data)
    assert dense[["noise", "routing_change/embedding_pgd"]].isna().all(axis=None)
    assert not [c for c in dense if c.startswith("routing_change/embedding_pgd/")]
    named = {m.name for m in spec(attacks=ATTACKS[:1]).metrics() if m.of_experts}
    assert {"routing_change/embedding_pgd", "noise"} < named and "robust_accuracy" not in named


def test_neither_shards_nor_neighbours_change_a_row(scores, engines, data):
    two = {"shop": data["shop"].tail(2).reset_index(drop=True)}
    again = scores_of(engines["mixtral"], spec(), two, size=16)
    pd.testing.assert_frame_equal(
        again, scores.tail(2).reset_index(drop=True), check_exact=True)
    last = {"shop": data["shop"].tail(1).reset_index(drop=True)}
    alone = scores_of(engines["mixtral"], spec(), last)
    expected = scores.tail(1).reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, expected, check_exact=True)


def test_controls_spend_the_budget_of_their_attack(engines, data):
    attacker = Attacker(spec(), engines["mixtral"].model, engines["mixtral"].tokenizer)
    pgd, _, search, bug, _, _ = spec().attacks
    for row in spec().rows(data["shop"]):
        question = attacker.question(row, row["text"])
        clean = Attempt(attacker.victim.table[question.tokens], question, row["text"], 0)
        moved = attacker.control(pgd, row, clean).embedded - clean.embedded
        radius = 0.5 * attacker.victim.table.norm(dim=-1).median()
        expected = radius * question.editable
        torch.testing.assert_close(moved.norm(dim=-1), expected, rtol=1e-4, atol=1e-5)
        assert attacker.control(search, row, clean).edits == 2
        words = len([w for w in row["text"].split() if w.lower() not in ("a", "not", "my")])
        assert attacker.control(bug, row, clean).edits == min(2, words)


@pytest.fixture(scope="module")
def prepending():
    tokenizer = prepending_tokenizer()
    model = tiny_model("mixtral", tokenizer, seed=0).requires_grad_(False)
    return Attacker(spec(attacks=[ATTACKS[2]]), model, tokenizer)


def test_tokens_are_searched_where_the_tokenizer_puts_a_blank_before_a_text(prepending, data):
    (search,) = prepending.spec.attacks
    edits, tokenizer = [], prepending.tokenizer
    for row in prepending.spec.rows(data["shop"]):
        question = prepending.question(row, row["text"])
        whole = tokenizer.decode(question.tokens)
        assert tokenizer(whole, add_special_tokens=False)["input_ids"] != question.tokens.tolist()
        clean = Attempt(prepending.victim.table[question.tokens], question, row["text"], 0)
        for make in (prepending.attempt, prepending.control):
            made = make(search, row, clean)
            # The text that is told is what the model was asked about.
            again = prepending.question(row, made.text)
            assert torch.equal(again.tokens, made.question.tokens)
            assert (made.edits > 0) == (made.text != row["text"])
            edits.append(made.edits)
    # An example that is wrong as it is needs no search.
    assert sum(n > 0 for n in edits[::2]) >= 1 and edits[1::2] == [2] * 4


def test_what_stands_in_the_place_of_a_text(prepending, engines, data):
    byte = Attacker(spec(), engines["mixtral"].model, engines["mixtral"].tokenizer)
    for attacker in (prepending, byte):
        row = spec().rows(data["shop"])[0] | {"text": "  Awful dull thing "}
        question = attacker.question(row, row["text"])
        assert attacker.texts(row, question, question.tokens[None]) == [row["text"]]
        assert attacker.are_prompts(row, question, question.tokens[None]).tolist() == [True]
    # The blank before a text is the template's, and a token without it is no text.
    places = question.editable.nonzero()[:, 0]
    other = question.tokens.clone()
    other[places[0] - 1] = byte.tokenizer("x")["input_ids"][0]
    assert byte.are_prompts(row, question, other[None]).tolist() == [False]


def test_a_search_that_could_find_nothing_is_refused(prepending, data):
    """An unknown letter is decoded as the special token that stands for it."""
    row = spec().rows(data["shop"])[0] | {"text": "A ☃ day"}
    question = prepending.question(row, row["text"])
    clean = Attempt(prepending.victim.table[question.tokens], question, row["text"], 0)
    told = "gcg: the tokens of example shop/0 are not those that the tokenizer of mixtral makes"
    for make in (prepending.attempt, prepending.control):
        with pytest.raises(StageFailed, match=told):
            make(prepending.spec.attacks[0], row, clean)


def test_words_of_one_token_have_neighbours(engines, monkeypatch):
    from stages.evaluate.text_attacking import Attacker

    engine = engines["llama"]
    attacker = Attacker(spec(), engine.model, engine.tokenizer)
    names = {3: " good", 4: " fine", 5: " bad", 6: "rest", 7: " Odd"}
    monkeypatch.setattr(
        attacker.tokenizer.__class__, "decode",
        lambda self, ids: "".join(names.get(number, "�") for number in ids))
    attacker.victim.table = attacker.victim.table.clone()
    attacker.victim.table[3:6, :] = 0
    attacker.victim.table[3:6, :2] = torch.tensor([[2.0, 0.0], [3.0, 4.0], [-1.0, 0.0]])
    assert attacker.vocabulary[0] == ["good", "fine", "bad"]
    assert attacker.near("Good", 8, 0.5) == ["fine"]  # cosines 0.6 and -1
    assert attacker.near("good", 8, -1.0) == ["fine", "bad"]
    assert attacker.near("unheard", 8, -1.0) == []


def test_words_have_neighbours_where_the_decoder_takes_the_first_blank_away(prepending, data):
    assert prepending.tokenizer.decode(prepending.tokenizer("thing")["input_ids"][1:]) == "thing"
    assert prepending.vocabulary[0] == ["t", "th", "thi", "thin", "thing", "d", "da", "day", "f",
                                        "fi", "fil", "film", "g", "go", "goo", "good"]
    (attack,) = spec(attacks=[ATTACKS[5] | {"cosine": -1.0}]).attacks
    row = spec().rows(data["shop"])[0]
    question = prepending.question(row, row["text"])
    clean = Attempt(prepending.victim.table[question.tokens], question, row["text"], 0)
    control = prepending.control(attack, row, clean)
    # Of its three words "thing" alone is one token.
    assert control.edits == 1 and control.text.startswith("Great little ")
    assert control.text.split()[-1] in prepending.vocabulary[0]


def test_synonyms_of_a_dictionary_are_put_in(engines, tmp_path, monkeypatch):
    monkeypatch.setenv("WNSEARCHDIR", str(write_dictionary(tmp_path)))
    evaluation = spec(attacks=[{"kind": "word_neighbours", "synonyms": "wordnet", "edits": 2}])
    assert evaluation.wordings()["wordnet"] == digest(tmp_path)
    assert "wordnet" not in spec().wordings()
    texts = ["Good film", "A film, just awful"]
    shop = pd.DataFrame({"id": ["0", "1"], "document": ["0", "1"], "text": texts,
                         "label": ["positive", "negative"]})
    name = "word_neighbours"
    found = scores_of(engines["mixtral"], evaluation, {"shop": shop}).set_index("example_id")
    others = {"Goodness", "Fine", "Just", "Well", "Full", "Good"}
    first, second = found.loc["shop/0", "answer"].split()
    assert first in others and second in {"movie", "shoot", "coating", "film"}
    changed = (first != "Good") + (second != "film")
    assert found.loc["shop/0", f"edits/{name}"] == changed
    assert found[f"edits/{name}"].sum() > 0
    # "just" is a stop word and "awful" is not in the dictionary.
    assert found.loc["shop/1", "answer"].endswith(", just awful")


def test_variants_and_common_tokens_by_hand():
    pgd, gcg, edits = spec(attacks=[ATTACKS[0], ATTACKS[2], ATTACKS[3]]).attacks
    found = dict(variants(pgd))
    assert found["steps"].steps == 8 and found["restarts"].restarts == 4
    assert [v.epsilon for k, v in found.items() if k.startswith("budget")] == [
        0.125, 0.25, 0.5, 1.0, 2.0]
    assert [v.substitutions for k, v in variants(gcg) if k.startswith("budget")] == [1, 2, 4]
    search = dict(variants(gcg))
    assert search["restarts"].label == "gcg/again"
    assert (search["unbounded"].substitutions, search["unbounded"].steps) == (1_000_000, 12)
    # Letters are drawn; a search that draws nothing finds the same again.
    bug = dict(variants(edits))
    assert list(bug) == ["restarts", "budget 1", "budget 2", "budget 4"]
    assert bug["restarts"].label == "deep_word_bug/again"
    fixed = edits.model_copy(update={"operations": ("swap", "delete")})
    assert list(dict(variants(fixed))) == ["budget 1", "budget 2", "budget 4"]
    before, after = common([1, 2, 3, 4], [1, 9, 3, 3, 4])
    assert before.tolist() == [0, 2, 3] and after.tolist() in ([0, 2, 4], [0, 3, 4])


def test_bad_settings_are_refused():
    with pytest.raises(ValidationError, match="two attacks have the same name"):
        spec(attacks=[ATTACKS[0], ATTACKS[0]])
    with pytest.raises(ValidationError, match="technique has no effect on an evaluation"):
        spec(technique={"kind": "dola"})
    with pytest.raises(ValidationError, match="union_tag_invalid"):
        spec(attacks=[{"kind": "textfooler"}])
    assert json.loads(spec().requests({"shop": pd.DataFrame(
        {"id": ["0"], "text": ["{text} {label}"], "label": ["positive"]})})[0].row)[
        "text"] == "{text} {label}"
