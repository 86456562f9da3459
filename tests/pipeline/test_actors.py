"""One, two and three actors on Ray: the same responses, bit for bit, and the same tables."""

import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from smoke import SMOKE, planned

from pipeline import evaluate
from pipeline.evaluate import run_pass
from pipeline.job import Job, run_stage
from pipeline.store import Store

NAMES = ("refusal", "questions", "domains", "drawn")
DRAWN = ("evaluations.drawn={kind: refusal, harmful: [harmful], benign: [benign], "
         "max_new_tokens: 6, technique: {kind: self_consistency, samples: 2}}")


def test_the_number_of_actors_changes_no_bit(cluster, tmp_path, monkeypatch):
    keys = [f"evaluate/tiny-moe-none-{name}" for name in NAMES]
    made, found = tmp_path / "made", {}
    for workers in (1, 2, 3):
        plan = planned("recipes={}", DRAWN, "resources.evaluate="
                       f"{{workers: {workers}, cpus: 0.5, shard_size: 4}}")
        if not made.exists():
            for key in [key for key in plan.nodes if key in plan.needs(keys) - set(keys)]:
                outcome = run_stage(Job.of(plan.nodes[key], plan, Store(str(made)), SMOKE.parent))
                assert outcome.status == "done", outcome.message
        store = Store(str(shutil.copytree(made, tmp_path / str(workers))))
        jobs = [Job.of(plan.nodes[key], plan, store, SMOKE.parent) for key in keys]
        if workers == 3:  # several shards for each actor at once
            monkeypatch.setattr(evaluate, "BLOCKS", 1)
        assert {outcome.status for outcome in run_pass(jobs).values()} == {"done"}
        tables, answers = {}, {}
        for key in keys:
            folder = plan.nodes[key].folder
            tables[key] = pd.read_parquet(store.fetch(folder) / "scores.parquet")
            written = list(Path(store.path(folder)).glob("responses/*"))
            for path in written:
                answers[f"{key}/{path.name}"] = path.read_bytes()
            # The requests of a shard are a row group, which its actor reads.
            asked = pq.ParquetFile(Path(store.path(folder)) / "requests.parquet")
            assert asked.num_row_groups == len(written)
        found[workers] = (tables, answers)
    first, answers = found[1]
    assert len(answers) > 3 * len(keys)  # so that every actor has shards
    for workers in (2, 3):
        tables, others = found[workers]
        assert others == answers
        for key in keys:
            pd.testing.assert_frame_equal(tables[key], first[key], check_exact=True)
