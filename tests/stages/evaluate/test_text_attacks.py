"""Attacks on labelled texts, end to end on a tiny model whose routes are recorded."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from stages.attack.wordnet import digest
from stages.compare.spec import CompareSpec
from stages.compare.stage import EFFECTS_FILE
from stages.compare.stage import run as compare
from stages.compare.table import render_text
from stages.evaluate import hygiene
from stages.evaluate.engine import Engine
from stages.evaluate.shards import plan_shards
from stages.evaluate.text_attacking import Attacker, Attempt, common, variants
from stages.evaluate.text_attacks import TextAttacks
from stages.models.card import ModelCard
from stages.models.routes import imposed
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.statistics import summarise
from tests.stages.attack.dictionary import write_dictionary

ATTACKS = [
    {"kind": "embedding_pgd", "epsilon": 0.5, "steps": 4},
    {"kind": "embedding_pgd", "name": "routes", "epsilon": 0.5, "steps": 4, "routing": "targeted"},
    {"kind": "gcg", "substitutions": 2, "steps": 3, "candidates": 8, "top": 32},
    {"kind": "deep_word_bug", "edits": 2},
    {"kind": "homoglyphs", "edits": 2},
    {"kind": "word_neighbours", "edits": 2},
]
TEXTS = ["Great little thing", "Awful dull thing", "A nice warm day", "Not my day"]


def spec(**changes):
    fields = {"dataset": "shop", "template": "sentiment", "attacks": ATTACKS, "checked": 0,
              "swap_layers": True}
    return TextAttacks(**fields | changes)


@pytest.fixture(scope="module")
def data():
    ids = [str(n) for n in range(len(TEXTS))]
    rows = {"id": ids, "document": ids, "text": TEXTS, "label": ["positive", "negative"] * 2}
    return {"shop": pd.DataFrame(rows)}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    made = {}
    for name in ("mixtral", "llama"):
        folder, tokenizer = tmp_path_factory.mktemp(name), tiny_tokenizer()
        tiny_model(name, tokenizer, seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = Engine(folder)
    return made


def scores_of(engine, evaluation, data, size=64):
    shards = plan_shards(evaluation.requests(data), size)
    responses = {r.id: r for shard in shards for r in engine.respond(shard.requests)}
    return evaluation.score(data, responses)


@pytest.fixture(scope="module")
def scores(engines, data):
    return scores_of(engines["mixtral"], spec(), data)


def test_an_example_is_robust_where_every_attack_fails(scores, engines, data):
    under = scores[[f"correct/{a.label}" for a in spec().attacks]]
    assert scores["correct"].tolist() == under.min(axis=1).tolist()
    # The clean input is among the iterates, and edits are made only while the answer is right.
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
    # 0 where the clean input was the best; no token is moved further than the radius.
    assert sizes.le(radius.item() * (1 + 1e-4)).all() and sizes.max() > 0.5 * radius.item()
    assert scores["size/gcg"].eq(0).all()


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


def test_the_checks_of_an_attack_are_attacks(engines, data):
    brief = [*(attack | {"steps": 2} for attack in ATTACKS[:3]), ATTACKS[4]]
    evaluation = spec(attacks=brief, checked=2)
    three = {"shop": data["shop"].head(3)}
    scores = scores_of(engines["mixtral"], evaluation, three)
    report = pd.DataFrame(evaluation.checks(scores))
    found = set(zip(report["attack"], report["check"], strict=True))
    assert {("embedding_pgd", c) for c in (
        "twice the steps", "twice the restarts", "monotone", "unbounded", "gradients",
        "not weaker than routes", "not weaker than random edits of the same budget")} <= found
    assert {("gcg", "twice the steps"), ("homoglyphs", "monotone")} <= found
    assert ("homoglyphs", "gradients") not in found
    assert set(report.loc[report["check"] == "unbounded", "n"]) == {2}
    assert set(report.loc[report["check"] == "gradients", "n"]) == {3}
    curves = summarise(scores, evaluation.curves(scores))
    assert {"check/gcg/budget 1", "check/gcg/budget 4", "check/embedding_pgd/budget 0.125"} <= set(
        curves)
    unbounded = report.set_index(["attack", "check"]).loc[("embedding_pgd", "unbounded")]
    assert unbounded["value"] == 1.0 and unbounded["passed"]


def test_a_search_of_tokens_must_find_what_as_many_near_words_do():
    """Ten texts. Letters and synonyms make several tokens of a word: they are not compared."""
    evaluation = spec(attacks=[
        {"kind": "gcg", "substitutions": 2}, {"kind": "word_neighbours", "edits": 2},
        {"kind": "word_neighbours", "name": "more", "edits": 3},
        {"kind": "homoglyphs", "edits": 1}, {"kind": "embedding_pgd"}])
    names = [attack.label for attack in evaluation.attacks]
    scores = pd.DataFrame({f"random/{name}": np.ones(10) for name in names} | {
        f"zero_gradients/{name}": np.zeros(10) for name in names})
    for name in names:
        # The search breaks the first three, the near words the third to the sixth.
        broken = {"gcg": [0, 1, 2], "word_neighbours": [2, 3, 4, 5]}.get(name, [])
        scores[f"correct/{name}"] = [float(n not in broken) for n in range(10)]
    found = [(c["attack"], c["check"], c["value"]) for c in evaluation.checks(scores)
             if c["check"].startswith("not weaker") and "random" not in c["check"]]
    assert found == [("gcg", "not weaker than word_neighbours", 0.3)]


def test_an_attack_that_does_nothing_is_weaker_than_its_control(engines, monkeypatch):
    """With gradients of zero, and with answers that never tell one edit from another."""
    engine = engines["mixtral"]
    evaluation = spec(attacks=[
        {"kind": "embedding_pgd", "epsilon": 4.0, "steps": 2, "restarts": 1},
        {"kind": "deep_word_bug", "edits": 4}])
    texts = pd.DataFrame({"id": range(8), "text": [
        f"{text} for {what}" for text in TEXTS for what in ("children", "holidays")]})
    rows = texts.assign(id=texts["id"].astype(str), document=texts["id"].astype(str),
                        label="positive")
    # Every label is what the model says, so that every change of an answer does harm.
    attacker = Attacker(evaluation, engine.model, engine.tokenizer)
    for index, row in enumerate(evaluation.rows(rows)):
        question = attacker.question(row, row["text"])
        margin = attacker.victim.margins([question.tokens], question).item()
        rows.loc[index, "label"] = "negative" if margin > 0 else "positive"
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, at: (torch.zeros_like(at),))
    monkeypatch.setattr(Attacker, "_margins", lambda self, row, texts: [-1.0] * len(texts))
    scores = scores_of(engine, evaluation, {"shop": rows})
    assert scores["correct"].eq(1).all() and scores["edits/deep_word_bug"].eq(0).all()
    assert scores["size/embedding_pgd"].eq(0).all()
    found = {(c["attack"], c["check"]): c for c in evaluation.checks(scores)}
    for attack in ("embedding_pgd", "deep_word_bug"):
        check = found[attack, "not weaker than random edits of the same budget"]
        assert check["value"] == 1 - scores[f"random/{attack}"].mean() >= 0.25
        assert not check["passed"]


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


def test_an_attack_is_not_run_again_for_the_check_of_its_own_budget(engines, data, monkeypatch):
    tried, real = [], Attacker.attempt

    def attempt(self, attack, row, clean, **options):
        tried.append((attack.steps, attack.substitutions))
        return real(self, attack, row, clean, **options)

    monkeypatch.setattr(Attacker, "attempt", attempt)
    evaluation = spec(attacks=ATTACKS[2:3], checked=1)
    scores = scores_of(engines["mixtral"], evaluation, {"shop": data["shop"].head(1)})
    assert tried == [(3, 2), (6, 2), (3, 1), (3, 4)]
    assert scores["check/gcg/budget 2"].tolist() == (1 - scores["correct/gcg"]).tolist()


def test_a_check_ends_where_it_succeeds(engines, data):
    attacker = Attacker(spec(), engines["mixtral"].model, engines["mixtral"].tokenizer)
    row = next(r for r in spec().rows(data["shop"]) if r["label"] == "positive")
    question = attacker.question(row, row["text"])
    clean = Attempt(attacker.victim.table[question.tokens], question, row["text"], 0)
    for _, variant in variants(spec().attacks[0]):
        spent = []
        for options in ({}, {"goal": 0.0}):
            before = attacker.victim.gradients
            made = attacker.attempt(variant, row, clean, **options)
            answer = attacker._asked(made)[0].argmax().item()
            spent.append((attacker.victim.gradients - before, answer != question.gold))
        (whole, broken), (part, too) = spent
        assert broken == too and part <= whole and (part < whole or not broken)


def test_checks_by_hand():
    def booleans(text):
        return np.array([c == "1" for c in text])

    base = booleans("1100000000")
    more = hygiene.more_effort("a", "twice the steps", base, booleans("1011000000"))
    assert more["value"] == 0.2 and not more["passed"]
    assert hygiene.more_effort("a", "x", base, booleans("1000000000"))["passed"]
    ladder = [booleans("1000000000"), base, booleans("0110000000")]
    assert hygiene.monotone("a", ladder)["value"] == 0.1
    assert hygiene.monotone("a", ladder[:2])["passed"]
    assert not hygiene.unbounded("a", booleans("1110"))["passed"]
    assert hygiene.unbounded("a", booleans("111"))["passed"]
    weaker = hygiene.not_weaker("a", "b", base, booleans("0000000001"))
    assert weaker["value"] == 0.1 and not weaker["passed"]
    assert hygiene.gradients("a", np.array([0.0, 0.5]))["value"] == 0.25
    # Of two seeds the worse one is told; what passes is not.
    again = hygiene.more_effort("a", "twice the steps", base, booleans("1011100000"))
    other = hygiene.more_effort("b", "twice the steps", base, booleans("1010000000"))
    unbroken = hygiene.unbounded("a", booleans("1"))
    assert hygiene.failures([more, again, unbroken, other, weaker]) == (
        "twice the steps (a: 0.30 of 10, b: 0.10 of 10); not weaker than b (a: 0.10 of 10)")
    assert hygiene.failures([hygiene.unbounded("a", booleans("1"))]) == ""


def test_an_attack_that_fails_a_check_is_marked_in_the_table(scores, tmp_path):
    evaluation = spec(attacks=ATTACKS[:1])
    inputs = {}
    for model in ("moe", "dense"):
        for recipe in ("none", "sft"):
            folder = tmp_path / model / recipe
            (folder / "c").mkdir(parents=True)
            # The control breaks what the attack does not.
            table = scores.assign(**{"correct/embedding_pgd": 1.0, "random/embedding_pgd": 0.0})
            if (model, recipe) != ("moe", "sft"):
                table["random/embedding_pgd"] = 1.0
            table.to_parquet(folder / "scores.parquet")
            inputs[f"scores/{model}/{recipe}/0/attacked"] = folder
            ModelCard(
                architecture=model, family="x", total_parameters=1, active_parameters=1,
                flops_per_token=1, experts=0, top_k=0, moe_layers=(), layers=1, origin="",
            ).write(folder / "c")
            inputs[f"checkpoint/{model}/{recipe}/0"] = folder / "c"
    (tmp_path / "out").mkdir()
    compare(CompareSpec(
        title="t", pairs=[{"name": "p", "moe": "moe", "dense": "dense"}], recipes=("none", "sft"),
        seeds=(0,), evaluations={"attacked": evaluation}, resamples=200,
    ), inputs, tmp_path / "out", gaps={})
    table = pd.read_parquet(tmp_path / "out" / "comparison.parquet")
    marked = table[table["metric"] == "robust_accuracy"].set_index("recipe")["caution"]
    assert marked["none"] == "" and marked["sft"].startswith(
        "attacked: moe sft fails checks of the attack: not weaker than random edits of the same "
        "budget (embedding_pgd: ")
    assert "attacked: moe sft fails checks of the attack:" in " ".join(
        render_text(table).split())
    # The report has all checks, those that passed too.
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Checks of the attacks: attacked, 1 of " in page
    line = next(x for x in page.splitlines() if "| not weaker than random edits" in x)
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    assert [cell.endswith("(failed)") for cell in cells] == [False, True, False, False]
    # Routes are compared with the same model before the recipe, and with nothing else.
    assert not table["metric"].str.startswith("routing_change").any()
    effects = pd.read_parquet(tmp_path / "out" / EFFECTS_FILE)
    routes = effects[effects["metric"] == "routing_change/embedding_pgd"]
    assert routes["model"].tolist() == ["moe"] and routes["difference"].tolist() == [0.0]


def test_words_of_one_token_have_neighbours(engines, monkeypatch):
    from stages.evaluate.text_attacking import Attacker

    engine = engines["llama"]
    attacker = Attacker(spec(), engine.model, engine.tokenizer)
    names = {3: " good", 4: " fine", 5: " bad", 6: "rest", 7: " Odd"}
    monkeypatch.setattr(
        attacker.tokenizer.__class__, "decode", lambda self, ids: names.get(ids[0], "�"))
    attacker.victim.table = attacker.victim.table.clone()
    attacker.victim.table[3:6, :] = 0
    attacker.victim.table[3:6, :2] = torch.tensor([[2.0, 0.0], [3.0, 4.0], [-1.0, 0.0]])
    assert attacker.vocabulary[0] == ["good", "fine", "bad"]
    assert attacker.near("Good", 8, 0.5) == ["fine"]  # cosines 0.6 and -1
    assert attacker.near("good", 8, -1.0) == ["fine", "bad"]
    assert attacker.near("unheard", 8, -1.0) == []


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
    assert list(dict(variants(edits))) == ["budget 1", "budget 2", "budget 4"]
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
