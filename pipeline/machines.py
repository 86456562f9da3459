"""What the machines of a Ray cluster have room for.

A worker lies on one machine, and a part of a GPU on one GPU. So workers are placed one by one, as
Ray does it; sums over the cluster would promise places that nobody can give.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import ray

from pipeline.sweep import MachineKind, Resources

_ROUNDING = 1e-6
"""Ten tenths are one; Ray itself counts in steps of 1e-4."""


class Machine(NamedTuple):
    """What a machine has in all."""

    cpus: float
    gpus: float


def machines(startable: Iterable[MachineKind]) -> list[Machine]:
    """The machines of the connected cluster, with those that it can still start by itself.

    Ray does not tell what a cluster can grow to, so the sweep does; a machine that already runs
    counts among those of its kind.
    """
    found = [_machine(node) for node in ray.nodes() if node["Alive"]]
    for kind in startable:
        machine = Machine(kind.cpus, kind.gpus)
        found += [machine] * (kind.count - found.count(machine))
    return found


def this_machine() -> Machine:
    """The machine on which the caller runs."""
    here = ray.get_runtime_context().get_node_id()
    return next(_machine(node) for node in ray.nodes() if node["NodeID"] == here)


def _machine(node: dict) -> Machine:
    resources = node["Resources"]
    return Machine(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def placed(room: Sequence[Machine], loads: Iterable[Resources]) -> int:
    """How many of the loads' workers, all at the same time, find a place.

    Exact for workers that take the same. Otherwise the largest come first, each to the smallest
    machine that still holds it, so now and then a place is overlooked but never invented.
    """
    free = [_Free(machine) for machine in sorted(room, key=lambda m: (m.gpus, m.cpus))]
    workers = [load for load in loads for _ in range(load.workers)]
    workers.sort(key=lambda worker: (worker.gpus, worker.cpus), reverse=True)
    return sum(any(each.take(worker) for each in free) for worker in workers)


class _Free:
    """What is left of a machine."""

    def __init__(self, machine: Machine):
        self.cpus, self.gpus = machine.cpus, [1.0] * int(machine.gpus)

    def take(self, worker: Resources) -> bool:
        """Take a worker's share, if it is there."""
        share = min(worker.gpus, 1.0)  # of more than one GPU, only whole ones are given
        fitting = [n for n, left in enumerate(self.gpus) if left >= share - _ROUNDING]
        if self.cpus < worker.cpus - _ROUNDING or len(fitting) < worker.gpus:
            return False
        self.cpus -= worker.cpus
        if share:
            fitting.sort(key=self.gpus.__getitem__)  # the fullest first
            for n in fitting[: max(1, int(worker.gpus))]:
                self.gpus[n] -= share
        return True
