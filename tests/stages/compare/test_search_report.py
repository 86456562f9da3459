"""The report of a search: budgets that differ are said, nothing from outside is rendered."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from stages.compare.search_report import fairness, write
from stages.compare.search_spec import Goal, Knob, SearchContent, SearchedModel

GOAL, RATE = "sciq/accuracy", "refusal/over_refusal_rate"


def searched(model: str, side: str, trials: int, **fields) -> SearchedModel:
    generator = np.random.default_rng(len(model))
    table = pd.DataFrame({
        "number": range(trials),
        "status": ["failed", "stopped", *["finished"] * (trials - 2)],
        "reason": ["<b>loss</b> is nan", *[""] * (trials - 1)],
        "steps": 90, "tokens": 1000, "seconds": 60.0, "signal": 0.5,
        "value:learning_rate": 10 ** generator.uniform(-5, -3, trials),
        "value:schedule": generator.choice(["linear", "cosine"], trials),
        "value:lora.rank": generator.choice([4.0, 8.0, np.nan], trials),
        "value:nested": generator.choice([True, False], trials),
        f"objective:{GOAL}": generator.uniform(size=trials),
        f"objective:{RATE}": generator.uniform(size=trials)})
    table.loc[:1, [f"objective:{GOAL}", f"objective:{RATE}"]] = np.nan
    if side == "dense":
        table = table.drop(columns="value:nested")
    return SearchedModel(model, side, table, fields.get("seeds", 1),
                         ("nested",) if side == "dense" else (), (3, 4))


def content(*models: SearchedModel) -> SearchContent:
    knobs = (Knob("learning_rate", True, 2e-5), Knob("schedule", False, "constant"),
             Knob("lora.rank", False, None), Knob("nested", False, False))
    goals = (Goal(GOAL, GOAL, True), Goal(RATE, "rate", False))
    return SearchContent("A study", "tpe", "sft", goals, knobs, models,
                         (("moe-model", "dense-model"),), (7, 8, 9), "../x/report.html")


@pytest.fixture
def report(tmp_path):
    def make(*models: SearchedModel) -> str:
        write(content(*models), tmp_path)
        return (tmp_path / "search.html").read_text()

    make.folder = tmp_path
    return make


def test_report_stands_alone_and_shows_every_trial(report):
    text = report(searched("moe-model", "moe", 20), searched("dense-model", "dense", 20))
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text) and "<script" not in text
    # The winners beside the recipe they started from; a knob that is idle in one is a dash there.
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row)
            for row in text.split("Trained again")[1].split("</table>")[0].split("<tr>")]
    assert [row[:2] for row in rows if row[:1] == ["learning_rate"]] == [["learning_rate", "2e-05"]]
    assert [(row[1], row[4:]) for row in rows if row[:1] == ["nested"]] == [
        ("False", ["—", "—"])]
    assert "&lt;b&gt;loss&lt;/b&gt; is nan" in text and "<b>loss" not in text
    assert "moe-model: 1 of 20 trials failed" in text
    assert "Left out of the search of dense-model, where they change nothing: nested." in text
    assert f"rate ↓ ({RATE})" in text and f"<th>{RATE}" not in text
    assert text.count("data:image/svg+xml") == 5
    trials = pd.read_parquet(report.folder / "trials.parquet")
    assert trials["model"].value_counts().to_dict() == {"moe-model": 20, "dense-model": 20}
    figures = {p.name: p.read_bytes() for p in (report.folder / "figures").iterdir()}
    assert len(figures) == 5
    assert "the knobs of its last segment" not in text


def test_a_population_s_report_says_which_of_its_knobs_are_shown(tmp_path):
    tried = content(searched("moe-model", "moe", 6), searched("dense-model", "dense", 6))
    write(replace(tried, algorithm="pbt"), tmp_path)
    assert "the knobs of its last segment" in (tmp_path / "search.html").read_text()


def test_equal_budgets_need_no_word_and_others_get_one():
    moe = searched("moe-model", "moe", 20)
    assert fairness(content(moe, searched("dense-model", "dense", 20))) == []
    fewer = fairness(content(moe, searched("dense-model", "dense", 15, seeds=2)))
    assert [line.split(":")[0] for line in fewer] == [
        "moe-model had 20 trials, dense-model 15", "moe-model had 1 seeds per trial, dense-model 2",
        "The trials of moe-model trained on 20,000 tokens, those of dense-model on 15,000"]


def test_few_trials_show_no_importance(report):
    text = report(searched("moe-model", "moe", 6), searched("dense-model", "dense", 6))
    assert "an importance from fewer would be noise" in text
    assert not (report.folder / "figures/search_importance.svg").exists()


def test_a_knob_that_no_trial_drew_has_no_panel(tmp_path):
    tried = content(searched("moe-model", "moe", 6), searched("dense-model", "dense", 6))
    knobs = (*tried.knobs, Knob("warmup_steps", False, 0))
    write(replace(tried, knobs=knobs), tmp_path)
    drawn = (tmp_path / "figures/search_scatter.svg").read_text()
    assert "<!-- nested -->" in drawn and "<!-- warmup_steps -->" not in drawn


def test_a_search_without_a_finished_trial_is_still_told(report):
    failed = searched("moe-model", "moe", 2)
    assert "1 failed, 1 stopped" in report(failed, searched("dense-model", "dense", 2))
