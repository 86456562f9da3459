"""The headline table, the figures and the report's section on attacks."""

import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from stages.compare import expert_figures
from stages.compare.headline import headline
from stages.compare.measured import Measured
from stages.compare.robustness import examine
from stages.compare.stage import run
from stages.compare.table import render_verdicts
from stages.statistics import estimate, paired
from tests.stages.compare.attacked import (
    EVALUATIONS,
    TEXTS,
    attacks,
    card,
    interventions,
    spec_of,
    study,
    text_attacks,
)

ALIKE = {
    "pairs": (("vmoe-4", "vit"),), "seeds": (0,), "recipes": ("none", "sft"),
    "evaluations": TEXTS, "upcycled": ("vmoe-4",),
}  # fmt: skip


def texts(model, seed):
    return text_attacks(moe=model != "vit")


def cell(table, quantity, model, recipe="scratch"):
    found = table[(table["quantity"] == quantity) & (table["model"] == model)
                  & (table["recipe"] == recipe)]  # fmt: skip
    assert len(found) == 1, (quantity, model)
    return found.iloc[0]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The report of the standard study, one MoE seed short."""
    folder = tmp_path_factory.mktemp("images")
    spec = spec_of()
    inputs = study(folder / "in", spec)
    gone = "scores/vmoe-8/scratch/2/attacks"
    del inputs[gone]
    (folder / "out").mkdir()
    run(spec, inputs, folder / "out", {gone: "out of <memory>"})
    return folder / "out"


def test_levels_by_hand(images):
    table = pd.read_parquet(images / "headline.parquet")
    clean, robust = cell(table, "clean", "vit"), cell(table, "robust", "vmoe-4")
    assert (clean["n"], clean["seeds"]) == (40, "0,1,2")
    assert clean["value"] == pytest.approx(0.95)
    assert robust["value"] == pytest.approx(0.45)
    assert cell(table, "robust/16", "vmoe-4")["value"] == pytest.approx(0.3)
    # 38 of 40 images are right in every model; all that withstand the attacks are among them.
    common = cell(table, "robust_common", "vmoe-4")
    assert (common["n"], common["value"]) == (38, pytest.approx(0.45 * 40 / 38))
    # pgd alone counts in what changed: joint aims at the routes, noise is the control.
    changed = cell(table, "prediction_change", "vmoe-4")["value"]
    assert changed == pytest.approx(1 - 0.45)
    assert cell(table, "routing_change/attack", "vmoe-4")["value"] == pytest.approx(0.6)
    assert cell(table, "routing_change/random", "vmoe-4")["value"] == pytest.approx(0.2)
    assert cell(table, "routing_change/chance", "vmoe-4")["value"] == pytest.approx(0.82)
    assert cell(table, "swap/attacked_clean", "vmoe-4")["value"] == 0.5
    assert cell(table, "swap/clean_attacked", "vmoe-4")["value"] == 1
    # Of the shares of tokens the largest one.
    assert cell(table, "substitution/random", "vmoe-4")["value"] == pytest.approx(0.3)
    assert cell(table, "lipschitz_frozen", "vmoe-4")["value"] == pytest.approx(0.9 * 1.995)
    assert cell(table, "disagreement", "vmoe-8")["value"] == pytest.approx(0.4)
    assert list(dict.fromkeys(table["model"])) == ["vit", "vmoe-4", "vmoe-8"]


def test_intervals_are_over_examples_and_seeds(images):
    found = cell(pd.read_parquet(images / "headline.parquet"), "robust", "vit")
    metric = next(m for m in spec_of().evaluations["attacks"].metrics() if m.column == "robust")
    expected = estimate([attacks(0.4, False)] * 3, metric, resamples=200)
    assert (found["ci_low"], found["ci_high"]) == (expected.ci_low, expected.ci_high)


def test_dense_models_have_dashes_and_missing_seeds_their_reason(images):
    table = pd.read_parquet(images / "headline.parquet")
    for quantity in ("routing_change/attack", "swap/clean_attacked", "own", "disagreement"):
        dense = cell(table, quantity, "vit")
        assert np.isnan(dense["value"]) and (dense["n"], dense["gap"]) == (0, "")
    short = cell(table, "robust", "vmoe-8")
    assert short["seeds"] == "0,1"
    assert short["gap"] == "attacks: vmoe-8 scratch seed 2: out of <memory>"


def test_the_report_shows_table_verdicts_and_figures(images):
    html, text = ((images / name).read_text() for name in ("report.html", "report.md"))
    assert "measured by attacks" in html
    assert html.index("Under attack") < html.index('id="results"')
    row = re.search(r'<td class="l">worst case of attacks, mean of budgets</td>(.*?)</tr>', html)
    assert re.sub(r"<.*?>", " ", row[1]).split()[0] == "0.300"
    dash = re.search(r'<td class="l">random experts</td><td>(.*?)</td>', html)
    assert dash[1] == "—"
    assert "| Accuracy: worst case of attacks, mean of budgets | 0.300 [" in text
    verdicts = pd.read_parquet(images / "hypotheses.parquet").drop_duplicates("hypothesis")
    for _, verdict in verdicts.iterrows():
        tag = re.escape(f"{verdict['verdict']} · p (Holm)")
        assert re.search(rf"{tag}.*?<b>{verdict['hypothesis']}</b>", html)
        assert f"| {verdict['hypothesis']}: " in text
    assert "3 training seeds leave much undecided" in html and "Verdicts at this scale" in html
    assert "<b>A1</b> attacks: vmoe-8 scratch seed 2: out of &lt;memory&gt;" in html
    assert html.count("<sup>A1</sup>") >= 3  # at the model, and at the verdicts that read it
    assert html.count("<figcaption>") == 4
    for word in ("reproduc", "replicat"):
        assert word not in html.lower() and word not in text.lower()


def panels(file):
    groups = ElementTree.parse(file).getroot().iter("{http://www.w3.org/2000/svg}g")
    return sum(re.fullmatch(r"axes_\d+", group.get("id") or "") is not None for group in groups)


def test_figures_have_a_panel_for_each_attack_and_model(images):
    found = {file.name: panels(file) for file in (images / "figures").iterdir()}
    assert found == {
        "adversarial.svg": 4,  # shares, and the Lipschitz constant with a scale of its own
        "budget_scratch.svg": 4,  # the worst case and three attacks
        "routing_scratch.svg": 2,  # two MoE models
        "substitution_scratch.svg": 4,  # curves over shares, and the other number of experts
        "loss_scratch.svg": 4,  # routing term and margin
    }


def test_panels_of_one_scale_show_the_bands_of_every_model(tmp_path, monkeypatch):
    spec = spec_of(pairs=[(f"vmoe-{experts}", "vit") for experts in (4, 8, 16)])
    low = {"interventions": interventions(drawn=0.9, dropped=0.9),
           "vmoe-16/interventions": interventions(drawn=0.3, dropped=0.9)}  # fmt: skip
    drawn = []
    monkeypatch.setattr(expert_figures, "save", lambda figure, _: drawn.append(figure))
    measured = Measured(spec, study(tmp_path, spec, **low), {})
    assert expert_figures.substitution_figure(measured, "scratch", tmp_path / "figure.svg")
    curves = drawn[0].axes[::2]
    assert len(curves) == 3 and len({panel.get_ylim() for panel in curves}) == 1
    ends = [path.vertices[:, 1].min() for panel in curves for band in panel.collections
            for path in band.get_paths()]  # fmt: skip
    assert min(ends) < 0.3 and curves[0].get_ylim()[0] < min(ends)


def test_examples_that_another_model_gets_wrong_are_not_common(tmp_path):
    spec = spec_of(pairs=(("vmoe-4", "vit"),), seeds=(0, 1))
    worse = attacks(0.4, moe=False)
    worse["correct"] = 1.0 * (np.arange(40) >= 12)
    inputs = study(tmp_path, spec, **{"vit/scratch/1/attacks": worse})
    table = headline(Measured(spec, inputs, {}))
    # Seed 0: images 0 to 37, of which the MoE holds 0.6 × 40 at one budget and half at the other;
    # seed 1: images 12 to 37, of which it holds 12 at one budget and none at the other.
    expected = ((24 + 12) / 2 / 38 + 12 / 2 / 26) / 2
    assert cell(table, "robust_common", "vmoe-4")["value"] == pytest.approx(expected)


def test_a_seed_without_common_examples_is_left_out(tmp_path):
    spec = spec_of(pairs=(("vmoe-4", "vit"),), seeds=(0, 1))
    wrong = attacks(0.4, moe=False)
    wrong["correct"] = 0.0
    inputs = study(tmp_path, spec, **{"vit/scratch/1/attacks": wrong})
    table = headline(Measured(spec, inputs, {}))
    found = cell(table, "robust_common", "vmoe-4")
    assert (found["value"], found["n"]) == (pytest.approx((24 + 12) / 2 / 38), 38)


def test_numbers_of_experts_that_started_alike_say_that_the_twin_is_missing(tmp_path):
    spec = spec_of(**ALIKE | {"recipes": ("sft",)})
    table = headline(Measured(spec, study(tmp_path, spec, attacks=texts), {}))
    told = "the experts of vmoe-4 started alike, and no untuned twin is here"
    assert told in cell(table, "substitution/random", "vmoe-4", "sft")["caution"]
    assert told not in cell(table, "robust", "vmoe-4", "sft")["caution"]


def test_text_attacks_have_the_same_table_as_change_from_the_untuned_twin(tmp_path):
    spec = spec_of(**ALIKE)
    before = {"vmoe-4/none/0/interventions": interventions(second=0.5)}
    inputs = study(tmp_path, spec, attacks=texts, **before)
    table = headline(Measured(spec, inputs, {}))
    assert cell(table, "robust", "vit", "sft")["value"] == 0.5
    untuned = cell(table, "substitution/next_ranked", "vmoe-4", "none")
    assert (untuned["value"], untuned["change_from_untuned"]) == (0.5, False)
    tuned = cell(table, "substitution/next_ranked", "vmoe-4", "sft")
    assert tuned["value"] == pytest.approx(0.4) and tuned["change_from_untuned"]
    metric = spec.evaluations["interventions"].metrics()[2]
    assert metric.column == "correct/next_ranked_0.5"
    both = paired([interventions()], [interventions(second=0.5)],
                  next(m for m in spec.evaluations["interventions"].metrics()
                       if m.column == "correct/next_ranked_1"), resamples=200)  # fmt: skip
    assert (tuned["ci_low"], tuned["ci_high"]) == (both.ci_low, both.ci_high)
    # What chance gives is the same before and after, and stays a level.
    assert cell(table, "routing_change/chance", "vmoe-4", "sft")["value"] == pytest.approx(0.6)
    # How large the same radius is beside the distance of a model's tokens, a level as well.
    for name in ("embedding_pgd", "joint"):
        sizes = [cell(table, f"size/{name}", model, "sft") for model in ("vmoe-4", "vit")]
        assert [size["value"] for size in sizes] == [1.5, 3.0]
    assert sizes[0]["group"] == "Size of attacks, in half distances to the nearest token"
    assert "size/deep_word_bug" not in set(table["quantity"])
    # Accuracies of the whole model are levels too.
    assert not cell(table, "robust", "vmoe-4", "sft")["change_from_untuned"]


def test_text_figures_and_failed_checks(tmp_path):
    spec = spec_of(**ALIKE)
    inputs = study(tmp_path / "in", spec, attacks=texts)
    (tmp_path / "figures").mkdir()
    cards = {name: card(name) for name in spec.models}
    found = examine(spec, inputs, {}, cards, tmp_path)
    drawn = {figure.file.name: panels(figure.file) for figure in found.figures}
    # Three attacks, of each the checked examples; those of the untuned models are not drawn.
    assert drawn == {"attacks_sft.svg": 1, "checked_sft.svg": 3, "routing_sft.svg": 1,
                     "substitution_sft.svg": 2, "loss_sft.svg": 2}  # fmt: skip
    assert (tmp_path / "headline.parquet").exists()
    told = cell(found.headline, "robust", "vmoe-4", "sft")["caution"]
    assert told == (
        "attacks: vmoe-4 sft fails checks of the attack: not weaker than joint "
        "(embedding_pgd: 0.10 of 40)")


def test_a_sweep_without_attacks_has_no_such_section(tmp_path):
    spec = spec_of(evaluations={"slopes": EVALUATIONS["slopes"]}, hypotheses=None)
    inputs = study(tmp_path / "in", spec)
    (tmp_path / "out").mkdir()
    run(spec, inputs, tmp_path / "out")
    assert "Under attack" not in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "headline.parquet").exists()


def test_verdicts_in_a_terminal(images):
    text = render_verdicts(pd.read_parquet(images / "hypotheses.parquet"))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    assert re.match(r"  H1 undecided \(p 1\.000\)\. MoE beats dense at equal FLOPs", lines[1])
    assert sum(line.startswith("  H") for line in lines) == 5
    assert "see its caution" in text
