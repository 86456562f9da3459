"""The verb `search` from its first trial to the comparison of the winners, and once more."""

import json

import pandas as pd
import pytest
from search_sweeps import SEARCH
from smoke import SMOKE, command

FIELDS = SEARCH | {"trials": 2}
SET = ["recipes.sft.steps=2", "resources.finetune.workers=1",
       "resources.finetune.expert_parallel=1", f"search={json.dumps(FIELDS)}"]


@pytest.mark.families  # takes minutes; in `make test-families`
def test_winners_are_trained_again_with_fresh_seeds_and_compared_on_the_test_split(
    cluster, tmp_path
):
    store = tmp_path / "store"
    arguments = ["search", str(SMOKE), "--store", str(store), "--address", cluster.address,
                 *(f"--set={field}" for field in SET)]
    done = command(*arguments, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = store.glob("reports/*-trials/search.html")
    assert "Trained again" in report.read_text()
    (file,) = store.glob("reports/*-search/comparison.parquet")
    rows = pd.read_parquet(file).query("recipe == 'searched' and p_holm.notna()")
    assert set(rows["seeds"]) == {"101,102,103"} and set(rows["evaluation"]) == {
        "refusal", "questions", "edits", "domains"}
    # The winner of each side is the trial with the better score on the selection split.
    for model in ("tiny", "tiny-moe"):
        (file,) = store.glob(f"search/smoke-{model}@*/attempt*/trials.parquet")
        trials = pd.read_parquet(file)
        assert trials["status"].tolist() == ["finished"] * 2
        best = trials.loc[trials["objective:edits/clean_accuracy"].idxmax()]
        for seed in (101, 102, 103):
            (file,) = store.glob(f"finetune/{model}-searched-seed{seed}@*/manifest.json")
            trained = json.loads(file.read_text())["identity"]
            assert trained["learning_rate"] == pytest.approx(best["value:learning_rate"])
            assert trained["seed"] == seed
    before = {p: p.stat().st_mtime_ns for p in store.rglob("manifest.json")}
    again = command(*arguments)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in store.rglob("manifest.json")} == before
