"""Expert specialisation on a tiny model, against tables counted token by token."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from stages.errors import StageFailed
from stages.evaluate.base import Response
from stages.evaluate.engine import Engine
from stages.evaluate.specialisation import (
    TOKEN_CLASSES,
    ExpertSpecialisation,
    ImageSpecialisation,
    token_class,
)
from stages.models.routes import routed
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.vision import from_scratch
from stages.models.vision_spec import VisionSpec
from stages.probe.specialisation import information, purity
from stages.statistics import estimate, summarise

TEXTS = ["Great, 12 little things", "Awful!", "A nice 3rd day", "Not my day..."]
SPEC = ExpertSpecialisation(dataset="shop", template="sentiment")


@pytest.fixture(scope="module")
def data():
    ids = [str(n) for n in range(len(TEXTS))]
    return {"shop": pd.DataFrame({"id": ids, "document": ids, "text": TEXTS,
                                  "label": ["positive", "negative"] * 2})}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    made = {}
    for name in ("mixtral", "llama"):
        folder, tokenizer = tmp_path_factory.mktemp(name), tiny_tokenizer()
        tiny_model(name, tokenizer, seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = Engine(folder)
    return made


@pytest.fixture(scope="module")
def scores(engines, data):
    responses = {r.id: r for r in engines["mixtral"].respond(SPEC.requests(data))}
    return SPEC.score(data, responses)


def test_classes_of_tokens():
    def of(text, piece):
        begin = text.index(piece)
        return TOKEN_CLASSES[token_class(text, begin, begin + len(piece))]

    assert of("a great film", " great") == "word" == of("(great", "great")
    assert of("unhappy", "happy") == "word_part" and of("don't", "t") == "word"
    assert of("in 1999,", " 1999") == "digits" and of("x, y", ",") == "punctuation"
    assert of("3rd", "3rd") == "other" == of("a  b", "  ")
    assert token_class("word", 0, 0) == TOKEN_CLASSES.index("other")


def by_hand(engine):
    """For each text, its tokens' classes and chosen experts by layer: a byte is a token."""
    for text in TEXTS:
        prompt = f"Text: {text}\nSentiment:"
        tokens = engine.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad(), routed(engine.model) as routes:
            engine.model(input_ids=tokens, use_cache=False)
        first = tokens.shape[1] - len(prompt) + len("Text: ")
        places = range(first, first + len(text))
        classes = [token_class(f"Text: {text}", 6 + n, 7 + n) for n in range(len(text))]
        yield classes, {r.layer: [r.experts[p].tolist() for p in places] for r in routes}


def test_tables_are_counted_over_the_texts_own_tokens(scores, engines):
    for row, (classes, layers) in zip(scores.to_dict("records"), by_hand(engines["mixtral"]),
                                      strict=True):
        for layer, chosen in layers.items():
            expected = np.zeros((4, len(TOKEN_CLASSES)), dtype=int)
            for number, experts in zip(classes, chosen, strict=True):
                expected[experts, number] += 1
            found = np.reshape(row[f"tokens/{layer}"], expected.shape)
            # Blanks stand for no character of the text alone, so they do not count.
            other = TOKEN_CLASSES.index("other")
            assert (np.delete(found, other, 1) == np.delete(expected, other, 1)).all()
            assert found.sum(1).tolist() == list(row[f"used/{layer}"])
            # A permutation keeps how often each expert and each class is there.
            permuted = np.reshape(row[f"permuted/{layer}"], expected.shape)
            assert (permuted.sum(0) == found.sum(0)).all()
            assert (permuted.sum(1) == found.sum(1)).all()
    assert any(row["tokens/model.layers.0.mlp"] != row["permuted/model.layers.0.mlp"]
               for row in scores.to_dict("records"))


def test_metrics_are_those_of_the_summed_tables(scores):
    layers = [c.removeprefix("used/") for c in scores if c.startswith("used/")]
    assert len(layers) == 4
    summary = summarise(scores, SPEC.metrics(), resamples=100)
    curves = summarise(scores, SPEC.curves(scores), resamples=100)

    def table(kind, layer):
        return np.sum(scores[f"{kind}/{layer}"].tolist(), axis=0).reshape(4, -1)

    def by_label(layer, gold):
        used = np.array(scores[f"used/{layer}"].tolist())
        return np.stack([used[gold == label].sum(0) for label in ("negative", "positive")], axis=1)

    own = [table("tokens", layer) for layer in layers]
    none = [table("permuted", layer) for layer in layers]
    told, chance = (np.mean([information(t) for t in tables]) for tables in (own, none))
    assert summary["information_token_class"]["value"] == pytest.approx(told)
    assert summary["information_permuted_token_class"]["value"] == pytest.approx(chance)
    assert summary[SPEC.primary]["value"] == pytest.approx(told - chance)
    assert SPEC.metrics()[0].name == SPEC.primary and SPEC.of_experts
    pure = np.mean([purity(t) for t in own])
    assert summary["purity_token_class"]["value"] == pytest.approx(pure)
    labels = [by_label(layer, scores["gold"].to_numpy()) for layer in layers]
    drawn = [by_label(layer, scores["permuted_gold"].to_numpy()) for layer in layers]
    expected = np.mean([information(t) for t in labels]) - np.mean([information(t) for t in drawn])
    assert summary["specialisation_label"]["value"] == pytest.approx(expected)
    assert sorted(scores["permuted_gold"]) == sorted(scores["gold"])
    # By layer, and for each expert the share of its commonest class.
    assert curves[f"information/token_class/{layers[2]}"]["value"] == pytest.approx(
        information(own[2]))
    assert curves[f"purity/label/{layers[1]}/3"]["value"] == pytest.approx(
        labels[1][3].max() / labels[1][3].sum())
    assert len(curves) == 2 * 4 * (2 + 4)


def test_the_interval_is_over_documents(scores):
    metric = SPEC.metrics()[1]
    found = estimate([scores], metric, resamples=200)
    assert found.documents == 4 and found.ci_low < found.value
    # Twice the same texts are the same tables, and no more documents.
    twice = pd.concat([scores, scores.assign(example_id=scores["example_id"] + "b")])
    again = estimate([twice], metric, resamples=200)
    assert again.value == pytest.approx(found.value) and again.documents == 4
    assert (again.ci_low, again.ci_high) == pytest.approx((found.ci_low, found.ci_high))


def test_a_dense_model_is_refused(engines, data):
    with pytest.raises(StageFailed, match="expert_specialisation: llama has no experts"):
        engines["llama"].respond(SPEC.requests(data))


def test_images_of_a_class_and_their_experts():
    spec = VisionSpec(size="tiny", hidden=16, neurons=16, depth=2, heads=2, patch=4, image_size=8,
                      channels=1, labels=3, experts=4, top_k=2, shared_start=False)
    model, processor = from_scratch(spec)
    model.vit.layers[1].mlp.gate.weight.data *= 5
    images = [Image.fromarray(np.full((8, 8), 40 * n, np.uint8)) for n in range(6)]
    encoded = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        encoded.append(file.getvalue())
    ids = [str(n) for n in range(6)]
    shown = {"shop": pd.DataFrame({"id": ids, "document": ids, "image": encoded,
                                   "label": ["0", "1", "2"] * 2})}
    evaluation = ImageSpecialisation(dataset="shop")
    rows = [json.loads(request.row) for request in evaluation.requests(shown)]
    found = list(evaluation.procedure(model, processor, rows))
    with torch.no_grad(), routed(model) as routes:
        model(pixel_values=processor.normalised(processor.decode(encoded)))
    chosen = routes[0].experts.view(6, 5, 2)
    counts = [torch.bincount(each.flatten(), minlength=4).tolist() for each in chosen]
    assert [result["used"]["vit.layers.1.mlp"] for result in found] == counts
    responses = {row["id"]: Response(row["id"], result=json.dumps(result))
                 for row, result in zip(rows, found, strict=True)}
    scores = evaluation.score(shown, responses)
    table = np.stack([np.sum(counts[n::3], axis=0) for n in range(3)], axis=1)
    summary = summarise(scores, evaluation.metrics(), resamples=100)
    assert summary["information_label"]["value"] == pytest.approx(information(table))
    assert summary["purity_label"]["value"] == pytest.approx(purity(table))
    dense, processor = from_scratch(spec.model_copy(update={"experts": 0}))
    with pytest.raises(StageFailed, match="image_specialisation: vit has no experts"):
        list(evaluation.procedure(dense, processor, rows))
