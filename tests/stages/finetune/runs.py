"""Fine-tunes in processes of their own: what the tests of the loop look at."""

import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.errors import StageFailed
from stages.finetune.spec import FinetuneSpec

TIMEOUT_S = 300


@dataclass
class Run:
    spec: FinetuneSpec
    inputs: dict[str, Path]
    output: Path
    stop_after: int | None = None
    """Raise in the report of this step."""
    checkpoints: Path | None = None
    """Where the last checkpoint is kept, and read when the run starts."""
    prepare: Callable[[], None] | None = None
    """Called in each process before the run."""


class Recorder:
    """Merges the files of all ranks' checkpoints into one folder, as Ray does."""

    def __init__(self, run: Run):
        self.run = run

    def resume_from(self):
        folder = self.run.checkpoints
        return nullcontext(folder if folder and any(folder.iterdir()) else None)

    def report(self, metrics, checkpoint):
        if checkpoint is not None and self.run.checkpoints is not None:
            for file in checkpoint.rglob("*"):
                if file.is_file():
                    target = self.run.checkpoints / file.relative_to(checkpoint)
                    assert self.run.stop_after or not target.exists(), f"two ranks wrote {target}"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
        torch.distributed.barrier()
        if metrics["step"] == self.run.stop_after:
            raise KeyboardInterrupt


def launch(workers: int, runs: list[Run], store: Path, keep_going: bool = False) -> None:
    """Run the fine-tunes one after the other in ``workers`` processes over gloo.

    ``keep_going`` goes on after an unexpected error of one, which must be the same on all ranks.
    """
    seconds = max(TIMEOUT_S, 60 * len(runs))
    in_ranks(_worker, (workers, runs, store, keep_going), workers, seconds)


def in_ranks(work: Callable, args: tuple, ranks: int = 2, seconds: float = TIMEOUT_S) -> None:
    """Call ``work(rank, *args)`` in as many processes, which are killed when time is up."""
    context = torch.multiprocessing.spawn(work, args=args, nprocs=ranks, join=False)
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"not finished after {seconds} s"
    finally:
        for process in context.processes:
            process.kill()


def _worker(rank: int, workers: int, runs: list[Run], store: Path, keep_going: bool) -> None:
    from stages.finetune.loop import PastTheEnd, train

    with process_group(rank, workers, store):
        for run in runs:
            if run.prepare is not None:
                run.prepare()
            try:
                train(run.spec, run.inputs, run.output, Recorder(run))
            except KeyboardInterrupt:
                pass
            except PastTheEnd as error:
                (run.output / f"past_{rank}.txt").write_text(str(error))
            except StageFailed as error:
                (run.output / f"failed_{rank}.txt").write_text(str(error))
            except Exception:
                (run.output / f"crashed_{rank}.txt").write_text(traceback.format_exc())
                if not keep_going:
                    raise


@contextmanager
def process_group(rank: int, workers: int, store: Path) -> Iterator[None]:
    """Makes this process, with one thread, a rank over gloo, and takes leave of the others."""
    from stages.finetune.loop import end_distributed

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=workers
    )
    yield
    end_distributed()
