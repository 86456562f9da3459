"""Out of memory while training: on with half the micro-batch and twice the accumulation.

The global batch stays the same. One rank alone must not try again inside a collective, so it writes
down which micro-batch was too large and fails; the worker group ends, and the next one reads what
was written and starts from the last checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.plan import Node
from pipeline.store import Store
from stages.errors import StageFailed
from stages.finetune.config import micro_batch_size
from stages.finetune.spec import FinetuneSpec

FOLDER = "memory"
MARKER = f"{FOLDER}/out_of_memory.json"


def too_large(store: Store, node: Node) -> tuple[int, ...]:
    """The micro-batches of a node that ran out of memory, in the order of the attempts."""
    found = store.read_json(f"{node.folder}/{MARKER}")
    return tuple(found["micro_batches"]) if found else ()


def reduced(spec: FinetuneSpec, tried: tuple[int, ...]) -> FinetuneSpec:
    """The spec with half of the micro-batch that was tried last.

    Raises StageFailed, on every rank alike, when that was a single sequence.
    """
    if not tried:
        return spec
    last = micro_batch_size(spec.model_copy(update={"micro_batch": tried[-1]}))
    if last == 1:
        raise StageFailed(
            "a GPU is out of memory with one sequence per forward pass; lower the recipe's "
            "max_length, or take more workers or a DeepSpeed file with offload"
        )
    return spec.model_copy(update={"micro_batch": last // 2, "out_of_memory_at": tried})


@contextmanager
def guarded(store: Store, node: Node) -> Iterator[FinetuneSpec]:
    """Train with the spec that is given; running out of memory is written down, then raised, so
    that the other ranks, which may wait in a collective, end as well.

    Raises StageFailed when a single sequence did not fit before.
    """
    spec = reduced(node.spec, too_large(store, node))
    try:
        yield spec
    except torch.OutOfMemoryError:
        tried = [*spec.out_of_memory_at, spec.micro_batch]
        store.write_json(f"{node.folder}/{MARKER}", {"micro_batches": tried})
        raise
