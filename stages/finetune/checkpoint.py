"""Checkpoints that fit every layout: any number of workers, expert-parallel size and ZeRO stage.

Every weight and every optimiser state of it is written as one long vector of its entries, of which
each rank holds an interval: all of it, the part that ZeRO gave it, or the experts that it keeps.
PyTorch's distributed checkpoint stores the intervals, and on loading gives each rank the entries
that it holds now, whoever wrote them. The optimiser's state goes the same way as the weights.

DeepSpeed's own universal checkpoint does the same for ZeRO only (stage 0, the fast one on the CPU,
has none) and knows experts only as matrices w1, w2 and w3.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from stages.models.expert_parallel import ExpertParallel, entries

CURVE_FILE = "curve.json"
WEIGHT, STEP = "weight", "step"


@dataclass
class Interval:
    """Entries ``start`` to ``start + len(data)`` of a vector of ``total``, as this rank holds them.

    The public methods are those that PyTorch's distributed checkpoint asks of what it stores.
    """

    data: torch.Tensor
    start: int
    total: int

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), self.data.size())

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.data)
        what = TensorWriteData(self._chunk(), properties, torch.Size([self.total]))
        index = MetadataIndex(name, torch.Size([self.start]))
        return [WriteItem(index, WriteItemType.SHARD, tensor_data=what)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]


class _SavePlanner(dcp.DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].data


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def __init__(self):
        super().__init__(flatten_state_dict=False)

    def set_up_planner(
        self, state_dict: dict[str, Interval], metadata: Metadata, is_coordinator: bool
    ) -> None:
        # The default's first step would replace what is no tensor by None.
        self.state_dict, self.metadata = state_dict, metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].data


def save(engine, curve: list[dict], folder: Path) -> None:
    """Write this rank's files of a checkpoint: its intervals, and on rank 0 the training curve.

    Called by every rank. There is no random state to keep: every micro-batch sets its own.
    """
    writer = dcp.FileSystemWriter(folder)
    dcp.save(_intervals(engine), storage_writer=writer, planner=_SavePlanner())
    if torch.distributed.get_rank() == 0:
        (folder / CURVE_FILE).write_text(json.dumps(curve))


def resume(engine, folder: Path) -> list[dict]:
    """Load a checkpoint of any layout into a fresh engine; the rows of the curve that it has.

    Called by every rank.
    """
    reader = dcp.FileSystemReader(folder)
    _make_optimizer_state(engine, reader.read_metadata().state_dict_metadata)
    dcp.load(_intervals(engine), storage_reader=reader, planner=_LoadPlanner())
    if engine.zero_optimization_partition_weights():
        _take_up_weights(engine.optimizer)
    elif engine.zero_optimization():
        engine.optimizer.update_lp_params()
    curve = json.loads((folder / CURVE_FILE).read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimiser step stands between
        for _ in curve:
            engine.lr_scheduler.step()
    return curve


def _intervals(engine) -> dict[str, Interval]:
    """What this rank holds: ``NAME/weight``, ``NAME/exp_avg`` and so on, and the buffers.

    Views: loading writes into the engine.
    """
    found = {}
    for name, parameter, first, total in _parameters(engine):
        held, start = _held(engine, parameter)
        for key, data in held.items():
            if key == STEP:  # the same number on every rank
                found[f"{name}/{key}"] = Interval(data.view(-1), 0, 1)
            else:
                found[f"{name}/{key}"] = Interval(data.view(-1), first + start, total)
    stored = engine.module.state_dict().keys()
    for name, buffer in engine.module.named_buffers():
        if name in stored:
            found[f"{name}/{WEIGHT}"] = Interval(buffer.view(-1), 0, buffer.numel())
    return found


def _parameters(engine) -> Iterator[tuple[str, torch.nn.Parameter, int, int]]:
    """Each parameter with its name, where its first entry stands among all ranks', and how many
    entries they have together.
    """
    for path, module in engine.module.named_modules():
        if isinstance(module, ExpertParallel):
            for name, parameter in module.named_parameters():
                yield (f"{path}.{name}", parameter, *module.extent(parameter))
    for name, parameter in engine.module.named_parameters():
        if not hasattr(parameter, "group_name"):
            yield name, parameter, 0, entries(parameter)


def _held(engine, parameter: torch.nn.Parameter) -> tuple[dict[str, torch.Tensor], int]:
    """Weight and optimiser state of a parameter on this rank, and where in it they start."""
    if engine.zero_optimization_partition_weights():
        return _partition(engine, parameter)
    if not engine.zero_optimization() or not parameter.requires_grad:
        state = engine.optimizer.state.get(parameter, {}) if parameter.requires_grad else {}
        return {WEIGHT: parameter.data, **state}, 0
    mapping = parameter._hp_mapping
    if mapping is None:  # all of it is with other ranks
        return {}, 0
    place = mapping.hp_fragment_address
    state = _state(engine, _flat(engine, parameter), place.start, place.numel)
    return {WEIGHT: mapping.hp_fragment, **state}, mapping.lp_fragment_address.start


def _partition(engine, parameter: torch.nn.Parameter) -> tuple[dict[str, torch.Tensor], int]:
    """The same at stage 3, where each rank of a group has an equal part, the last ones padded."""
    part = parameter.ds_tensor
    start = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
    count = min(part.numel(), parameter.ds_numel - start)
    if count <= 0:
        return {}, 0
    if not parameter.requires_grad:
        return {WEIGHT: part.narrow(0, 0, count)}, start
    _, place, _ = engine.optimizer.grad_position[parameter.ds_id]
    flat = _flat(engine, parameter)
    return {WEIGHT: flat.data.narrow(0, place, count), **_state(engine, flat, place, count)}, start


def _state(engine, flat: torch.nn.Parameter, start: int, count: int) -> dict[str, torch.Tensor]:
    """A part of the optimiser's state of a vector."""
    return {
        key: value if key == STEP else value.narrow(0, start, count)
        for key, value in engine.optimizer.optimizer.state.get(flat, {}).items()
    }


def _flat(engine, parameter: torch.nn.Parameter) -> torch.nn.Parameter | None:
    """The vector that ZeRO made of this rank's parts of parameters, among them one of this; None
    where all of it is with other ranks."""
    if engine.zero_optimization_partition_weights():
        group, _, _ = engine.optimizer.grad_position[parameter.ds_id]
        return engine.optimizer.fp32_partitioned_groups_flat[group]
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    return engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]


def _take_up_weights(optimizer) -> None:
    """Compute with the weights that were loaded into stage 3's vectors."""
    vectors = (optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat)
    for used, master in zip(*vectors, strict=True):
        used.data.copy_(master.data)
    if kept := optimizer.persistent_parameters:  # small ones, whole on every rank
        kept[0].partition(kept)
        kept[0].all_gather(kept)


def _make_optimizer_state(engine, metadata: dict[str, TensorStorageMetadata]) -> None:
    """Room for the states that a checkpoint has; an optimiser makes them in its first step only."""
    stored: dict[str, dict[str, TensorStorageMetadata]] = {}
    for key, what in metadata.items():
        owner, _, kind = key.rpartition("/")
        stored.setdefault(owner, {})[kind] = what
    for name, parameter, _, _ in _parameters(engine):
        if not parameter.requires_grad:
            continue
        target, state = parameter, engine.optimizer.state
        if engine.zero_optimization():
            target, state = _flat(engine, parameter), engine.optimizer.optimizer.state
            if target is None:
                continue
        for kind, what in stored.get(name, {}).items():
            if kind == WEIGHT or kind in state[target]:
                continue
            dtype, fused = what.properties.dtype, engine.optimizer.param_groups[0].get("fused")
            if kind == STEP:
                device = target.device if fused else "cpu"  # as PyTorch keeps it
                state[target][kind] = torch.zeros((), dtype=dtype, device=device)
            else:
                state[target][kind] = torch.zeros_like(target, dtype=dtype)
