"""Probes on a tiny model: each number against the model asked by hand."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from stages.errors import StageFailed
from stages.evaluate.asking import Asker
from stages.evaluate.base import Request
from stages.evaluate.decoding import expert_count
from stages.evaluate.engine import Engine
from stages.evaluate.probes import (
    GEOMETRY,
    ExpertInterventions,
    LocalLipschitz,
    RouterGeometry,
    _blocks,
    correlation,
)
from stages.evaluate.probing import Intervenor
from stages.evaluate.scorer import score
from stages.evaluate.techniques import ExpertCount
from stages.models.routes import another_k, imposed, routed, without_output
from stages.models.routing import weighing
from stages.models.size import measure
from stages.models.tiny import tiny_model, tiny_tokenizer

SHOP = {"dataset": "shop", "template": "sentiment"}
TEXTS = ["Great little thing", "Awful dull thing", "A nice warm day", "Not my day"]
WORDS = (" negative", " positive")


@pytest.fixture(scope="module")
def data():
    ids = [str(n) for n in range(len(TEXTS))]
    rows = pd.DataFrame(
        {"id": ids, "document": ids, "text": TEXTS, "label": ["positive", "negative"] * 2})
    train = rows.assign(text=[text[::-1] for text in TEXTS])
    return {"shop": rows, "shop#train": train}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    made = {}
    for name in ("mixtral", "llama"):
        folder, tokenizer = tmp_path_factory.mktemp(name), tiny_tokenizer()
        tiny_model(name, tokenizer, seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = Engine(folder)
    return made


def scores_of(engine, evaluation, data):
    responses = {r.id: r for r in engine.respond(evaluation.requests(data))}
    return evaluation.score(data, responses)


def asked(engine):
    """Prediction and cross-entropy of each text, by the scorer."""
    requests = [Request(str(i), f"Text: {t}\nSentiment:", WORDS) for i, t in enumerate(TEXTS)]
    logprobs = torch.tensor(
        [r.logprobs for r in score(engine.model, engine.tokenizer, requests, packed=False)])
    gold = torch.tensor([1, 0, 1, 0])
    right = (logprobs.argmax(1) == gold).double().tolist()
    return right, -logprobs.log_softmax(1)[torch.arange(4), gold]


def test_interventions_are_what_the_model_says_under_them(engines, data):
    engine = engines["mixtral"]
    evaluation = ExpertInterventions(
        **SHOP, shares=(0.5, 1.0), top_k=(1, 2, 4), top_k_weights=("by_rule", "other_rule"),
        prune=(1,), calibration_rows=2, random_masks=2)
    scores = scores_of(engine, evaluation, data)
    right, loss = asked(engine)
    assert scores["correct"].tolist() == right
    assert np.allclose(scores["loss"], loss, atol=1e-4)
    with routed(engine.model, without_output()):
        right_without, loss_without = asked(engine)
    assert scores["correct/drop_output_1"].tolist() == right_without
    assert np.allclose(scores["loss/drop_output_1"], loss_without - loss, atol=1e-4)
    # K as it is configured changes nothing.
    assert scores["loss/top_2"].eq(0).all() and scores["loss/top_2_other_rule"].eq(0).all()
    with expert_count(engine.model, ExpertCount(kind="expert_count", top_k=1)):
        _, loss_one = asked(engine)
    assert np.allclose(scores["loss/top_1"], loss_one - loss, atol=1e-4)
    with another_k(engine.model, 4, weighing(engine.model)) as policy:
        with routed(engine.model, policy):
            _, loss_other = asked(engine)
    assert np.allclose(scores["loss/top_4_other_rule"], loss_other - loss, atol=1e-4)
    assert not np.allclose(scores["loss/top_4_other_rule"], scores["loss/top_4"], atol=1e-4)
    # The tiny model's card with another number of experts in its configuration.
    costs = {}
    for count in (1, 2, 4):
        engine.model.config.num_experts_per_tok = count
        costs[count] = measure(engine.model, "").flops_per_token
    engine.model.config.num_experts_per_tok = 2
    for count, cost in costs.items():
        assert scores[f"operations/top_{count}"].tolist() == pytest.approx([cost / costs[2]] * 4)
    names = evaluation.interventions
    assert len(names) == 5 * 2 + 2 * 3 + 3
    accuracies = scores[[f"correct/{name}" for name in names]].to_numpy()
    mean = evaluation.metrics()[0]
    assert mean.name == evaluation.primary
    assert mean.value(mean.statistics(scores).sum(0)) == pytest.approx(accuracies.mean())
    layers = [c for c in scores if c.startswith("criticality/")]
    assert len(layers) == 4 == len(evaluation.curves(scores))
    # A mask of half the experts and no mask differ.
    assert scores[layers].abs().to_numpy().max() > 1e-4
    assert evaluation.of_experts


def test_attacked_texts_can_be_asked_about(engines, data):
    engine = engines["mixtral"]
    fields = {**SHOP, "substitutions": ("drop_output",)}
    clean, attacked = (
        scores_of(engine, ExpertInterventions(**fields, epsilon=e, steps=3), data)
        for e in (0.0, 0.5))
    _, loss = asked(engine)
    assert np.allclose(clean["loss"], loss, atol=1e-4)
    # The attack raises the margin of a wrong answer, which of two is the loss.
    assert (attacked["loss"] > clean["loss"]).all()
    assert attacked["correct"].sum() <= clean["correct"].sum()
    assert not np.allclose(attacked["loss/drop_output_1"], clean["loss/drop_output_1"], atol=1e-4)


def test_pruning_follows_the_usage_in_the_calibration_texts(engines, data):
    engine = engines["mixtral"]
    evaluation = ExpertInterventions(
        **SHOP, substitutions=(), prune=(1,), calibration_rows=2)
    rows = [json.loads(request.row) for request in evaluation.requests(data)]
    assert [text["text"] for text in rows[0]["calibration"]] == [t[::-1] for t in TEXTS[:2]]
    used = Intervenor(evaluation, engine.model, engine.tokenizer)._usage(rows[0])
    assert used.shape == (4, 4) and torch.allclose(used.sum(1), torch.tensor(2.0))
    assert evaluation.sources()["shop#train"] == ("shop", "train")
    assert "shop#train" not in ExpertInterventions(**SHOP).sources()


def test_geometry_is_averaged_over_layers(engines, data):
    evaluation = RouterGeometry(**SHOP, steps=2)
    scores = scores_of(engines["mixtral"], evaluation, data)
    for name in GEOMETRY:
        if name.startswith("smoothness"):
            continue
        layers = [c for c in scores if c.startswith(f"{name}/")]
        assert len(layers) == 4
        assert np.allclose(scores[layers].mean(axis=1), scores[name])
    assert (scores["radius_linf"] < scores["radius_l2"]).all()
    assert scores["router_margin"].between(0, 1).all()
    assert scores["entropy"].between(0, np.log(4)).all()
    # Ascent on the loss raises it.
    assert scores["loss_rise"].ge(0).all() and scores["loss_rise"].gt(0).any()
    ratio = scores["smoothness"].dropna()
    assert len(ratio) and ratio.ge(1 - 1e-6).all()


def test_slopes_around_a_text(engines, data):
    evaluation = LocalLipschitz(**SHOP, steps=4, samples=4, radii=(0.3, 0.01))
    scores = scores_of(engines["mixtral"], evaluation, data)
    single = [
        scores_of(engines["mixtral"], LocalLipschitz(**SHOP, steps=4, samples=4, radius=r), data)
        for r in (0.01, 0.1, 0.3)
    ]
    for column in ("lipschitz", "lipschitz_random", "lipschitz_frozen"):
        # What is found within a radius is what any search within it or a smaller one found.
        searched = np.stack([each[column] for each in single])
        nested = np.stack([scores[column + suffix] for suffix in ("/0.01", "", "/0.3")])
        assert np.allclose(nested, np.maximum.accumulate(searched))
        assert (np.diff(nested, axis=0) >= 0).all() and (np.diff(searched, axis=0) < 0).any()
        if column != "lipschitz_random":
            assert (nested >= scores["jacobian"].to_numpy()).all()
    layers = [f"model.layers.{i}.mlp" for i in range(4)]
    for column in ("block", "block_random", "block_frozen"):
        of = scores[[f"{column}/{layer}" for layer in layers]]
        assert of.gt(0).all(axis=None) and np.allclose(scores[column], of.mean(axis=1))
    assert (scores["lipschitz"] > scores["lipschitz_random"]).all()
    assert (scores["block"] > scores["block_random"]).all()
    engine = engines["mixtral"]
    asker = Asker(evaluation, engine.model, engine.tokenizer)
    row = evaluation.rows(data["shop"])[0]
    question = asker.question(row, row["text"])
    clean = asker.victim.table[question.tokens]
    with torch.no_grad(), routed(engine.model) as routes:
        asker.victim.logprobs(clean[None], question)

    def norm(force):
        """Of all answers over the tokens of the text alone, among those of the prompt."""

        def answers(embedded):
            with routed(engine.model, force):
                return asker.victim.logprobs(embedded[None], question)[0]

        jacobian = torch.autograd.functional.jacobian(answers, clean)[:, question.editable]
        return torch.linalg.matrix_norm(jacobian.flatten(1), 2).item()

    free, frozen = norm(None), norm(imposed(routes))
    # With the experts alone held, not their weights, the answers are the same near the text.
    assert norm(imposed(routes, weigh=weighing(engine.model))) == pytest.approx(free, rel=1e-4)
    assert 0 < question.editable.sum() < len(clean)
    assert scores["jacobian"][0] == pytest.approx(free, rel=1e-4)
    assert scores["jacobian_frozen"][0] == pytest.approx(frozen, rel=1e-4)
    assert abs(frozen / free - 1) > 1e-2
    assert np.allclose(scores["routing_share"], scores["lipschitz"] / scores["lipschitz_frozen"])
    dense = scores_of(engines["llama"], evaluation, data)
    assert dense["lipschitz"].gt(0).all() and dense["lipschitz_frozen"].isna().all()
    assert not evaluation.of_experts


def test_slopes_of_blocks_are_compared_over_the_same_blocks():
    """A block without experts counts with experts free and frozen alike."""
    sparse, plain = {"free": 9.0, "random": 4.0, "frozen": 5.0}, {"free": 3.0, "random": 2.0}
    row = _blocks({"a": plain, "b": sparse})
    assert row == {"block": 6.0, "block/a": 3.0, "block/b": 9.0, "block_random": 3.0,
                   "block_random/a": 2.0, "block_random/b": 4.0, "block_frozen": 4.0,
                   "block_frozen/b": 5.0}  # fmt: skip
    dense = _blocks({"a": plain})
    assert dense["block"] == 3.0 and np.isnan(dense["block_frozen"])


def test_the_correlation_is_pearsons():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"a": rng.normal(size=50), "b": rng.normal(size=50)})
    table["b"] += table["a"]
    table.loc[3, "a"] = np.nan
    metric = correlation("a", "b", "")
    found = metric.value(metric.statistics(table).sum(0))
    assert found == pytest.approx(table["a"].corr(table["b"]))


def test_dense_models_and_empty_probes_are_refused(engines, data):
    for evaluation in (ExpertInterventions(**SHOP), RouterGeometry(**SHOP)):
        with pytest.raises(StageFailed, match="llama.* has no experts"):
            scores_of(engines["llama"], evaluation, data)
    with pytest.raises(ValidationError, match="no intervention is named"):
        ExpertInterventions(**SHOP, substitutions=())
