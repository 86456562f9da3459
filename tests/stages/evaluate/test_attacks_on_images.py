"""Attacks on images as an evaluation: columns by hand, checks of the attacks, transfer."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from stages.attack.image_spec import (
    APGD,
    PGD,
    AnyImageAttack,
    Noise,
    PaperPGD,
    Square,
    Transfer,
)
from stages.attack.images import attack_images
from stages.errors import StageFailed
from stages.evaluate.hygiene import failures
from stages.evaluate.image_attacking import variants
from stages.evaluate.image_attacks import ImageAttacks
from stages.evaluate.showing import Shown
from stages.models.images import load_processor
from stages.models.load import load
from stages.models.routes import imposed
from stages.models.routing import weighing
from tests.stages.evaluate.shown_images import made, scores_of

LAYERS = ["vit.layers.0.mlp", "vit.layers.1.mlp"]
BUDGETS = (0.03, 0.1)
ATTACKS = {"apgd": APGD(steps=10), "soft": APGD(steps=10, routing="soft"),
           "square": Square(queries=30), "noise": Noise(queries=10), "paper": PaperPGD(steps=5)}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return made(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def data(both):
    return {"digits": both[1]["test"]}


def spec(**fields):
    return ImageAttacks(**{"dataset": "digits", "budgets": BUDGETS, "attacks": ATTACKS,
                           "checked": 6} | fields)


def shown(both, name, evaluation):
    folder, rows = both[0][name], evaluation.rows(both[1]["test"])
    return Shown(evaluation, load(folder).requires_grad_(False), load_processor(folder), rows)


@pytest.fixture(scope="module")
def scores(both, data):
    return scores_of(both[0]["sparse"], spec(), data)


def changed(before, after):
    """1 - IoU of single experts, per layer and image."""
    return {
        one.layer: (one.experts != other.experts).float().view(16, -1).mean(1).numpy()
        for one, other in zip(before, after, strict=True)
    }


def test_what_the_scores_say_is_what_the_model_does(both, data, scores):
    one = spec(attacks={"apgd": ATTACKS["apgd"]})
    this = shown(both, "sparse", one)
    labels = np.array(this.names)
    clean, routes = this.seen(this.pixels)
    assert 0.5 < scores["correct"].mean() < 1
    for shown_budget, budget in zip(("7.65", "25.5"), BUDGETS, strict=True):
        outcome = attack_images(this.classifier, ATTACKS["apgd"], this.pixels, this.labels,
                                budget, this.seeds("apgd"))
        drawn = attack_images(this.classifier, Noise(queries=1), this.pixels, this.labels,
                              budget, this.seeds("random")).images
        at = f"apgd/{shown_budget}"
        rise = this.losses(outcome.logits) - this.losses(clean)
        assert np.allclose(scores[f"loss_rise/{at}"], rise, atol=1e-4)
        after = this.seen(outcome.images)[1]
        random = this.seen(drawn)[1]
        for column, now in ((f"routing_change/{at}", after),
                            (f"routing_change_random/{shown_budget}", random)):
            by_layer = changed(routes, now)
            assert list(by_layer) == LAYERS
            for layer, values in by_layer.items():
                assert np.allclose(scores[f"{column}/{layer}"], values, atol=1e-6)
            assert np.allclose(scores[column], sum(by_layer.values()) / 2, atol=1e-6)
        # One expert per token: it is kept, or another is the first.
        for column, values in (("first_changed", scores[f"routing_change/{at}"]),
                               ("kept", 1 - scores[f"routing_change/{at}"]), ("none", 0)):
            assert np.allclose(scores[f"experts_{column}/{at}"], values, atol=1e-6)
        robust = [c for c in scores if c.startswith("robust/") and c.endswith(shown_budget)]
        assert len(robust) == 5
        kept = [c for c in robust if "paper" not in c]
        assert (scores[f"worst/{shown_budget}"] == scores[kept].min(axis=1)).all()
    assert (scores["routing_change_chance"] == 0.75).all()
    assert (scores["routing_change_noise"] <= 0.05).all()
    # Rounding to bfloat16 sends few tokens elsewhere, and more than another batch does.
    with torch.autocast("cpu", torch.bfloat16):
        rounded = changed(routes, this.seen(this.pixels)[1])
    for layer, values in rounded.items():
        assert np.allclose(scores[f"routing_change_noise_bfloat16/{layer}"], values, atol=1e-6)
    assert scores["routing_change_noise_bfloat16"].between(1e-6, 0.2 + 1e-6).any()
    assert scores["routing_change_noise_bfloat16"].mean() > scores["routing_change_noise"].mean()
    # Routes exchanged, with one attack, whose images are then the worst.
    table = scores_of(both[0]["sparse"], one, data)
    weigh = weighing(this.model)
    gold = np.array(table["gold"])
    for suffix, force in (
        ("", lambda r: imposed(r)), ("_experts", lambda r: imposed(r, weigh=weigh)),
        ("", lambda r: imposed(r, layers={LAYERS[1]})),
    ):
        layer = "" if force(routes)(routes[0]) is not None else f"/{LAYERS[1]}"
        under = labels[this.seen(this.pixels, force(after))[0].argmax(1)]
        agrees = (under == labels[clean.argmax(1)]).astype(float)
        assert (table[f"swap_clean_attacked{suffix}/25.5{layer}"] == agrees).all()
        back = labels[this.seen(outcome.images, force(routes))[0].argmax(1)]
        assert (table[f"swap_attacked_clean{suffix}/25.5{layer}"] == (back == gold)).all()
        if not suffix and not layer:
            assert (table["swap_clean_attacked_correct/25.5"] == (under == gold)).all()
            agreed = back == labels[clean.argmax(1)]
            assert (table["swap_attacked_clean_agrees/25.5"] == agreed).all()
            assert not agrees.all() or not (back == labels[outcome.logits.argmax(1)]).all()


def test_an_images_row_does_not_depend_on_its_shard(both, data, scores):
    alone = scores_of(both[0]["sparse"], spec(), data, size=32)  # two rows at a time
    pd.testing.assert_frame_equal(alone, scores, rtol=1e-3, atol=1e-3)


def test_metrics_and_curves_name_what_the_scores_hold(scores):
    evaluation = spec()
    names = [metric.name for metric in evaluation.metrics()]
    assert names[0] == evaluation.primary and len(set(names)) == len(names)
    for metric in evaluation.metrics():
        assert metric.column in scores
        experts = metric.column.startswith(("routing_change", "swap"))
        assert metric.of_experts == experts
    curves = {metric.name for metric in evaluation.curves(scores)}
    assert {f"routing_change/apgd/25.5/{LAYERS[0]}", f"routing_change_noise/{LAYERS[1]}",
            f"routing_change_noise_bfloat16/{LAYERS[0]}",
            f"routing_change_random/7.65/{LAYERS[0]}", f"swap_clean_attacked/7.65/{LAYERS[1]}",
            "check/apgd/7.65/steps", "check/square/unbounded"} <= curves
    assert not curves & set(names)


def test_a_dense_model_has_no_routes(both, data):
    dense = scores_of(both[0]["dense"], spec(attacks={"soft": ATTACKS["soft"]}), data)
    experts = [c for c in dense if c.startswith(("routing_change", "swap"))]
    assert experts and dense[experts].isna().all(axis=None)
    assert dense["robust/soft/25.5"].mean() < dense["correct"].mean()


# --- hygiene


def test_attacks_that_work_pass_their_checks(scores):
    checks = pd.DataFrame(spec().checks(scores))
    mine = checks[checks["attack"].str.startswith("apgd")].set_index("check")
    assert set(mine.index) == {"gradients", "monotone", "twice the steps", "twice the restarts",
                               "unbounded", "not weaker than soft", "not weaker than square",
                               "not weaker than noise"}
    assert mine.loc["unbounded", "value"] == 1 and mine.loc["monotone", "value"] == 0
    assert (mine.loc[["monotone", "not weaker than noise"], "n"] == 16).all()
    assert mine.loc["gradients", "n"] == scores["correct"].sum()
    assert (mine.loc[["twice the steps", "twice the restarts"], "n"] == 6).all()
    assert mine.loc["unbounded", "n"] <= 6
    assert mine.loc["not weaker than noise", "passed"]
    by_square = checks[checks["attack"].str.startswith("square")]["check"].tolist()
    assert by_square == ["monotone", "twice the queries", "unbounded", "not weaker than noise"]
    assert not checks["attack"].str.startswith(("paper", "noise at")).any()


def test_an_attack_that_does_not_work_is_found_out(both, data):
    pgd = PGD(steps=1, relative_step=1e-3, random_start=False, restarts=1)
    lame = {"pgd": pgd, "square": ATTACKS["square"]}
    scores = scores_of(both[0]["sparse"], spec(attacks=lame), data)
    failed = {check["check"]: check for check in spec(attacks=lame).checks(scores)
              if check["attack"].startswith("pgd") and not check["passed"]}
    assert failed["unbounded"]["value"] < 0.5
    gap = (scores["robust/pgd/25.5"] - scores["robust/square/25.5"]).clip(lower=0).mean()
    assert failed["not weaker than square"]["value"] == pytest.approx(gap) and gap > 0.1
    assert failed["not weaker than square"]["attack"] == "pgd at 25.5/255"
    assert "not weaker than square (pgd at 25.5/255: " in failures(failed.values())
    assert "check/pgd/25.5/restarts" not in scores  # they would all be equal


def test_attacks_are_checked_against_noise_though_none_is_named(both, data):
    """It is no attack of the evaluation: it counts in no worst case and has no metric."""
    evaluation = spec(attacks={"paper": ATTACKS["paper"], "pgd": PGD(
        steps=1, relative_step=1e-3, random_start=False, restarts=1)},
        checked=0, budgets=(0.1, 0.5))
    scores = scores_of(both[0]["sparse"], evaluation, data)
    this = shown(both, "sparse", evaluation)
    outcome = attack_images(this.classifier, Noise(), this.pixels, this.labels, 0.5,
                            this.seeds("random noise"))
    clean = scores["correct"].to_numpy() == 1
    robust = clean & (outcome.logits.argmax(1) == this.labels).numpy()
    assert scores["robust/random noise/127.5"].tolist() == robust.astype(float).tolist()
    assert scores["worst/127.5"].tolist() == scores["robust/pgd/127.5"].tolist()
    lost = (scores["robust/pgd/127.5"] - robust).mean()
    found = {c["check"]: c for c in evaluation.checks(scores)}
    check = found["not weaker than random noise"]
    assert check["attack"] == "pgd at 127.5/255" and not check["passed"]
    assert check["value"] == pytest.approx(lost) and lost > 0.3
    assert not [m.name for m in evaluation.metrics() if "random noise" in m.name]
    named = spec(attacks={"pgd": PGD(), "mine": Noise(queries=3)})
    assert list(named.tried) == ["pgd", "mine"]
    assert spec(attacks={"pgd": PGD(norm="l2")}).tried["random noise"] == Noise(norm="l2")


def test_checks_by_hand():
    """Ten images, two budgets; two of them attacked again."""
    evaluation = spec(attacks={"a": PGD(), "b": PGD(routing="soft"), "j": PGD(routing="joint"),
                               "t": Transfer()})
    scores = pd.DataFrame({
        "correct": [0.0] * 2 + [1.0] * 8,
        "robust/a/7.65": [1.0] * 10, "robust/a/25.5": [0.0] * 4 + [1.0] * 6,
        "robust/b/7.65": [0.0] + [1.0] * 9, "robust/b/25.5": [1.0] * 3 + [0.0] * 4 + [1.0] * 3,
        "robust/j/7.65": [1.0] * 10, "robust/j/25.5": [1.0] * 10,
        "robust/t/7.65": [1.0] * 10, "robust/t/25.5": [0.0] * 5 + [1.0] * 5,
        **{f"zero_gradient/{n}/7.65": [1.0] * 2 + [0.0] * 7 + [0.8] for n in "abjt"},
        "check/a/7.65/steps": [0.0, 1.0] + [np.nan] * 8,
        "check/a/25.5/steps": [1.0, 1.0] + [np.nan] * 8,
        "check/a/unbounded": [1.0, 0.0] + [np.nan] * 8,
        # Of the control nothing else is asked.
        "robust/random noise/7.65": [1.0] * 10,
        "robust/random noise/25.5": [0.0] * 6 + [1.0] * 4,
    })
    found = {(c["attack"], c["check"]): c for c in evaluation.checks(scores)}
    values = {key: (round(c["value"], 3), c["n"]) for key, c in found.items()}
    assert values == {
        # Of those that are right without an attack.
        ("a", "gradients"): (0.1, 8), ("b", "gradients"): (0.1, 8),
        ("j", "gradients"): (0.1, 8), ("t", "gradients"): (0.1, 8),
        ("a", "monotone"): (0.0, 10), ("b", "monotone"): (0.1, 10),
        ("j", "monotone"): (0.0, 10), ("t", "monotone"): (0.0, 10),
        ("a at 7.65/255", "twice the steps"): (0.5, 2),
        ("a", "unbounded"): (0.5, 2),
        ("a at 25.5/255", "not weaker than b"): (0.3, 10),  # 4, 5 and 6
        ("a at 7.65/255", "not weaker than j"): (0.0, 10),
        ("a at 25.5/255", "not weaker than t"): (0.1, 10),
        ("b at 25.5/255", "not weaker than t"): (0.3, 10),
        ("a at 25.5/255", "not weaker than random noise"): (0.2, 10),  # 5 and 6
        ("b at 25.5/255", "not weaker than random noise"): (0.3, 10),  # 1, 2 and 3
        ("j at 25.5/255", "not weaker than random noise"): (0.6, 10),
    }


def test_variants_have_twice_the_effort():
    found = variants("x", PGD(steps=5))
    assert found["steps"] == ("x", PGD(steps=10)) and found["restarts"] == ("x/again", PGD(steps=5))
    assert list(variants("x", PGD(random_start=False, restarts=1))) == ["steps"]
    assert variants("x", Square(queries=7)) == {"queries": ("x", Square(queries=14))}
    assert variants("x", Noise()) == variants("x", PaperPGD()) == variants("x", Transfer()) == {}


# --- transfer


@pytest.mark.parametrize(("model", "other"), [("dense", "sparse"), ("sparse", "dense")])
def test_transfer_shows_the_other_models_images(both, data, model, other):
    attack = Transfer(steps=8, model=other, routing="soft")
    evaluation = spec(attacks={"moved": attack}, checked=0)
    scores = scores_of(both[0][model], evaluation, data, surrogates={other: both[0][other]})
    this, that = shown(both, model, evaluation), shown(both, other, evaluation)
    plain = attack if other == "sparse" else Transfer(steps=8)
    seeds = this.seeds("moved")
    outcome = attack_images(this.classifier, plain, this.pixels, this.labels, 0.1, seeds,
                            that.classifier)
    clean = this.seen(this.pixels)[0].argmax(1) == this.labels
    robust = clean & (this.seen(outcome.images)[0].argmax(1) == this.labels)
    assert scores["robust/moved/25.5"].tolist() == robust.float().tolist()
    # The images are made on the other model, and break it more often.
    there = that.seen(outcome.images)[0].argmax(1) == that.labels
    assert there.float().mean() < robust.float().mean()


def test_a_surrogate_must_read_the_same_images(both, data):
    evaluation = spec(attacks={"moved": Transfer(model="odd")})
    model, processor = load(both[0]["dense"]), load_processor(both[0]["dense"])
    other = processor.__class__(**vars(processor) | {"labels": processor.labels[::-1]})
    rows = [json.loads(request.row) for request in evaluation.requests(data)]
    with pytest.raises(StageFailed, match="transfer: odd has other labels"):
        evaluation.procedure(model, processor, rows, {"odd": (model, other)})


def test_transfer_names_the_other_model():
    read = TypeAdapter(AnyImageAttack).validate_python
    assert read({"kind": "transfer", "from": "vit"}).model == "vit"
    evaluation = spec(attacks={"a": Transfer(), "b": Transfer(model="vit"), "c": PGD(),
                               "d": Transfer(seed="other")})  # fmt: skip
    asked = evaluation.surrogates()
    assert asked == ((None, False), ("vit", False), (None, True))
    told = evaluation.with_surrogates(dict(zip(asked, ("moe", "vit", "vit"), strict=True)))
    assert [each.role for each in told.surrogates()] == ["moe", "vit", "vit/other-seed"]
    assert told.attacks["c"] == PGD()
    # As it travels with a request.
    assert ImageAttacks.model_validate_json(told.model_dump_json()) == told
    with pytest.raises(ValidationError, match="technique has no effect on a classifier of images"):
        spec(technique={"kind": "dola"})
