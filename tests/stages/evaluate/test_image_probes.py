"""Probes of image classifiers: each number against the model asked by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stages.attack.image_geometry import Draws
from stages.attack.image_spec import PGD
from stages.attack.images import attack_images
from stages.errors import StageFailed
from stages.evaluate.base import Response
from stages.evaluate.image_probes import ImageGeometry, ImageInterventions, ImageLipschitz
from stages.evaluate.image_probing import ImageIntervenor
from stages.evaluate.probes import GEOMETRY, ExpertInterventions, RouterGeometry
from stages.evaluate.showing import Shown
from stages.models import routes
from stages.models.images import load_processor
from stages.models.load import load
from stages.models.routing import weighing
from stages.probe.geometry import groups as fitted
from stages.probe.geometry import watched
from stages.probe.slopes import jacobian_norms, steepest_slopes
from tests.stages.evaluate.shown_images import made, scores_of

LAYERS = ["vit.layers.0.mlp", "vit.layers.1.mlp"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return made(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def data(both):
    return {"digits": both[1]["test"], "digits#train": both[1]["train"]}


def shown(both, evaluation):
    rows = evaluation.rows(both[1]["test"])
    folder = both[0]["sparse"]
    return Shown(evaluation, load(folder).requires_grad_(False), load_processor(folder), rows)


def test_interventions_are_what_the_model_says_under_them(both, data):
    evaluation = ImageInterventions(
        dataset="digits", shares=(0.5, 1.0), top_k=(1, 3), prune=(1,), calibration_rows=8,
        random_masks=3)
    scores = scores_of(both[0]["sparse"], evaluation, data)
    this = shown(both, evaluation)
    weigh = weighing(this.model)
    gold = this.labels.numpy()
    plain, routing = this.seen(this.pixels)
    assert (scores["correct"] == (plain.argmax(1).numpy() == gold)).all()
    assert np.allclose(scores["loss"], this.losses(plain), atol=1e-4)
    policies = {"next_ranked_1": routes.next_ranked(), "drop_output_1": routes.without_output(),
                "top_3": None}
    for name, policy in policies.items():
        with routes.another_k(this.model, 3 if name == "top_3" else 1):
            under, _ = this.seen(this.pixels, policy)
        assert (scores[f"correct/{name}"] == (under.argmax(1).numpy() == gold)).all()
        assert (scores[f"changed/{name}"] == (under.argmax(1) != plain.argmax(1)).numpy()).all()
        rise = this.losses(under) - this.losses(plain)
        assert rise.abs().max() > 0.01 and np.allclose(scores[f"loss/{name}"], rise, atol=1e-3)
    # The configured K changes nothing, and with one expert dropping the first drops everything.
    assert scores["loss/top_1"].eq(0).all()
    assert np.allclose(scores["loss/drop_first_1"], scores["loss/drop_output_1"], atol=1e-4)
    assert not np.allclose(scores["loss/random_0.5"], scores["loss/random_1"], atol=1e-3)
    layers = [metric.name for metric in evaluation.curves(scores)]
    assert layers == [f"criticality/{layer}" for layer in LAYERS]
    # The largest of three masks, each of half the experts of one layer.
    rises = []
    for number in range(3):
        seed = routes.hash_of(f"0/{LAYERS[1]}/{number}")
        gone = torch.randperm(4, generator=torch.Generator().manual_seed(seed))[:2].tolist()
        under, _ = this.seen(this.pixels, routes.masked({LAYERS[1]: gone}, weigh))
        rises.append(this.losses(under) - this.losses(plain))
    assert np.allclose(scores[layers[1]], torch.stack(rises).amax(0), atol=1e-3)
    # The least used expert of each layer on the calibration images is the one that goes.
    _, counted = this.seen(this.decoded(evaluation.rows(both[1]["train"].head(8))))
    gone = {each.layer: [int(torch.bincount(each.experts[:, 0], minlength=4).argmin())]
            for each in counted}
    under, _ = this.seen(this.pixels, routes.masked(gone, weigh))
    rise = this.losses(under) - this.losses(plain)
    assert np.allclose(scores["loss/prune_least_used_1"], rise, atol=1e-3)


def test_the_names_are_those_of_texts():
    told = {"shares": (0.5,), "top_k": (2,), "prune": (1,)}
    texts = ExpertInterventions(dataset="d", template="sentiment", **told)
    images = ImageInterventions(dataset="d", **told)
    assert [m.name for m in images.metrics()] == [m.name for m in texts.metrics()]
    assert images.of_experts and ImageGeometry(dataset="d").of_experts
    assert images.sources() == {"d": ("d", "test"), "d#train": ("d", "train")}
    with pytest.raises(ValidationError, match="no intervention is named"):
        ImageInterventions(dataset="d", substitutions=())


def test_random_experts_are_drawn_for_each_image(both, data):
    """By its id alone: not by its place in the batch, nor the same for all."""
    evaluation = ImageInterventions(dataset="digits", substitutions=("random",))
    whole = scores_of(both[0]["sparse"], evaluation, data)
    single = scores_of(both[0]["sparse"], evaluation, data, size=16)
    assert np.allclose(whole["loss/random_1"], single["loss/random_1"], atol=1e-3)
    this = shown(both, evaluation)
    rows = [json.loads(request.row) for request in evaluation.requests(data)]
    intervenor = ImageIntervenor(evaluation, this.model, this.classifier.processor, rows)
    drawn = []
    for id in intervenor.ids[:2]:
        (_, policy), = intervenor.policies(id, LAYERS, None)
        drawn.append(this.seen(this.pixels[:1], policy)[1][0].experts)
    assert not torch.equal(*drawn)


def test_geometry_is_that_of_each_images_tokens(both, data):
    evaluation = ImageGeometry(dataset="digits", budget=0.1, steps=4)
    scores = scores_of(both[0]["sparse"], evaluation, data)
    assert set(GEOMETRY) < set(scores)
    for name in GEOMETRY:
        columns = [f"{name}/{layer}" for layer in LAYERS]
        assert np.allclose(scores[columns].mean(axis=1), scores[name], equal_nan=True)
    this = shown(both, evaluation)
    with torch.no_grad(), watched(this.model) as blocks:
        logits = this.classifier(this.pixels)
    # Token by token, with the experts asked one by one.
    block = blocks[1]
    p, order = block.routing.logits.softmax(-1).sort(-1, descending=True)
    one, other = (block.expert(block.hidden, order[:, rank]) for rank in (0, 1))
    rows = block.scorers[order[:, 0]] - block.scorers[order[:, 1]]
    distance = (one - other).norm(dim=-1)
    for name, value in {
        "router_margin": p[:, 0] - p[:, 1],
        "disagreement": 2 * distance / (one.norm(dim=-1) + other.norm(dim=-1)),
        "jump": p[:, 0] * distance,
        "routing_term": p[:, 0] * p[:, 1] * distance * rows.norm(dim=-1),
    }.items():
        assert np.allclose(scores[f"{name}/{LAYERS[1]}"], value.view(16, -1).mean(1), rtol=1e-3)
    outcome = attack_images(this.classifier, PGD(steps=4, restarts=1), this.pixels, this.labels,
                            0.1, this.seeds("attack"))
    rise = this.losses(outcome.logits) - this.losses(logits)
    assert rise.mean() > 0.1 and np.allclose(scores["loss_rise"], rise, atol=1e-3)
    metric = evaluation.metrics()[-1]
    found = metric.value(metric.statistics(scores).sum(0))
    assert found == pytest.approx(scores["routing_term"].corr(scores["loss_rise"]))
    # Fixed routing, statements F1 and F2, on a trained router; and against random groups.
    fits = scores.dropna(subset=["smoothness"])
    assert len(fits) and (fits["smoothness"] >= 1 - 1e-6).all()
    assert (fits["smoothness_frobenius"] >= fits["smoothness_bound"] - 1e-6).all()
    assert fits["overlap"].between(0, 1 + 1e-6).all()
    gain = fits["smoothness"] - fits["smoothness_random"]
    assert np.allclose(fits["smoothness_gain"], gain)


def test_tokens_that_an_expert_had_no_room_for_are_left_out_and_counted(both, data):
    """One expert each of four, which take one of an image's five tokens."""
    evaluation = ImageGeometry(dataset="digits", steps=1)
    this = shown(both, evaluation)
    assert scores_of(both[0]["sparse"], evaluation, data)["dropped"].eq(0).all()
    this.model.config.eval_capacity_factor, this.model.config.group_size = 0.5, 1
    rows = [json.loads(request.row) for request in evaluation.requests(data)]
    found = evaluation.procedure(this.model, this.classifier.processor, rows)
    scores = evaluation.score(data, {
        row["id"]: Response(row["id"], result=json.dumps(result))
        for row, result in zip(rows, found, strict=True)})
    for routing in this.seen(this.pixels)[1]:
        kept = routing.weights.view(16, 5) > 0
        first, second = routing.logits.topk(2).values.view(16, 5, 2).unbind(-1)
        margin = ((first - second) * kept).sum(1) / kept.sum(1)
        dropped = scores[f"dropped/{routing.layer}"]
        assert np.allclose(dropped, 1 - kept.float().mean(1)) and dropped.between(0.2, 0.8).all()
        assert np.allclose(scores[f"logit_margin/{routing.layer}"], margin, rtol=1e-3)
        assert scores[f"disagreement_next/{routing.layer}"].gt(0.01).all()
    names = [metric.name for metric in evaluation.metrics()]
    assert "dropped" in names and not any(m.name == "dropped" for m in RouterGeometry(
        dataset="d", template="sentiment").metrics())  # fmt: skip


def test_fixed_routing_on_a_trained_router_against_the_root_of_the_experts(both, data):
    """Statement F3, layer by layer, and with the tokens made orthogonal."""
    evaluation = ImageGeometry(dataset="digits", steps=1)
    scores = scores_of(both[0]["sparse"], evaluation, data)
    this = shown(both, evaluation)
    with torch.no_grad(), watched(this.model) as blocks:
        this.classifier(this.pixels)
    seen, beyond = 0, []
    for block in blocks:
        layer = block.routing.layer
        of = {name: scores[f"{name}/{layer}"] for name in GEOMETRY}
        for image, part in enumerate(block.split(16)):
            if np.isnan(of["smoothness"][image]):
                continue
            hidden, chosen = part.hidden.double(), part.routing.experts[:, 0]
            groups = [hidden[chosen == expert] for expert in chosen.unique()]
            values = torch.linalg.eigvalsh(sum(torch.linalg.pinv(x) @ x for x in groups))
            largest, least = of["eigenvalue"][image], of["least_eigenvalue"][image]
            assert largest == pytest.approx(values[-1].item(), rel=1e-6)
            assert least == pytest.approx(values[values > 1e-9][0].item(), rel=1e-3)
            overlap, count = of["overlap"][image], len(groups)
            assert 1 - 1e-6 <= largest <= 1 + (count - 1) * overlap + 1e-6
            share, cancelled = of["smoothness_share"][image], of["cancellation"][image]
            assert share == pytest.approx(of["smoothness"][image] / count**0.5)
            assert (1 - 1e-6) / largest <= cancelled <= (1 + 1e-6) / least
            assert share <= (1 + 1e-6) / least**0.5
            beyond.append(cancelled > 1.01)
            seen += count > 1
            # The same tokens, turned so that no two of them share a direction.
            turned = torch.linalg.qr(hidden.T)[0].T.float()
            with torch.no_grad():
                apart = fitted(replace(part, hidden=turned), torch.Generator().manual_seed(0))
            assert apart["cancellation"] == pytest.approx(1, rel=1e-4)
            assert apart["eigenvalue"] == pytest.approx(1, rel=1e-4)
            assert count**-0.5 - 1e-5 <= apart["smoothness_share"] <= 1 + 1e-5
    # Trained experts do share directions, and some of the time disagree on them.
    assert seen > 8 and any(beyond)


def test_slopes_around_an_image(both, data):
    told = {"dataset": "digits", "steps": 8, "samples": 4}
    evaluation = ImageLipschitz(**told, radius=0.2, radii=(0.5, 0.05))
    scores = scores_of(both[0]["sparse"], evaluation, data)
    single = [scores_of(both[0]["sparse"], ImageLipschitz(**told, radius=r), data)
              for r in (0.05, 0.2, 0.5)]
    for column in ("lipschitz", "lipschitz_random", "lipschitz_frozen"):
        # What is found within a radius is what any search within it or a smaller one found.
        searched = np.stack([each[column] for each in single])
        nested = np.stack([scores[column + suffix] for suffix in ("/0.05", "", "/0.5")])
        assert np.allclose(nested, np.maximum.accumulate(searched))
        assert (np.diff(nested, axis=0) >= 0).all() and (np.diff(searched, axis=0) < 0).any()
    # Blocks, whichever images share the batch.
    layers = [f"block/vit.layers.{i}.mlp" for i in range(2)]
    assert [c for c in scores if c.startswith("block/")] == layers
    assert np.allclose(scores["block"], scores[layers].mean(axis=1))
    frozen = [f"block_frozen/{layer}" for layer in LAYERS]
    assert np.allclose(scores["block_frozen"], scores[frozen].mean(axis=1))
    assert scores[layers].gt(0).all(axis=None)
    few = scores_of(both[0]["sparse"], evaluation, data, size=5)
    assert np.allclose(few["block"], scores["block"], rtol=1e-3)
    assert np.allclose(few["block_random"], scores["block_random"], rtol=1e-3)
    assert (scores["block"] > scores["block_random"]).all() and scores["block_random"].gt(0).all()
    assert (scores["lipschitz"] > scores["lipschitz_random"]).all()
    this = shown(both, evaluation)
    _, routing = this.seen(this.pixels[:1])

    def norm(function):
        jacobian = torch.autograd.functional.jacobian(function, this.pixels[:1])
        return torch.linalg.matrix_norm(jacobian.reshape(10, 64), 2).item()

    def kept(images):
        with routes.routed(this.model, routes.imposed(routing)):
            return this.classifier(images)

    assert scores["jacobian"][0] == pytest.approx(norm(this.classifier), rel=1e-2)
    assert scores["jacobian_frozen"][0] == pytest.approx(norm(kept), rel=1e-2)
    assert abs(norm(kept) / norm(this.classifier) - 1) > 0.02
    # Without a choice there is no jump; with one, ascent finds the jumps of some images.
    assert (scores["routing_share"] > 1.2).any()
    # Near an image the choice of experts is the same, so the Jacobian with them held, and not their
    # weights, is too. Ascent comes up to its norm inside the valid range, and to less of it here,
    # where black pixels cannot move both ways.
    assert (scores["lipschitz_frozen"] >= 0.75 * scores["jacobian"]).all()
    grey, draws = 0.25 + this.pixels / 2, Draws([(7, i) for i in range(16)])
    held = routes.imposed(this.seen(grey)[1], weigh=weighing(this.model))

    def weighed(images):
        with routes.routed(this.model, held):
            return this.classifier(images)

    norms = jacobian_norms(weighed, grey, draws)
    assert torch.allclose(jacobian_norms(this.classifier, grey, draws), norms, rtol=1e-3)
    found = steepest_slopes(weighed, grey, 0.005, steps=20, restarts=2, draws=draws) / norms
    assert found.min() > 0.95 and found.max() < 1.05
    alone = scores_of(both[0]["sparse"], evaluation, data, size=16)
    assert np.allclose(alone["jacobian"], scores["jacobian"], rtol=1e-2)
    dense = scores_of(both[0]["dense"], evaluation, data)
    assert dense[["lipschitz", "jacobian", "block", *layers]].gt(0).all(axis=None)
    assert dense["block_frozen"].isna().all() and dense["lipschitz_frozen/0.5"].isna().all()
    assert dense[["lipschitz_frozen", "jacobian_frozen", "routing_share"]].isna().all(axis=None)
    assert not evaluation.of_experts


def test_dense_models_are_refused(both, data):
    for evaluation in (ImageInterventions(dataset="digits"), ImageGeometry(dataset="digits")):
        with pytest.raises(StageFailed, match="vit.* has no experts"):
            scores_of(both[0]["dense"], evaluation, data)
