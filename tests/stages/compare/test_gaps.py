"""Numbers that there are not: of data sets that cannot be had, and of models with other tokens."""

import numpy as np
import pandas as pd
import pytest
from test_compare import row, sciq, spec_of

from stages.compare.stage import run
from stages.compare.table import render_text


@pytest.fixture
def output(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def domains(right, left_out=()):
    """Scores on three domains; ``right`` of each domain's 20 texts are classified well."""
    names = [n for n in ("reviews", "hotels", "tweets") if n not in left_out]
    parts = []
    for name in names:
        correct = (np.arange(20) < right).astype(float)
        inside = name == "reviews"
        parts.append(sciq(0).head(20).assign(
            example_id=[f"{name}/{i}" for i in range(20)],
            document=[f"{name}/{i}" for i in range(20)],
            subset="in_distribution" if inside else "out_of_distribution",
            gold="positive",
            prediction=np.where(correct == 1, "positive", "negative"),
            domain=name,
            correct=correct,
        ))
    return pd.concat(parts, ignore_index=True)


def test_a_missing_data_set_leaves_gaps_and_no_mean_over_fewer(tmp_path, output):
    evaluation = {"kind": "out_of_distribution", "in_distribution": "reviews",
                  "out_of_distribution": ["hotels", "tweets"], "template": "sentiment"}
    spec = spec_of(recipes=("none",), evaluations={"domains": evaluation})
    inputs = {}
    # The dense model was scored when the tweets were still there.
    for model, right, left_out in (("moe", 15, ("tweets",)), ("dense", 10, ())):
        role = f"scores/{model}/none/0/domains"
        inputs[role] = tmp_path / role
        inputs[role].mkdir(parents=True)
        domains(right, left_out).to_parquet(inputs[role] / "scores.parquet")
    gaps = {"data/tweets": "data/tweets failed: access: request form"}
    run(spec, inputs, output, gaps=gaps)
    table = pd.read_parquet(output / "comparison.parquet")
    hotels = row(table, metric="accuracy/hotels")
    assert (hotels["moe"], hotels["dense"], hotels["n"]) == (0.75, 0.5, 20)
    assert hotels["gap"] == ""
    for metric in ("ood_accuracy", "id_minus_ood", "accuracy/tweets"):
        gap = row(table, metric=metric)
        assert np.isnan(gap["moe"]) and np.isnan(gap["difference"]) and np.isnan(gap["p_holm"])
        assert gap["gap"] == (
            "data set tweets is missing: data/tweets failed: access: request form")
    for text in (render_text(table), (output / "report.html").read_text()):
        assert "data set tweets is missing" in text

    # A gap of a data set that every table has rows of is none.
    domains(15).to_parquet(inputs["scores/moe/none/0/domains"] / "scores.parquet")
    (tmp_path / "again").mkdir()
    run(spec, inputs, tmp_path / "again", gaps=gaps)
    table = pd.read_parquet(tmp_path / "again" / "comparison.parquet")
    assert row(table, metric="ood_accuracy")["moe"] == 0.75


def refusals(refused, **harm):
    """Scores on 20 harmful and 20 benign requests, and what judges find in all answers to them."""
    frames = []
    for name, benign in (("advbench", False), ("lookalikes", True)):
        said = (np.arange(20) < refused).astype(float)
        ids = [f"{name}/{number}" for number in range(20)]
        columns = dict.fromkeys(("prompt", "gold", "prediction", "answer"), "")
        columns |= {"document": ids, "subset": "benign" if benign else "harmful", "dataset": name}
        columns |= {"refused": np.nan if benign else said, "over_refused": said * 0 if benign
                    else np.nan, "incoherent": 0.0}
        scores = {f"harm_{judge}": value for judge, value in harm.items()}
        frames.append(pd.DataFrame({"example_id": ids, **columns, **scores}))
    return pd.concat(frames, ignore_index=True)


def test_a_missing_judge_leaves_gaps_in_its_own_rows_alone(tmp_path, output):
    judges = [{"kind": "guard", "name": name, "source": f"hub:maker/{name}@main"}
              for name in ("here", "gone")]
    evaluation = {"kind": "refusal", "harmful": ["advbench"], "benign": ["lookalikes"],
                  "judges": judges}
    spec = spec_of(recipes=("none",), evaluations={"safety": evaluation})
    inputs = {}
    # The dense model was judged when the judge was still there.
    for model, found in (("moe", refusals(15, here=0.25)),
                         ("dense", refusals(10, here=0.5, gone=1.0))):
        role = f"scores/{model}/none/0/safety"
        inputs[role] = tmp_path / role
        inputs[role].mkdir(parents=True)
        found.to_parquet(inputs[role] / "scores.parquet")
    gaps = {"judge/gone": "judge/gone failed: holds no *.safetensors"}
    run(spec, inputs, output, gaps=gaps)
    table = pd.read_parquet(output / "comparison.parquet")
    rate = row(table, metric="harmful_refusal_rate")
    assert (rate["moe"], rate["dense"], rate["n"], rate["gap"]) == (0.75, 0.5, 20, "")
    for kind in ("harmful", "benign"):
        judged = row(table, metric=f"harmfulness/here/{kind}")
        assert (judged["moe"], judged["dense"], judged["gap"]) == (0.25, 0.5, "")
        gap = row(table, metric=f"harmfulness/gone/{kind}")
        assert np.isnan(gap["moe"]) and np.isnan(gap["dense"]) and np.isnan(gap["difference"])
        assert gap["gap"] == "judge gone is missing: judge/gone failed: holds no *.safetensors"
    assert "judge gone is missing" in (output / "report.html").read_text()


def texts(tokens):
    """Two texts of 8 bytes and 8 bits each, cut into so many tokens."""
    ids = [f"wiki/{number}" for number in range(2)]
    columns = dict.fromkeys(("prompt", "gold", "prediction", "answer"), "")
    columns |= {"document": ids, "subset": "in domain", "domain": "wiki", "bytes": 8.0}
    nats = -8 * np.log(2)
    return pd.DataFrame({"example_id": ids, **columns, "logprob": nats, "tokens": float(tokens)})


@pytest.mark.parametrize("tokens", [4, 2])
def test_models_with_other_tokens_are_compared_in_bits_per_byte(tokens, tmp_path, output):
    evaluations = {"text": {"kind": "perplexity", "in_domain": ["wiki"]}}
    inputs = {}
    for model, count in (("moe", 4), ("dense", tokens)):
        role = f"scores/{model}/none/0/text"
        inputs[role] = tmp_path / role
        inputs[role].mkdir(parents=True)
        texts(count).to_parquet(inputs[role] / "scores.parquet")
    run(spec_of(recipes=("none",), evaluations=evaluations), inputs, output)
    table = pd.read_parquet(output / "comparison.parquet")
    bits = row(table, metric="in_domain_bits_per_byte")
    assert (bits["moe"], bits["dense"], bits["gap"]) == (1, 1, "")
    per_token = row(table, metric="in_domain_perplexity")
    if tokens == 4:
        assert (per_token["moe"], per_token["dense"]) == pytest.approx((4, 4))
    else:
        assert np.isnan(per_token["moe"]) and np.isnan(per_token["difference"])
        assert per_token["gap"] == "the models' tokens differ, and it is a mean over them"


def test_a_metric_that_no_example_has_a_value_of_says_so(tmp_path, output):
    spec = spec_of(recipes=("none",), evaluations={"sciq": {"kind": "multiple_choice",
                                                            "dataset": "sciq"}})
    inputs = {}
    for model in ("moe", "dense"):
        role = f"scores/{model}/none/0/sciq"
        inputs[role] = tmp_path / role
        inputs[role].mkdir(parents=True)
        sciq(5).assign(correct=np.nan).to_parquet(inputs[role] / "scores.parquet")
    run(spec, inputs, output)
    table = pd.read_parquet(output / "comparison.parquet")
    none = row(table, metric="accuracy")
    assert (none["n"], none["gap"]) == (0, "no example has a value of it")
    assert np.isnan(none["moe"]) and np.isnan(none["p_holm"])
    assert row(table, metric="accuracy_norm")["gap"] == ""
