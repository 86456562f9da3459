"""A fine-tune node as a Ray Train run.

The run's name and storage path follow from the node's folder, so a run that was interrupted
resumes from its last checkpoint exactly when spec and inputs are the same, and never otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from pipeline import memory
from pipeline.job import Job, Outcome, committed, report_progress
from pipeline.machines import machines, placed
from pipeline.store import Store
from stages.errors import BadInput, StageFailed
from stages.finetune.spec import FinetuneSpec

CHECKPOINTS = "train"
"""Folder of the Ray Train run inside the node's folder."""


class RayCallbacks:
    """What the training loop tells the outside, passed on to Ray Train and the store."""

    def __init__(self, job: Job, store: Store, spec: FinetuneSpec):
        self.job, self.store = job, store
        self.note = ""
        if spec.out_of_memory_at:
            self.note = f" · micro-batch {spec.micro_batch} after out of memory"

    @contextmanager
    def resume_from(self) -> Iterator[Path | None]:
        """A local folder with the last checkpoint, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def report(self, metrics: dict, checkpoint: Path | None = None) -> None:
        """Called by every worker; the checkpoint files of all workers are merged."""
        if ray.train.get_context().get_world_rank() == 0:
            report_progress(self.store, self.job.node, metrics["step"], metrics["total_steps"],
                            f"loss {metrics['loss']:.3f}{self.note}",
                            tokens=metrics["total_tokens"])
        if checkpoint is not None:
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(str(checkpoint)))


def _worker(config: dict) -> dict:
    """Body of one training worker; returns the attempt, or why the stage failed."""
    # Not above: what starts and watches the workers imports this module, and DeepSpeed with all
    # that the loop needs takes several seconds.
    from stages.finetune.loop import PastTheEnd, train

    job: Job = config["job"]
    store = Store(job.store)
    inputs = {role: store.fetch(folder) for role, folder in job.inputs.items()}
    first = ray.train.get_context().get_world_rank() == 0
    # Only the first worker writes the result.
    place = store.attempt(job.node.folder) if first else nullcontext(("", Path()))
    try:
        with place as (attempt, output), memory.guarded(store, job.node) as spec:
            train(spec, inputs, output, RayCallbacks(job, store, spec))
    except (StageFailed, BadInput) as error:
        # Returned, not raised: a restart from the last checkpoint would fail the same way.
        return {"failed": str(error)}
    except PastTheEnd:
        return {"past": True}
    return {"attempt": attempt}


def fit(job: Job) -> Outcome:
    """Train a node's model on its workers and commit the result.

    The first steps of a longer fine-tune are trained in that one's folder: it goes on from there.
    """
    store = Store(job.store)
    resources = job.node.resources
    home = job.node.work_folder

    def trainer() -> TorchTrainer:
        return TorchTrainer(
            _worker,
            train_loop_config={"job": job},
            torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=resources.gpus > 0,
                resources_per_worker={
                    "CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})
                },
            ),
            run_config=RunConfig(
                name=CHECKPOINTS,
                storage_path=store.path(home),
                failure_config=FailureConfig(
                    max_failures=resources.max_failures,
                    # Each is a minute of waiting for workers, after which ``work`` looks again
                    # whether there can be any; Ray's own default is for ever.
                    controller_failure_limit=10,
                ),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )

    def work() -> str:
        tried = memory.too_large(store, job.node)
        try:
            returned = trainer().fit().return_value
        except ray.train.TrainingFailedError as error:
            if memory.too_large(store, job.node) != tried:
                return work()  # smaller, from the last checkpoint
            if isinstance(
                getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError
            ):
                _expect_room(job)
                return work()
            raise StageFailed(
                f"training ended after {resources.max_failures} allowed "
                f"restart(s): {_cause(error)}; run again to resume from the last checkpoint"
            ) from error
        if "failed" in returned:
            store.delete(f"{job.node.folder}/{memory.FOLDER}")  # the next run may have other GPUs
            raise StageFailed(returned["failed"])
        if "past" in returned:
            # Another search's rung was later; only a new training passes through this one.
            store.delete(f"{home}/{CHECKPOINTS}")
            return work()
        if job.node.part_of is None:
            store.delete(f"{home}/{CHECKPOINTS}")
        store.delete(f"{job.node.folder}/{memory.FOLDER}")
        return returned["attempt"]

    return committed(job, store, work)


def _expect_room(job: Job) -> None:
    """Raise StageFailed unless the workers can have places once other work gives them up."""
    resources = job.node.resources
    found = placed(machines(job.machines), [resources])
    if found < resources.workers:
        raise StageFailed(
            f"the cluster's machines have room for {found} of {resources.workers} workers by now; "
            "run again when there are more"
        )


def _cause(error: BaseException) -> str:
    """The first worker's own reason, without Ray's wrapping."""
    failures = getattr(error, "worker_failures", None)
    inner = next(iter(failures.values())) if failures else error
    inner = getattr(inner, "cause", None) or inner.__cause__ or inner
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[-1][:300] if lines else 'no message'}"
