"""The table of all examples: its rows, and the numbers of the summaries computed from it alone."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import f1_score

from stages.compare.examples import SCHEMA, write_examples
from stages.compare.spec import CompareSpec
from stages.evaluate.base import Response
from stages.evaluate.language_modelling import Perplexity
from stages.evaluate.out_of_distribution import AdversarialSets
from stages.evaluate.truthfulness import MultipleChoice
from stages.statistics import summarise

EVALUATIONS = {
    "inference": AdversarialSets(standard="snli", adversarial=("r1", "r2"), template="nli"),
    "text": Perplexity(in_domain=("wiki",), out_of_domain=("code",)),
    "quiz": MultipleChoice(dataset="quiz"),
}


def rows(name, count, **columns):
    ids = [str(number) for number in range(count)]
    return pd.DataFrame({"id": ids, "document": [f"d{n // 2}" for n in range(count)]} | columns)


def scored():
    """Score tables of each evaluation from answers drawn at random."""
    rng = np.random.default_rng(0)
    labels = np.array(["entailment", "neutral", "contradiction"])
    data = {
        **{name: rows(name, 9, premise="p", hypothesis="h", label=rng.choice(labels, 9))
           for name in ("snli", "r1", "r2")},
        **{name: rows(name, 5, text=[f"word {n}é" * (n + 1) for n in range(5)])
           for name in ("wiki", "code")},
        "quiz": rows("quiz", 7, question="q", context="", answer=rng.integers(3, size=7),
                     choices=[np.array(["a", "bc", "def"], object)] * 7),
    }  # fmt: skip
    tables = {}
    for name, evaluation in EVALUATIONS.items():
        responses = {}
        for request in evaluation.requests(data):
            count = len(request.choices) or 1
            values = tuple(rng.normal(-5, 2, count))
            responses[request.id] = Response(request.id, values, tuple(range(3, 3 + count)))
        tables[name] = evaluation.score(data, responses)
    return tables


@pytest.fixture
def table(tmp_path):
    tables, inputs = scored(), {"checkpoint/moe/none/0": tmp_path}
    for model, recipe, seed in (("moe", "sft", 3), ("dense", "none", 0)):
        for name, scores in tables.items():
            role = f"scores/{model}/{recipe}/{seed}/{name}"
            inputs[role] = tmp_path / role
            inputs[role].mkdir(parents=True)
            scores.to_parquet(inputs[role] / "scores.parquet")
    spec = CompareSpec(
        title="t", pairs=({"name": "p", "moe": "moe", "dense": "dense"},), recipes=("none", "sft"),
        seeds=(3,), evaluations=EVALUATIONS, resamples=100,
    )  # fmt: skip
    count = write_examples(spec, inputs, tmp_path / "examples.parquet")
    assert pq.read_schema(tmp_path / "examples.parquet").equals(SCHEMA)
    found = pd.read_parquet(tmp_path / "examples.parquet")
    assert len(found) == count
    return tables, found[found["model"] == "moe"], found


def test_a_row_per_example_and_measured_quantity(table):
    tables, mine, both = table
    assert set(zip(both["model"], both["recipe"], both["seed"], strict=True)) == {
        ("moe", "sft", 3), ("dense", "none", 0)}  # fmt: skip
    counts = mine.groupby(["evaluation", "metric"]).size()
    assert counts["quiz"].to_dict() == {"correct": 7, "correct_norm": 7}
    assert counts["text"].to_dict() == {"bytes": 10, "logprob": 10, "tokens": 10}
    first = mine[(mine["evaluation"] == "inference") & (mine["metric"] == "correct")].iloc[10]
    source = tables["inference"].iloc[10]
    assert first.to_dict() == {
        "evaluation": "inference", "dataset": "r1", "example_id": "r1/1", "model": "moe",
        "recipe": "sft", "seed": 3, "metric": "correct", "value": source["correct"],
        "prediction": source["prediction"], "label": source["gold"], "weight": 1.0,
        "cluster_id": "r1/d0",
    }  # fmt: skip


def test_summaries_are_computed_from_the_table_alone(table):
    tables, mine, _ = table
    summaries = {name: summarise(tables[name], evaluation.metrics(), resamples=10)
                 for name, evaluation in EVALUATIONS.items()}  # fmt: skip

    def of(evaluation, metric, *datasets):
        part = mine[(mine["evaluation"] == evaluation) & (mine["metric"] == metric)]
        return part[part["dataset"].isin(datasets)] if datasets else part

    for name in ("accuracy", "accuracy_norm"):
        part = of("quiz", "correct" + name.removeprefix("accuracy"))
        assert np.average(part["value"], weights=part["weight"]) == pytest.approx(
            summaries["quiz"][name]["value"])  # fmt: skip
    hard = of("inference", "correct", "r2")
    assert f1_score(hard["label"], hard["prediction"], average="macro") == pytest.approx(
        summaries["inference"]["macro_f1/r2"]["value"])  # fmt: skip
    texts = of("text", "logprob", "code")
    per_token = np.average(texts["value"], weights=texts["weight"])
    assert np.exp(-per_token) == pytest.approx(summaries["text"]["perplexity/code"]["value"])
    nats = (texts["value"] * texts["weight"]).sum()
    bits = -nats / np.log(2) / of("text", "bytes", "code")["value"].sum()
    assert bits == pytest.approx(summaries["text"]["bits_per_byte/code"]["value"])
    clusters = of("quiz", "correct")["cluster_id"].nunique()
    assert clusters == summaries["quiz"]["accuracy"]["documents"] == 4
