"""An attack that holds the model, on Ray: two workers, one, and a run that was cut off."""

import pandas as pd
from smoke import SMOKE, planned

from pipeline.execute import execute
from pipeline.store import Store
from pipeline.survey import survey

KEY = "evaluate/tiny-moe-none-attacked"
ATTACKED = (
    "evaluations.attacked={kind: text_attacks, dataset: reviews, template: sentiment, checked: 1, "
    "attacks: [{kind: embedding_pgd, steps: 2}, {kind: gcg, steps: 1, candidates: 4}, "
    "{kind: homoglyphs, edits: 1}]}"
)


def run(store: Store, workers: int) -> pd.DataFrame:
    plan = planned(
        "recipes={}", ATTACKED, f"resources.evaluate={{workers: {workers}, shard_size: 32}}")
    todo = {k for k in plan.needs({KEY}) if survey(plan, store)[k].status != "done"}
    outcomes = execute(plan, todo, store, SMOKE.parent, lambda event: None)
    assert outcomes[KEY].status == "done", outcomes[KEY].message
    folder = store.fetch(plan.nodes[KEY].folder)
    assert (folder / "hygiene.parquet").exists() and (folder / "curves.parquet").exists()
    return pd.read_parquet(folder / "scores.parquet")


def test_workers_and_a_cut_off_run_change_no_bit(cluster, tmp_path):
    store = Store(str(tmp_path / "store"))
    first = run(store, 2)
    assert first["routing_change/gcg"].notna().all()
    (folder,) = (tmp_path / "store" / "evaluate").glob("tiny-moe-none-attacked@*")
    # As a kill leaves it: no manifest, some shards unwritten.
    (folder / "manifest.json").unlink()
    written = sorted((folder / "responses").iterdir())
    assert len(written) == -(-len(first) // 2) > 2
    kept = {path: path.stat().st_mtime_ns for path in written[::2]}
    for path in written[1::2]:
        path.unlink()
    pd.testing.assert_frame_equal(run(store, 1), first, check_exact=True)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert sorted((folder / "responses").iterdir()) == written
