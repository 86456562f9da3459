"""Out of memory ends the workers; the next ones take half the micro-batch and the same batch."""

import pytest
import ray.train
import torch
from smoke import planned

from pipeline import memory, train
from pipeline.job import Job
from pipeline.store import Store
from stages.errors import StageFailed
from stages.finetune.config import deepspeed_config


@pytest.fixture
def job(tmp_path):
    plan = planned("resources.finetune.micro_batch=4")
    node = plan.nodes["finetune/tiny-moe-sft-seed0"]  # a global batch of 8 over 2 workers
    return Job.of(node, plan, Store(f"{tmp_path}/store"), tmp_path)


def attempt(job, fits):
    """One worker's attempt on a device that holds ``fits`` sequences; the spec that it used."""
    with memory.guarded(Store(job.store), job.node) as spec:
        if spec.micro_batch > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
    return spec


def test_each_attempt_halves_the_micro_batch_and_keeps_the_global_batch(job):
    for size in (4, 2):
        with pytest.raises(torch.OutOfMemoryError):
            attempt(job, fits=1)
        tried = memory.too_large(Store(job.store), job.node)
        assert tried[-1] == size
    spec = attempt(job, fits=1)
    assert (spec.micro_batch, spec.out_of_memory_at) == (1, (4, 2))
    config = deepspeed_config(spec, accelerator=False)
    assert config["train_batch_size"] == 8 and config["gradient_accumulation_steps"] == 4
    # What was asked for stays the identity; what was used is in the run's evidence.
    assert spec.identity() == job.node.spec.identity()


def test_one_sequence_that_does_not_fit_fails_with_a_remedy(job):
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):  # never kept to itself: other ranks wait
            attempt(job, fits=0)
    with pytest.raises(StageFailed, match="one sequence per forward pass; lower .* max_length"):
        attempt(job, fits=0)


def test_a_fine_tune_starts_again_and_says_so(job, monkeypatch):
    store, specs = Store(job.store), []

    class Group:
        """A worker group whose device holds two sequences."""

        def __init__(self, *_, **__):
            pass

        def fit(self):
            try:
                specs.append(attempt(job, fits=2))
            except torch.OutOfMemoryError as error:
                raise ray.train.TrainingFailedError("workers failed") from error
            self.return_value = {"failed": "enough seen"}
            return self

    monkeypatch.setattr(train, "TorchTrainer", Group)
    outcome = train.fit(job)
    assert outcome.message == "enough seen" and [s.micro_batch for s in specs] == [2]
    said = train.RayCallbacks(job, store, specs[0]).note
    assert said == " · micro-batch 2 after out of memory"
