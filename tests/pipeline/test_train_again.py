"""Fine-tunes under Ray Train of which one rank alone runs out of memory."""

import json
import shutil
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import ray
import torch
from smoke import SMOKE, planned

from pipeline import memory, train
from pipeline.execute import execute
from pipeline.job import Job
from pipeline.store import Store
from stages.finetune.config import micro_batch_size

# Workers do not see this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

KEY = "finetune/tiny-moe-sft-seed0"


@pytest.fixture(scope="module")
def inputs(cluster, tmp_path_factory):
    """A store with what the fine-tune starts from."""
    store, plan = Store(str(tmp_path_factory.mktemp("inputs"))), planned()
    todo = plan.needs(plan.nodes[KEY].inputs.values())
    outcomes = execute(plan, todo, store, SMOKE.parent, lambda event: None)
    assert {outcome.status for outcome in outcomes.values()} == {"done"}
    return store


@pytest.fixture
def prepared(inputs, tmp_path):
    """A copy of that store."""
    shutil.copytree(inputs.root, tmp_path / "store")
    return Store(str(tmp_path / "store"))


def short_of_memory(fits: int, begun: Path, wait: float = 0):
    """A training worker in which the second rank, and it alone, runs out of memory from the fourth
    step on with more than ``fits`` sequences, while the first waits for it in a collective. It
    notes the steps that it begins in a file, and waits before it fails."""

    def worker(config: dict) -> dict:
        from pipeline.train import _worker
        from stages.finetune.training import Training

        step = Training.step

        def limited(self, number: int) -> dict:
            if torch.distributed.get_rank():
                with begun.open("a") as file:
                    file.write(f"{number}\n")
                if number >= 3 and micro_batch_size(self.spec) > fits:
                    time.sleep(wait)
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return step(self, number)

        Training.step = limited
        return _worker(config)

    return worker


@pytest.mark.parametrize("max_failures", [0, 1])
def test_out_of_memory_in_one_rank_goes_on_from_the_checkpoint_with_smaller_micro_batches(
    cluster, prepared, tmp_path, monkeypatch, max_failures
):
    """Whether Ray restarts the workers itself or leaves it to us."""
    plan = planned(f"resources.finetune.max_failures={max_failures}",
                   "recipes.sft.auxiliary_loss_weight=0")
    node, whole = plan.nodes[KEY], Store(str(tmp_path / "whole"))
    shutil.copytree(prepared.root, whole.root)
    assert train.fit(Job.of(node, plan, whole, SMOKE.parent)).status == "done"
    begun = tmp_path / "begun"  # Ray looks for a checkpoint that was reported every 2 s
    monkeypatch.setattr(train, "_worker", short_of_memory(2, begun, wait=6))
    outcome = train.fit(Job.of(node, plan, prepared, SMOKE.parent))
    assert outcome.status == "done", outcome.message
    got, expected = (store.fetch(node.folder) for store in (prepared, whole))
    curves = [pd.read_parquet(folder / "training_curve.parquet") for folder in (got, expected)]
    for column in ("step", "loss", "gradient_norm", "learning_rate", "tokens"):
        assert curves[0][column].tolist() == pytest.approx(curves[1][column].tolist(), rel=1e-5)
    # Of the three steps before, those of the checkpoint are not repeated.
    assert list(map(int, begun.read_text().split())) == [0, 1, 2, 3, 2, 3, 4, 5]
    evidence = json.loads((got / "recipe_evidence.json").read_text())
    assert evidence["knobs"]["batch_size"] == {
        "asked": 8, "measured": {"sequences_in_a_step": 8, "micro_batches_per_worker": 2}}
    assert evidence["micro_batch"] == {"asked": 4, "used": 2, "out_of_memory_at": [4]}
    progress = prepared.read_json(f"{node.folder}/progress.json")
    assert "micro-batch 2 after out of memory" in progress["text"]
    assert not (Path(prepared.root) / node.folder / memory.FOLDER).exists()


def test_one_sequence_that_does_not_fit_in_one_rank_ends_all_ranks(
    cluster, prepared, tmp_path, monkeypatch
):
    plan = planned("resources.finetune.max_failures=0")
    node = plan.nodes[KEY]
    monkeypatch.setattr(train, "_worker", short_of_memory(0, tmp_path / "begun"))
    started = time.monotonic()
    outcome = train.fit(Job.of(node, plan, prepared, SMOKE.parent))
    assert (outcome.status, outcome.message[:55]) == (
        "failed", "a GPU is out of memory with one sequence per forward pa")
    assert time.monotonic() - started < 300  # gloo would wait for half an hour
    assert not (Path(prepared.root) / node.folder / memory.FOLDER).exists()
