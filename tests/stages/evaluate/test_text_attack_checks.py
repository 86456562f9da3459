"""What an attack on texts must show, on a tiny model and on numbers made by hand."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from stages.compare.spec import CompareSpec
from stages.compare.stage import EFFECTS_FILE
from stages.compare.stage import run as compare
from stages.compare.table import render_text
from stages.evaluate import hygiene
from stages.evaluate.text_attacking import Attacker, Attempt, variants
from stages.evaluate.text_attacks import _comparable
from stages.models.card import ModelCard
from stages.statistics import summarise
from tests.stages.evaluate.attacked_texts import ATTACKS, TEXTS, engine_of, scores_of, shop, spec


@pytest.fixture(scope="module")
def data():
    return shop()


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    return {name: engine_of(name, tmp_path_factory.mktemp(name)) for name in ("mixtral",)}


@pytest.fixture(scope="module")
def scores(engines, data):
    return scores_of(engines["mixtral"], spec(), data)


def test_the_checks_of_an_attack_are_attacks(engines, data):
    soft = ATTACKS[0] | {"name": "soft", "routing": "soft"}
    brief = [*(a | {"steps": 2} for a in (*ATTACKS[:3], soft)), ATTACKS[4]]
    evaluation = spec(attacks=brief, checked=2)
    three = {"shop": data["shop"].head(3)}
    scores = scores_of(engines["mixtral"], evaluation, three)
    report = pd.DataFrame(evaluation.checks(scores))
    found = set(zip(report["attack"], report["check"], strict=True))
    assert {("embedding_pgd", c) for c in (
        "twice the steps", "twice the restarts", "monotone", "unbounded", "gradients",
        "not weaker than soft", "not weaker than random edits of the same budget")} <= found
    assert {("gcg", c) for c in ("twice the steps", "twice the restarts", "unbounded")} <= found
    assert ("homoglyphs", "monotone") in found and ("homoglyphs", "unbounded") not in found
    assert ("homoglyphs", "gradients") not in found
    # What aims at routes alone need not break anything.
    assert not [check for attack, check in found
                if attack == "routes" and "weaker" in check]
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
    assert scores["clean"].eq(1).all() and scores["edits/deep_word_bug"].eq(0).all()
    found = {(c["attack"], c["check"]): c for c in evaluation.checks(scores)}
    control = "not weaker than random edits of the same budget"
    bug = found["deep_word_bug", control]
    assert bug["value"] == 1 - scores["random/deep_word_bug"].mean() >= 0.25 and not bug["passed"]
    # The ascent stays at its random start, which is nearer than its control.
    missed = scores["correct/embedding_pgd"] - scores["random/embedding_pgd"]
    assert found["embedding_pgd", control]["value"] == missed.clip(0).mean() >= 0.125
    assert found["embedding_pgd", "gradients"]["value"] == 1.0
    assert not found["embedding_pgd", "gradients"]["passed"]


def test_an_example_that_is_wrong_anyway_is_not_robust(engines, data):
    """Answers made up: the attack turns a wrong prediction into the right one."""
    evaluation = spec(attacks=ATTACKS[:1], checked=1)
    requests = evaluation.requests({"shop": data["shop"].head(2)})
    responses = {}
    for response in engines["mixtral"].respond(requests):
        found = json.loads(response.result)
        # Both texts: "positive" and "negative" are right; the model says the first of both.
        found["prediction"] = "positive"
        under = found["attacks"]["embedding_pgd"]
        under["prediction"] = under["random_prediction"] = "negative"
        under["checks"] = dict.fromkeys(under["checks"], "negative")
        responses[response.id] = replace(response, result=json.dumps(found))
    scores = evaluation.score({"shop": data["shop"].head(2)}, responses)
    assert scores["clean"].tolist() == [1, 0]
    for column in ("correct", "correct/embedding_pgd", "random/embedding_pgd"):
        assert scores[column].tolist() == [0, 0]
    assert scores["success/embedding_pgd"].tolist()[0] == 1
    assert np.isnan(scores["success/embedding_pgd"][1])
    checks = scores.filter(like="check/")
    assert len(checks.columns) > 5 and checks.iloc[0].eq(1).all()


def test_which_attack_must_find_what_another_does():
    pgd = {"kind": "embedding_pgd", "epsilon": 0.5, "restarts": 2}
    gcg = {"kind": "gcg", "substitutions": 3}
    near = {"kind": "word_neighbours", "edits": 3}

    def must(strong, weak):
        pair = spec(attacks=[strong | {"name": "strong"}, weak | {"name": "weak"}]).attacks
        return _comparable(*pair)

    for plain in (pgd, gcg):
        for routing in ("soft", "frozen", "joint", "targeted"):
            assert must(plain, plain | {"routing": routing})
            assert not must(plain | {"routing": routing}, plain)
        assert not must(plain, plain)
        assert not must(plain, plain | {"routing": "soft", "loss": "cross_entropy"})
        # An attack that tries longer may find more.
        assert not must(plain, plain | {"routing": "soft", "steps": 20})
        assert must(plain | {"steps": 20}, plain | {"routing": "soft"})
    assert not must(pgd, pgd | {"routing": "soft", "restarts": 3})
    assert not must(pgd, pgd | {"routing": "soft", "epsilon": 0.4})
    assert not must(gcg, gcg | {"routing": "soft", "candidates": 64})
    assert must(gcg, near) and must(gcg | {"routing": "joint"}, near)
    assert not must(gcg | {"routing": "targeted"}, near)
    assert not must(gcg, near | {"edits": 4}) and not must(gcg, pgd | {"routing": "soft"})


def test_an_attack_is_not_run_again_for_the_check_of_its_own_budget(engines, data, monkeypatch):
    tried, real = [], Attacker.attempt

    def attempt(self, attack, row, clean, **options):
        tried.append((attack.steps, attack.substitutions))
        return real(self, attack, row, clean, **options)

    monkeypatch.setattr(Attacker, "attempt", attempt)
    evaluation = spec(attacks=ATTACKS[2:3], checked=1)
    scores = scores_of(engines["mixtral"], evaluation, {"shop": data["shop"].head(1)})
    assert tried == [(3, 2), (6, 2), (3, 2), (12, 1_000_000), (3, 1), (3, 4)]
    assert scores["check/gcg/budget 2"].tolist() == (1 - scores["correct/gcg"]).tolist()


def test_a_check_ends_where_it_succeeds(engines, data):
    attacker = Attacker(spec(), engines["mixtral"].model, engines["mixtral"].tokenizer)
    row = next(r for r in spec().rows(data["shop"]) if r["label"] == "positive")
    question = attacker.question(row, row["text"])
    clean = Attempt(attacker.victim.table[question.tokens], question, row["text"], 0)
    again = dict(variants(spec().attacks[2]))["restarts"]
    drawn = [attacker.attempt(each, row, clean).question.tokens.tolist()
             for each in (spec().attacks[2], again, again)]
    assert drawn[0] != drawn[1] == drawn[2]  # other draws, the same each time
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
    # Of two seeds that do not break all the one that breaks fewer is told.
    seeds = [hygiene.unbounded("a", booleans(broken)) for broken in ("1110", "1000", "1100")]
    assert hygiene.failures(seeds) == "unbounded (a: 0.25 of 4)"


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
