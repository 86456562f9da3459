"""One optimiser step: the losses, the knobs, the gradients and what is recorded of them.

The loss of a step is the mean negative log-likelihood over the answer tokens of the whole global
batch, so that neither the number of workers nor the micro-batch changes more than rounding. The
auxiliary losses, where a recipe has them, are computed per micro-batch and averaged over them: they
depend on the size of the micro-batch, not on the worker that holds it. Random numbers are drawn
anew for every micro-batch from the seed, the step and its place in the global batch, so that a
resumed run, and one with another number of workers, draws the same.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import groups
from torch import nn

from stages.attack.image_geometry import sizes
from stages.errors import StageFailed
from stages.finetune import evidence as evidence_file
from stages.finetune import freelb
from stages.finetune.adversary import divergence, perturbed, router_divergence
from stages.finetune.batches import (
    Example,
    ImageExample,
    MicroBatch,
    global_batch,
    micro_batch,
    micro_batches,
)
from stages.finetune.config import micro_batch_size
from stages.finetune.evidence import Evidence
from stages.finetune.knobs import Knobs
from stages.finetune.parameters import Turns, trained_roles
from stages.finetune.recipe import FreeLB, ImageAdversary, Trades
from stages.finetune.router_losses import balance_by_sequence, load_balancing_loss, z_loss
from stages.finetune.spec import FinetuneSpec
from stages.finetune.telemetry import RoutingTelemetry, model_flops_utilisation
from stages.finetune.validating import negative_log_likelihood
from stages.models.balance import gshard_loss, importance_loss, load_loss
from stages.models.card import ModelCard
from stages.models.families import family
from stages.models.images import Classifier
from stages.models.routing import Routing

AUXILIARY = {
    "auxiliary_loss_weight": ("auxiliary_loss", load_balancing_loss),
    "z_loss_weight": ("z_loss", z_loss),
    "importance_loss_weight": ("importance_loss", importance_loss),
    "gshard_loss_weight": ("gshard_loss", gshard_loss),
    "load_loss_weight": ("load_loss", load_loss),
}
"""Field of the recipe to the column of the curve and the loss."""


@dataclass
class Training:
    """A DeepSpeed engine and all that a recipe does with it."""

    engine: nn.Module
    spec: FinetuneSpec
    examples: list[Example]
    knobs: Knobs
    evidence: Evidence
    turns: Turns | None
    card: ModelCard
    """Of the model as it is trained: with its head, and the recipe's experts per token."""
    skipped: int = 0
    """Steps so far whose loss or gradient was not finite."""

    def __post_init__(self):
        model = self.engine.module
        role_of = trained_roles(model)
        self.routers = [p for n, p in model.named_parameters() if role_of[n] == "router"]
        self.weighed = {n: AUXILIARY[n] for n in AUXILIARY if getattr(self.spec, n)}
        # At stage 0 this class reduces the gradients itself, and clips them afterwards.
        self.zero = self.engine.zero_optimization_stage() > 0
        self.engine.enable_backward_allreduce = self.zero
        experts = family(model).modules(model, "expert").values() if self.knobs.blocks else ()
        apart = [module for module in experts if isinstance(module, nn.ModuleDict)]
        self.idle = [p for module in apart for p in module.parameters() if p.requires_grad]
        """Weights that none of a rank's tokens may meet."""

    def step(self, step: int) -> dict:
        """Optimiser step ``step``, counted from 0; its row of the training curve, the same on every
        rank. Raises StageFailed when too many steps were not finite."""
        start = time.perf_counter()
        spec, engine = self.spec, self.engine
        engine.train()
        rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
        batch = global_batch(len(self.examples), spec.batch_size, spec.seed, step)
        answers = sum(self.examples[i].answer for i in batch)
        micros = micro_batches(batch, rank, workers, micro_batch_size(spec))
        if self.turns is not None:
            self.turns.start(spec, len(self.examples), spec.steps_before + step)
        if self.evidence.open:
            self._count(micros)
        telemetry = RoutingTelemetry(family(engine.module).scores)
        sums = torch.zeros(1 + len(self.weighed), dtype=torch.float64, device=engine.device)
        for index, micro in enumerate(micros):
            place = rank * len(batch) // workers + index * len(micro)
            sums += self._micro_batch(
                [self.examples[i] for i in micro],
                answers=answers,
                parts=len(micros) * workers,
                seed=_seed(spec.seed, step, place),
                last=index == len(micros) - 1,
                telemetry=telemetry,
            )
        torch.distributed.all_reduce(sums)
        # Every rank sees the same sums, so either all raise or none.
        columns = ("loss", *(column for column, _ in self.weighed.values()))
        losses = dict(zip(columns, sums.tolist(), strict=True))
        rates = {group["part"]: group["lr"] for group in engine.optimizer.param_groups}
        norm, change = self._update(finite=math.isfinite(sum(losses.values())))
        watched = losses | {"gradient norm": norm}
        bad = [(name, v) for name, v in watched.items() if not math.isfinite(v)]
        if bad:
            self._count_nonfinite(step, *bad[0])
        elif self.evidence.open:
            evidence_file.require(self.evidence, spec)
            if isinstance(spec.adversarial, FreeLB):
                self._require_perturbation()
        self.evidence.end_step(applied=not bad)
        seconds = time.perf_counter() - start
        tokens = sum(self.examples[i].tokens for i in batch)
        flops = spec.passes * self.card.flops(tokens - answers, answers)
        return {
            "step": step + 1,
            "loss": losses["loss"],
            "gradient_norm": norm,
            "learning_rate": next(iter(rates.values())),
            "router_learning_rate": rates.get("router"),
            **{column: losses.get(column) for column, _ in AUXILIARY.values()},
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "model_flops_utilisation": model_flops_utilisation(
                flops / seconds, spec.precision, workers
            ),
            "skipped": int(bool(bad)),
            **({"router_change": change} if self.turns is not None else {}),
            **telemetry.row(),
        }

    def _count(self, micros: list[list[int]]) -> None:
        """Tell how many sequences all ranks together have in a step."""
        mine = sum(map(len, micros))
        sequences = torch.tensor(mine, device=self.engine.device)
        torch.distributed.all_reduce(sequences)
        self.evidence.note(
            "batch_size", sequences_in_a_step=sequences.item(), micro_batches_per_worker=len(micros)
        )

    def _require_perturbation(self) -> None:
        """Raise StageFailed where rounding takes most of what is added to embeddings."""
        measured = self.evidence.measured("adversarial").get(freelb.LEFT, 0.0)
        left = torch.tensor(measured, device=self.engine.device)
        torch.distributed.all_reduce(left)
        left = left.item() / torch.distributed.get_world_size()
        if left < freelb.LEAST:
            raise StageFailed(
                f"adversarial: rounding in {self.spec.precision} leaves {left:.0%} of the norm of "
                "what is added to this model's embeddings, which are large beside it; train in "
                "fp32, or raise initial, learning_rate and max_norm"
            )

    def dtypes(self) -> dict[str, list[str]]:
        """All types of the ``weights`` that passes compute with, and of those that the
        ``optimizer`` updates: the master weights under bf16."""
        updated = [p for group in self.engine.basic_optimizer.param_groups for p in group["params"]]
        if self.engine.zero_optimization_partition_weights():
            updated = self.engine.optimizer.fp32_partitioned_groups_flat
        used = self.engine.module.parameters()
        return {
            name: sorted({str(tensor.dtype) for tensor in tensors})
            for name, tensors in (("weights", used), ("optimizer", updated))
        }

    def _micro_batch(
        self,
        examples: list[Example],
        *,
        answers: int,
        parts: int,
        seed: int,
        last: bool,
        telemetry: RoutingTelemetry,
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; its share of the step's losses."""
        engine, adversarial = self.engine, self.spec.adversarial
        trades = adversarial if isinstance(adversarial, Trades) else None
        part = micro_batch(examples, engine.module.config, engine.device)
        arguments = part.arguments
        if isinstance(adversarial, ImageAdversary):
            torch.manual_seed(seed)
            arguments["pixel_values"] = self._attacked(examples, part, adversarial)
            adversarial = None  # what follows is FreeLB's
        sums = torch.zeros(1 + len(self.weighed), dtype=torch.float64, device=engine.device)
        ascents = adversarial.steps if adversarial else 1
        if adversarial:
            torch.manual_seed(seed)
            reader = engine.module
            if family(reader).encoder_decoder:
                reader = reader.get_encoder()  # whose embedding is a module of its own
            read, sequences = reader.get_input_embeddings(), part.sequences
            with torch.no_grad():
                delta = freelb.start(read(arguments["input_ids"]), sequences, adversarial)
        for ascent in range(ascents):
            torch.manual_seed(seed + 1)  # the same masks in every ascent
            engine.set_gradient_accumulation_boundary(last and ascent == ascents - 1)
            moved = freelb.added(read, delta) if adversarial else nullcontext()
            with moved as left, self.knobs.forward(part) as routings:
                out = engine(**arguments, use_cache=False)
            routings = part.without_padding(routings)
            for routing in routings if self.spec.router.capacity is not None else ():
                none = routing.weights == 0
                self.evidence.mean("router.capacity", "share_of_choices_dropped", none)
            logits = out.logits[part.answers].float()
            if trades:
                logits, attacked = logits.chunk(2)
            nll = negative_log_likelihood(out, logits, part.targets) / answers
            losses, loss = [nll], nll
            if trades:
                moved = divergence(logits, attacked) / answers
                loss = loss + trades.beta * moved
                self.evidence.mean("adversarial", "divergence", moved * answers / len(examples))
            if trades and trades.router_beta:
                turned = self._turned(routings, len(examples))
                loss = loss + trades.router_beta * turned / answers
                self.evidence.mean("adversarial", "router_divergence", turned / len(examples))
            clean = part.real_logits(self.knobs.clean)  # a witness may pass through the model again
            for knob in self.weighed:
                auxiliary = self._auxiliary(knob, routings, clean, part)
                if self.evidence.open:
                    self._witness(knob, part, routings, auxiliary)
                losses.append(auxiliary / parts)
                loss = loss + losses[-1] * getattr(self.spec, knob)
            if self.idle and self.engine.zero_optimization_stage() == 1:
                # It reduces what has a gradient, so every rank must have one of the same experts.
                loss = loss + 0 * torch.stack([p.flatten()[0] for p in self.idle]).sum()
            # ZeRO averages the workers' gradients; at stage 0 they are summed.
            share = (torch.distributed.get_world_size() if self.zero else 1) / ascents
            engine.backward(loss * share, scale_wrt_gas=False)
            telemetry.add(routings)
            sums += torch.stack([part.detach().double() for part in losses]) / ascents
            if adversarial:
                self.evidence.mean("adversarial", f"loss_share_in_ascent_{ascent + 1}", nll)
                norm, asked = (freelb.norms(each, sequences) for each in (left[0], delta))
                self.evidence.mean("adversarial", f"norm_in_ascent_{ascent + 1}", norm)
                self.evidence.mean("adversarial", freelb.LEFT, (norm / asked)[asked > 0])
                delta = freelb.climb(delta, sequences, adversarial)
        return sums

    def _attacked(
        self, examples: list[ImageExample], part: MicroBatch, recipe: ImageAdversary
    ) -> torch.Tensor:
        """What the model reads instead of the images: attacked ones, behind the clean ones where
        both count."""
        processor = examples[0].processor
        clean = processor.decode([e.image for e in examples]).to(self.engine.device)
        classifier = Classifier(self.engine.module, processor)
        images = perturbed(classifier, clean, part.targets, recipe)
        size = sizes(images - clean, recipe.norm)
        self.evidence.mean("adversarial", "size_of_the_perturbation", size)
        pixels = processor.normalised(images)
        if not isinstance(recipe, Trades):
            return pixels
        return torch.cat([part.arguments["pixel_values"], pixels])

    def _turned(self, routings: list[Routing], images: int) -> torch.Tensor:
        """How far the routers moved between clean images and, behind them, attacked ones, before
        noise that the recipe adds."""
        logits = (self.knobs.clean.get(r.layer, r.logits) for r in routings)
        return router_divergence([each.chunk(2) for each in logits], images)

    def _auxiliary(
        self, knob: str, routings: list[Routing], clean: dict[str, torch.Tensor], part: MicroBatch
    ) -> torch.Tensor:
        """The loss of a knob over one forward pass, unweighted. ``clean`` are the logits before
        noise that the recipe adds, by layer."""
        _, of = self.weighed[knob]
        if of is load_balancing_loss:
            entry = family(self.engine.module)
            if entry.balanced_by_sequence:
                return balance_by_sequence(part.by_sequence(routings), entry.scores)
            return of(routings, entry.scores)
        # The load is a probability over the noise, so its loss must know it.
        if of is load_loss:
            return of(routings, clean, self.knobs.noise)
        if of is importance_loss:
            routings = [replace(r, logits=clean.get(r.layer, r.logits)) for r in routings]
        return of(routings)

    def _witness(
        self, knob: str, part: MicroBatch, routings: list[Routing], auxiliary: torch.Tensor
    ) -> None:
        """The norm of the routers' gradient of an auxiliary loss alone, with weight 1."""
        model = self.engine.module
        trained = [p for p in self.routers if p.requires_grad]
        if not trained:
            self.evidence.note(knob, routers="frozen or adapted; the loss acts on what feeds them")
        elif self.engine.zero_optimization_partition_weights():
            # Gathering weights for a backward pass of one's own is not foreseen, so that of the
            # logits before noise stands for it, as far as they reach the loss directly.
            clean = part.real_logits(self.knobs.clean)
            free = {
                r.layer: clean.get(r.layer, r.logits).detach().requires_grad_() for r in routings
            }
            noisy = [
                replace(r, logits=free[r.layer] + (r.logits - free[r.layer]).detach().nan_to_num())
                for r in routings
            ]
            gradients = torch.autograd.grad(
                self._auxiliary(knob, noisy, free, part), list(free.values())
            )
            norm = torch.nn.utils.get_total_norm(gradients)
            self.evidence.mean(knob, "router_logit_gradient_norm", norm)
        elif family(model).encoder_decoder:
            # The encoder's states are among the engine's outputs, which allow no backward pass but
            # its own.
            with self.knobs.forward(part) as again:
                model(**part.arguments, use_cache=False)
            again = part.without_padding(again)
            clean = part.real_logits(self.knobs.clean)
            self._measure(knob, trained, self._auxiliary(knob, again, clean, part))
        else:
            self._measure(knob, trained, auxiliary)

    def _measure(
        self, knob: str, trained: list[nn.Parameter], auxiliary: torch.Tensor
    ) -> None:
        if self.turns is not None:
            waiting, self.turns.part = self.turns.part, "router"
        gradients = torch.autograd.grad(auxiliary, trained, retain_graph=True)
        if self.turns is not None:
            self.turns.part = waiting
        norm = torch.nn.utils.get_total_norm(gradients)
        self.evidence.mean(knob, "router_gradient_norm", norm)

    def _update(self, finite: bool) -> tuple[float, float]:
        """Let the optimiser step, unless something is not finite; the norm of the gradient before
        clipping and, where parts take turns, the L2 norm of the routers' change."""
        engine = self.engine
        before = self._router_weights() if self.turns is not None else None
        if self.zero:
            engine.step()  # passes over gradients that are not finite
            norm = float(engine.get_global_grad_norm())
            applied = engine.was_step_applied()
        else:
            norm = reduce_and_clip(engine.module, self.spec.gradient_clipping)
            applied = finite and math.isfinite(norm)
            engine.step() if applied else engine.zero_grad()
        if not applied:
            engine.lr_scheduler.step()  # the schedule follows the steps, not the updates
        if before is None:
            return norm, 0.0
        changes = [p - old for p, old in zip(self._router_weights(), before, strict=True)]
        return norm, torch.nn.utils.get_total_norm(changes).item()

    @torch.no_grad()
    def _router_weights(self) -> list[torch.Tensor]:
        partitioned = self.engine.zero_optimization_partition_weights()
        with GatheredParameters(self.routers, enabled=partitioned):
            return [p.clone() for p in self.routers]

    def _count_nonfinite(self, step: int, name: str, value: float) -> None:
        self.skipped += 1
        allowed = self.spec.max_nonfinite_steps
        if self.skipped >= allowed:
            before = f" after {self.skipped - 1} skipped step(s)" if allowed > 1 else ""
            raise StageFailed(
                f"step {step + 1}: the {name} is {value}{before}; lower learning_rate or "
                "gradient_clipping, or look for broken rows in the train sets"
            )


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def reduce_and_clip(model: nn.Module, largest: float | None) -> float:
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
