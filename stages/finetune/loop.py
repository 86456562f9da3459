"""The training loop: the same code in one process, under torchrun and under Ray Train.

The loss of a step is the mean negative log-likelihood over the answer tokens of the whole global
batch, so that neither the number of workers nor the micro-batch changes more than rounding. The
auxiliary loss, where a recipe has one, is Hugging Face's, computed per micro-batch and averaged
over them: it depends on the size of the micro-batch, not on the worker that holds it.
"""

import json
import math
import os
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import deepspeed
import pandas as pd
import torch
import torch.nn.functional as F
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import nn
from transformers import get_scheduler

from stages.errors import StageFailed
from stages.finetune.batches import Example, global_batch, load_examples, micro_batches, pack
from stages.finetune.config import config_name, deepspeed_config, micro_batch_size
from stages.finetune.export import packed_logits, padded_logits, write_folder
from stages.finetune.spec import FinetuneSpec
from stages.models.expert_parallel import check_blocks, gather_state_dict, observe_blocks
from stages.models.load import load, load_tokenizer

deepspeed.utils.logger.setLevel("WARNING")
# Otherwise DeepSpeed compiles, on every new machine, a reduction for inference that is not used.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

CURVE_FILE = "training_curve.parquet"
LAYOUT_FILE = "layout.json"
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
PACKING_TOLERANCE = 1e-3
"""Largest difference between fp32 logits of packed and of padded sequences."""


class Callbacks(Protocol):
    """What the loop asks of, and tells to, whoever started it. Every rank calls both methods."""

    def resume_from(self) -> AbstractContextManager[Path | None]:
        """The folder of the last checkpoint, readable by this rank while the context is open."""

    def report(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        """The metrics of a step, and this rank's files of a checkpoint.

        The files of all ranks together, in one folder, are the checkpoint; their names do not
        collide. The folder is deleted when the call returns.
        """


def train(spec: FinetuneSpec, inputs: dict[str, Path], output: Path, callbacks: Callbacks) -> None:
    """Fine-tune ``inputs["model"]`` and let rank 0 write the Hugging Face folder to ``output``.

    Called by every rank. The process group may exist already (Ray Train); otherwise it is taken
    from torchrun's environment, or made for this one process.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    start_distributed()
    rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if workers != spec.workers:
        raise StageFailed(f"workers: the recipe says {spec.workers} but {workers} processes run")
    torch.manual_seed(spec.seed)
    examples = load_examples(spec, inputs, load_tokenizer(inputs["model"]))
    engine, probe = build_engine(spec, inputs["model"], examples)

    curve: list[dict[str, float]] = []
    with callbacks.resume_from() as folder:
        if folder is not None:
            curve = _resume(engine, spec, folder)
    for step in range(len(curve), spec.steps):
        row = training_step(engine, spec, examples, step)
        curve.append(row)
        metrics = {name: value for name, value in row.items() if value is not None}
        if len(curve) % spec.checkpoint_every == 0 and len(curve) < spec.steps:
            with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
                _save(engine, spec, curve, Path(folder))
                callbacks.report(metrics, Path(folder))
        else:
            callbacks.report(metrics, None)

    logits = packed_logits(engine.module, probe)
    state = gather_state_dict(engine.module)
    if rank == 0:
        pd.DataFrame(curve).to_parquet(output / CURVE_FILE, index=False)
        write_folder(state, spec, inputs["model"], output, probe, logits)


def start_distributed() -> None:
    """Make the process group unless it exists."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not torch.distributed.is_initialized() and "WORLD_SIZE" not in os.environ:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads nothing else
    deepspeed.init_distributed(dist_backend=backend)


def build_engine(spec: FinetuneSpec, folder: Path, examples: list[Example]):
    """The DeepSpeed engine, and the examples on which its export will be compared with it.

    Before any compute is spent, a packed batch is compared with an ordinary padded one, and every
    sparse block with its expert-parallel replacement.
    """
    model = load(folder)
    first = global_batch(len(examples), spec.batch_size, spec.seed, step=0)
    probe = sorted((examples[i] for i in first), key=lambda e: len(e.input_ids))[:4]
    difference = (packed_logits(model, probe) - padded_logits(model, probe)).abs().max().item()
    if not difference <= PACKING_TOLERANCE:
        raise StageFailed(
            f"{folder}: packed sequences change the logits of this {model.config.model_type} by "
            f"{difference:.2e} (allowed {PACKING_TOLERANCE:.0e}); it cannot be trained here"
        )
    # Loaded weights are views of the mapped file, all of which would stay resident.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    blocks = observe_blocks(model, spec.expert_parallel) if spec.expert_parallel > 1 else {}

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return get_scheduler(SCHEDULES[spec.schedule], optimizer, spec.warmup_steps, spec.steps)

    engine, *_ = deepspeed.initialize(
        model=model,
        config=deepspeed_config(spec, accelerator=torch.cuda.is_available()),
        lr_scheduler=schedule,
    )
    check_blocks(model, blocks)
    # At stage 0 the loop reduces the gradients itself, and clips them afterwards.
    engine.enable_backward_allreduce = engine.zero_optimization_stage() > 0
    return engine, probe


def training_step(
    engine, spec: FinetuneSpec, examples: list[Example], step: int
) -> dict[str, float | None]:
    """One optimiser step; its row of the training curve, the same on every rank."""
    start = time.perf_counter()
    engine.train()
    rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batch = global_batch(len(examples), spec.batch_size, spec.seed, step)
    answers = sum(examples[i].answer for i in batch)
    micros = micro_batches(batch, rank, workers, micro_batch_size(spec))
    zero = engine.zero_optimization_stage() > 0
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for micro in micros:
        arguments, targets = pack([examples[i] for i in micro], engine.device)
        out = engine(**arguments, use_cache=False, **_router_logits(spec))
        nll = F.cross_entropy(out.logits[0].float(), targets, reduction="sum")
        loss = nll / answers
        sums[0] += nll.detach() / answers
        if spec.auxiliary_loss_weight:
            auxiliary = out.aux_loss / (len(micros) * workers)
            loss = loss + auxiliary * spec.auxiliary_loss_weight
            sums[1] += auxiliary.detach()
        # ZeRO averages the workers' gradients; the loop sums them.
        engine.backward(loss * workers if zero else loss, scale_wrt_gas=False)
        if micro is not micros[-1]:
            engine.step()  # counts the micro-batch; the parameters stay
    torch.distributed.all_reduce(sums)
    loss, auxiliary = sums.tolist()
    # Every rank sees the same sums, so either all raise or none.
    _require_finite("loss", loss + auxiliary, step)
    learning_rate = engine.get_lr()[0]
    if zero:
        engine.step()
        norm = float(engine.get_global_grad_norm())
        _require_finite("gradient norm", norm, step)
    else:
        norm = _reduce_and_clip(engine.module, spec.gradient_clipping)
        _require_finite("gradient norm", norm, step)
        engine.step()
    return {
        "step": step + 1,
        "loss": loss,
        "gradient_norm": norm,
        "learning_rate": learning_rate,
        "auxiliary_loss": auxiliary if spec.auxiliary_loss_weight else None,
        "tokens": sum(len(examples[i].input_ids) for i in batch),
        "seconds": time.perf_counter() - start,
    }


def _router_logits(spec: FinetuneSpec) -> dict[str, bool]:
    """Asks for the load-balancing loss; only Mixture-of-Experts models know the argument."""
    return {"output_router_logits": True} if spec.auxiliary_loss_weight else {}


def _require_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise StageFailed(
            f"step {step + 1}: the {name} is {value}; lower learning_rate or gradient_clipping, "
            "or look for broken rows in the train sets"
        )


def _reduce_and_clip(model: nn.Module, largest: float | None) -> float:
    """Sum the gradients over the workers and scale them to a global L2 norm of at most ``largest``.

    The norm before scaling. In place and without buckets: on the CPU, where this is used, their
    copies cost more than they save. An expert's gradient is summed over the ranks that hold it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    experts = [p for p in parameters if is_moe_param(p)]
    pending = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        group = None
        if is_moe_param(parameter):
            group = groups._get_expert_data_parallel_group(parameter.group_name)
        if torch.distributed.get_world_size(group) > 1:
            pending.append(torch.distributed.all_reduce(parameter.grad, group=group, async_op=True))
    for work in pending:
        work.wait()
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if not is_moe_param(p)])
    if experts:  # each rank of an expert-parallel group holds others
        squares = torch.nn.utils.get_total_norm([p.grad for p in experts]).square()
        group = groups._get_expert_parallel_group(experts[0].group_name)
        torch.distributed.all_reduce(squares, group=group)
        norm = (norm.square() + squares).sqrt()
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm.item()


def _save(engine, spec: FinetuneSpec, curve: list[dict], folder: Path) -> None:
    """This rank's files of a checkpoint: weights, optimiser, schedule, curve and random state."""
    engine.save_checkpoint(str(folder), tag="state", client_state={"curve": curve})
    rank = torch.distributed.get_rank()
    torch.save(torch.get_rng_state(), folder / f"random_state_{rank}.pt")
    if rank == 0:
        (folder / LAYOUT_FILE).write_text(json.dumps(_layout(spec)))


def _resume(engine, spec: FinetuneSpec, folder: Path) -> list[dict]:
    """Load a checkpoint; the rows of the curve that it has."""
    layout = json.loads((folder / LAYOUT_FILE).read_text())
    if layout != _layout(spec):
        raise StageFailed(
            f"the checkpoint was written with {layout} and cannot go on with {_layout(spec)}; "
            "restore those fields, or delete the unfinished training"
        )
    _, client_state = engine.load_checkpoint(str(folder), tag="state")
    rank = torch.distributed.get_rank()
    torch.set_rng_state(torch.load(folder / f"random_state_{rank}.pt"))
    return client_state["curve"]


def _layout(spec: FinetuneSpec) -> dict[str, object]:
    """How the state is spread over the files of a checkpoint."""
    return {
        "workers": spec.workers,
        "expert_parallel": spec.expert_parallel,
        "deepspeed_config": config_name(spec, accelerator=torch.cuda.is_available()),
    }
