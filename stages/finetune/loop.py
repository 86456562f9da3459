"""The training loop: the same code in one process, under torchrun and under Ray Train."""

import json
import math
import os
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import pandas as pd
import torch
from deepspeed.utils import set_z3_leaf_module
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import PreTrainedModel

from stages.errors import StageFailed
from stages.finetune import evidence as evidence_file
from stages.finetune import lora, parameters
from stages.finetune.batches import Example, global_batch, load_examples, select_rows
from stages.finetune.checkpoint import resume, save
from stages.finetune.config import config_name, deepspeed_config, in_order, micro_batch_size
from stages.finetune.evidence import Evidence
from stages.finetune.export import padded_logits, training_logits, write_folder
from stages.finetune.head import with_head
from stages.finetune.knobs import Knobs
from stages.finetune.refusals import contradictions, inapplicable, misplaced
from stages.finetune.routing_figure import routing_figure
from stages.finetune.schedules import scheduler, total_steps
from stages.finetune.spec import CURVE_FILE, REMOVED_FILE, ROUTING_FIGURE, FinetuneSpec
from stages.finetune.training import Training
from stages.finetune.validating import validate
from stages.models.block_check import check_blocks, observe_blocks
from stages.models.classifier import is_classifier
from stages.models.expert_parallel import convert, gather_state_dict
from stages.models.families import family
from stages.models.load import load, load_input, load_tokenizer
from stages.models.pair_dropout import follow_pairs
from stages.models.size import measure
from stages.models.sources import Facts

deepspeed.utils.logger.setLevel("WARNING")
# Otherwise DeepSpeed compiles, on every new machine, a reduction for inference that is not used.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

PACKING_TOLERANCE = 1e-3
"""Largest difference between fp32 logits of packed and of padded sequences."""


class PastTheEnd(Exception):
    """The checkpoint to resume from lies after the last step that was asked for."""


class Callbacks(Protocol):
    """What the loop asks of, and tells to, whoever started it. Every rank calls both methods."""

    def resume_from(self) -> AbstractContextManager[Path | None]:
        """The folder of the last checkpoint, readable by this rank while the context is open."""

    def report(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        """The metrics of a step, and this rank's files of a checkpoint; also of one that failed.

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
    entry = family(json.loads((inputs["model"] / "config.json").read_text()))
    processor = load_input(inputs["model"])
    examples, watched = (
        load_examples(
            spec, inputs, processor, encoder_decoder=entry.encoder_decoder, held_out=held_out
        )
        for held_out in (False, True)
    )
    training, probe, tuner = build(spec, inputs["model"], examples)
    steps = total_steps(spec, len(examples))

    curve: list[dict] = []
    with callbacks.resume_from() as folder:
        if folder is not None:
            curve = resume(training.engine, folder)
            training.skipped = sum(row["skipped"] for row in curve)
    last, trained = spec.until or steps, sum(row["tokens"] for row in curve)
    if len(curve) > last:
        raise PastTheEnd(f"the resumed training is at step {len(curve)}, after step {last}")
    for step in range(len(curve), last):
        try:
            row = training.step(step)
        except StageFailed:
            # What it cost is told all the same; every rank is here.
            batch = global_batch(len(examples), spec.batch_size, spec.seed, step)
            trained += sum(examples[i].tokens for i in batch)
            failed = {"step": step + 1, "total_steps": last, "loss": math.nan}
            callbacks.report(failed | {"total_tokens": trained}, None)
            raise
        trained += row["tokens"]
        if spec.validation:
            looks = spec.validation.due(step + 1, last)
            row |= (validate(training.engine, watched, micro_batch_size(spec)) if looks
                    else {"validation_loss": None, "validation_seconds": None})
        curve.append(row)
        metrics = {name: value for name, value in row.items() if isinstance(value, int | float)}
        metrics |= {"total_steps": last, "total_tokens": trained}
        due = len(curve) % spec.checkpoint_every == 0 or len(curve) == last
        if due and len(curve) < steps:
            with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
                save(training.engine, curve, Path(folder))
                callbacks.report(metrics, Path(folder))
        else:
            callbacks.report(metrics, None)
    if training.skipped == len(curve):
        raise StageFailed(
            f"none of the {last} steps was applied: the loss or the gradient of each was not "
            "finite; lower learning_rate, or look for broken rows in the train sets"
        )

    model = training.engine.module
    logits = training_logits(model, probe)
    if tuner is not None:
        lora.merge(tuner)
    state = gather_state_dict(model)
    if rank == 0:
        pd.DataFrame(curve).to_parquet(output / CURVE_FILE, index=False)
        run = _run_facts(training, curve) | {"data": _audit(spec, inputs, output)}
        evidence_file.write(output, spec, training.evidence, run)
        if training.knobs.blocks:
            routing_figure(curve, output / ROUTING_FIGURE)
        write_folder(state, spec, inputs["model"], output, probe, logits, last)


def start_distributed() -> None:
    """Make the process group unless it exists."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not torch.distributed.is_initialized() and "WORLD_SIZE" not in os.environ:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads nothing else
    deepspeed.init_distributed(dist_backend=backend)


def end_distributed() -> None:
    """Part from the other ranks, where the process is about to end. Called by every rank.

    A thread of gloo's that still holds a tensor of the last exchange while Python shuts down would
    abort the process, and torchrun would call a finished training failed.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def build(
    spec: FinetuneSpec, folder: Path, examples: list[Example]
) -> tuple[Training, list[Example], LoraModel | None]:
    """The model under DeepSpeed with all that the recipe does to it, the examples on which its
    export will be compared with it, and its adapters.

    Before any compute is spent, the recipe is held against the model, a packed batch is compared
    with an ordinary padded one, and every sparse block with its expert-parallel replacement.
    """
    model, evidence = load(folder), Evidence()
    _refuse(spec, model)
    if spec.labels is not None:
        drawn = not is_classifier(model.config)
        if drawn and spec.lora is not None and "head" not in spec.trained_roles():
            raise StageFailed(
                "recipe: head: is drawn at random, and lora leaves it as it is; add head to train"
            )
        model = with_head(model, spec.labels, load_tokenizer(folder).pad_token_id, spec.seed)
        evidence.note("head", labels=spec.labels, drawn=drawn)
    first = global_batch(len(examples), spec.batch_size, spec.seed, step=0)
    probe = sorted((examples[i] for i in first), key=lambda e: e.tokens)[:4]
    if family(model).packs and spec.labels is None:
        _check_packing(model, probe, folder)
    card = measure(model, "", top_k=spec.router.top_k)
    # Loaded weights are views of the mapped file, all of which would stay resident.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()

    if spec.router.initial == "random":
        change = parameters.draw_routers(model, spec.seed)
        evidence.note("router.initial", norm_of_the_change=change)
    if family(model).is_moe:
        follow_pairs(model)
    knobs = Knobs(model, spec, evidence)
    parameters.freeze(model, spec)
    tuner = lora.adapt(model, spec.lora, evidence) if spec.lora else None
    for name, counts in parameters.count(model).items():
        evidence.note("parameters", **{name: counts})
    vectors = [p.numel() for p in model.parameters() if p.requires_grad and p.ndim < 2]
    evidence.note("weight_decay", parameters_of_norms_and_biases=sum(vectors))
    knobs.attach()
    config = deepspeed_config(spec, accelerator=torch.cuda.is_available())
    file = config_name(spec, accelerator=torch.cuda.is_available())
    evidence.note("deepspeed", file=file, stage_of_file=config["zero_optimization"]["stage"])
    # Read here and by nobody else: DeepSpeed would replace routers as well.
    experts, blocks = config.pop("expert_parallel", None), {}
    if experts is not None:
        blocks = observe_blocks(model)
        convert(model, experts["autoep_size"], grouped_mm=experts["use_grouped_mm"])
    layers = family(model).modules(model, "expert").values() if family(model).is_moe else ()
    for module in layers:
        # ZeRO stage 3 gathers a layer's experts together: their ranks do not call the same ones.
        set_z3_leaf_module(module, True)
    if any(isinstance(module, nn.ModuleDict) for module in layers):
        evidence.note("deepspeed", **in_order(config["zero_optimization"]))
    groups = parameters.groups(model, spec)
    turns = parameters.Turns(spec.alternate, groups) if spec.alternate else None
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups,
        config=config,
        lr_scheduler=lambda optimizer: scheduler(spec, len(examples), optimizer),
    )
    for module in model.modules() if spec.precision == "bf16" else ():
        for name in family(model).factors:
            if hasattr(module, name):
                setattr(module, name, getattr(module, name).bfloat16())
    check_blocks(model, blocks)
    if turns is not None:
        turns.skip_waiting(engine.basic_optimizer)
    return Training(engine, spec, examples, knobs, evidence, turns, card), probe, tuner


def _check_packing(model: PreTrainedModel, probe: list[Example], folder: Path) -> None:
    """Raise StageFailed where a sequence sees the others that are packed into its row."""
    difference = (training_logits(model, probe) - padded_logits(model, probe)).abs().max().item()
    if not difference <= PACKING_TOLERANCE:
        raise StageFailed(
            f"{folder}: packed sequences change the logits of this {model.config.model_type} by "
            f"{difference:.2e} (allowed {PACKING_TOLERANCE:.0e}); it cannot be trained here"
        )


def _refuse(spec: FinetuneSpec, model: PreTrainedModel) -> None:
    """Raise StageFailed for a recipe that contradicts itself or cannot act on the model."""
    entry = family(model)
    if entry.no_training:
        raise StageFailed(f"{entry.model_type} cannot be trained: {entry.no_training}")
    experts, top_k = entry.experts_of(model.config.to_dict()) if entry.is_moe else (0, 0)
    facts = Facts(
        "moe" if entry.is_moe else "dense",
        entry.model_type,
        experts=experts,
        top_k=top_k,
        members=getattr(model.config, "ensemble_size", 1),
    )
    problems = [*contradictions(spec), *inapplicable(spec, facts)]
    problems += misplaced(spec, spec.expert_parallel)
    groups, top_k = getattr(model.config, "n_group", None) or 1, spec.router.top_k
    allowed = (experts or 0) // groups * (getattr(model.config, "topk_group", None) or groups)
    if top_k is not None and allowed < top_k <= (experts or 0):
        reason = f"{top_k} is more than the {allowed} experts of the groups that a token may take"
        problems.append(("router.top_k", f"{reason}; lower it"))
    if problems:
        raise StageFailed("; ".join(f"recipe: {field}: {reason}" for field, reason in problems))


def _run_facts(training: Training, curve: list[dict]) -> dict[str, Any]:
    """What the evidence says about the whole run."""
    spec, note = training.spec, training.evidence.note
    counts = training.evidence.measured("parameters")
    groups = training.engine.optimizer.param_groups
    rates = {group["part"]: group["initial_lr"] for group in groups}
    for knob in ("train", "freeze", "lora"):
        note(knob, **counts)
    note("optimizer", implementation=type(training.engine.basic_optimizer).__name__)
    note("optimizer", **{k: groups[0][k] for k in ("betas", "eps", "momentum") if k in groups[0]})
    for knob in ("learning_rate", "router.learning_rate"):
        note(knob, learning_rates=rates)
    rows = len(training.examples)
    for knob in ("steps", "epochs"):
        note(knob, steps=len(curve), passes_over_the_rows=len(curve) * spec.batch_size / rows)
    note("max_length", longest_sequence=max(e.tokens for e in training.examples))
    note("max_nonfinite_steps", nonfinite_steps=training.skipped)
    moved = [row["learning_rate"] for row in curve]
    # Where schedules differ that begin and end alike.
    quarters = {f"at_{n}_of_4": moved[n * (len(moved) - 1) // 4] for n in (1, 2, 3)}
    note("schedule", first=moved[0], **quarters, largest=max(moved), last=moved[-1])
    for knob in ("warmup_steps", "warmup_ratio"):
        note(knob, steps_before_the_largest_rate=moved.index(max(moved)))
    note("weight_decay", in_groups={group["part"]: group["weight_decay"] for group in groups})
    norms = [norm for row in curve if math.isfinite(norm := row["gradient_norm"])]
    limit = spec.gradient_clipping or math.inf
    note("gradient_clipping", largest_norm=max(norms), steps_clipped=sum(n > limit for n in norms))
    precision = training.dtypes()
    note("precision", **precision)
    if spec.validation is not None:
        seconds = [s for row in curve if (s := row["validation_seconds"]) is not None]
        share = sum(seconds) / (sum(seconds) + sum(row["seconds"] for row in curve))
        note("validation", looks=len(seconds), seconds=sum(seconds), share_of_time=share)
    if spec.alternate is not None:
        turned = [row["router_change"] > 0 for row in curve]
        facts = {"steps_that_moved_the_routers": sum(turned), "steps_that_did_not": turned.count(0)}
        note("alternate", **facts)
    return {
        "parameters": counts,
        "learning_rates": rates,
        "deepspeed": training.evidence.measured("deepspeed")
        | {"stage_used": training.engine.zero_optimization_stage()},
        "steps": len(curve),
        "nonfinite_steps": training.skipped,
        "precision": precision,
        "micro_batch": {
            "asked": micro_batch_size(spec.asked_micro_batch()),
            "used": micro_batch_size(spec),
            "out_of_memory_at": spec.out_of_memory_at,
        },
    }


def _audit(spec: FinetuneSpec, inputs: dict[str, Path], output: Path) -> list[dict[str, Any]]:
    """How many rows of each train set were used, and which ones were removed by which phrase."""
    audited, all_removed = [], []
    for train_set in spec.data:
        rows, removed = select_rows(train_set, inputs, spec.seed_of_rows)
        by_phrase = pd.Series([row["phrase"] for row in removed], dtype=str).value_counts()
        audited.append(
            {
                "dataset": f"{train_set.dataset}/{train_set.split}",
                "rows": len(rows),
                "repeat": train_set.repeat,
                "removed": len(removed),
                "removed_by_phrase": by_phrase.to_dict(),
            }
        )
        all_removed += removed
    if any(train_set.exclude for train_set in spec.data):
        frame = pd.DataFrame(all_removed, columns=["dataset", "id", "phrase"])
        frame.to_parquet(output / REMOVED_FILE, index=False)
    return audited
