"""What scores the next token: the model as it is, or under an inference technique.

A *predictor* gives scores of the next token at chosen positions. ``Plain`` gives the model's own
logits; the others (``stages/evaluate/techniques.py`` has their definitions and sources) run the
model, and possibly a second one, and make scores of what they see.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from stages.errors import StageFailed
from stages.evaluate.techniques import (
    Contrastive,
    DoLa,
    ExpertCount,
    candidates,
    sample_seed,
)
from stages.models.families import family
from stages.models.load import spread
from stages.models.routing import choosing

MASKED = -1000.0
"""Score of a token that a technique rules out: finite, so that sums still order the choices."""
POSITIONS = 256
"""Positions whose scores over the vocabulary are computed at once, which bounds the memory."""


class Plain:
    """The model's own logits."""

    normalised = False
    """Whether the scores are final: not logits from which a log-softmax is still to be taken."""
    contrasted: torch.Tensor | None = None
    """At the positions of the last call, the layer that was contrasted (B, N); DoLa alone."""

    def __init__(self, model: PreTrainedModel):
        self.models = [model]

    def scores(
        self, inputs: dict, where: torch.Tensor, caches: list[Cache | None] | None = None
    ) -> torch.Tensor:
        """Scores (B, N, V) of the token that follows each of the N positions ``where``.

        ``inputs`` are the model's arguments for B rows. With ``caches``, one per model and empty at
        first, they are only the new tokens.
        """
        return _forward(self.models[0], inputs, where, caches)


def _forward(
    model: PreTrainedModel,
    inputs: dict,
    where: torch.Tensor,
    caches: list[Cache | None] | None,
    place: int = 0,
) -> torch.Tensor:
    """The model's logits (B, N, V) at the positions ``where``; its cache is kept in its place."""
    if hasattr(model.config, "output_router_logits"):
        inputs = inputs | {"output_router_logits": False}  # its loss is computed from the mask
    cache = caches[place] if caches else None
    inputs = inputs | {"past_key_values": cache, "use_cache": caches is not None}
    if spread(model):
        # An index on the CPU fits hidden states on whatever device the last layer is.
        where = where.cpu()
    selects = "logits_to_keep" in inspect.signature(model.forward).parameters
    answered = model(**inputs, logits_to_keep=where) if selects else model(**inputs)
    if caches is not None:
        caches[place] = answered.past_key_values
    return answered.logits if selects else answered.logits[:, where]


class LayerContrast:
    """DoLa: the last layer's log-probabilities minus those of the most different earlier layer."""

    normalised = True

    def __init__(self, model: PreTrainedModel, technique: DoLa):
        """Raises StageFailed where the model's layers or its head are not laid out as expected."""
        self.models = [model]
        self.exits = EarlyExits(model)
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        self.layers = candidates(technique, len(self.exits.layers), tied)
        self.technique = technique
        self.normed = technique.kind == "dola"

    def scores(
        self, inputs: dict, where: torch.Tensor, caches: list[Cache | None] | None = None
    ) -> torch.Tensor:
        """See ``Plain.scores``."""
        with self.exits.recorded(self.layers, where) as hidden:
            mature = _forward(self.models[0], inputs, where, caches)
        parts, chosen = [], []
        for start in range(0, mature.shape[1], POSITIONS):
            part = slice(start, start + POSITIONS)
            last = mature[:, part].float().log_softmax(-1)
            early = [
                self.exits.logits(hidden[layer][:, part], self.normed).float().log_softmax(-1)
                for layer in self.layers
            ]
            score, place = layer_contrast(last, torch.stack(early), self.technique)
            parts.append(score)
            chosen.append(place)
        self.contrasted = torch.tensor(self.layers)[torch.cat(chosen, dim=1).cpu()]
        return torch.cat(parts, dim=1)


def layer_contrast(
    last: torch.Tensor, early: torch.Tensor, technique: DoLa
) -> tuple[torch.Tensor, torch.Tensor]:
    """DoLa's scores (..., V) and which candidate is contrasted (...), from log-probabilities of the
    last (..., V) and early (C, ..., V) layers; of equally different candidates the first."""
    divergence = jensen_shannon if technique.kind == "dola" else reversed_jensen_shannon
    chosen = divergence(last, early).argmax(0)
    index = chosen[None, ..., None].expand(1, *last.shape)
    score = last - early.gather(0, index)[0]
    if technique.relative_top:
        score = score.masked_fill(_improbable(last, technique.relative_top), MASKED)
    return score, chosen


def jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """½ KL(p‖m) + ½ KL(q‖m) with m = (p + q) / 2, of log-probabilities (..., V); in nats (...)."""
    mean = torch.logaddexp(p, q) - math.log(2)
    return (_kl(p, mean) + _kl(q, mean)) / 2


def reversed_jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """½ KL(m‖p) + ½ KL(m‖q): what DoLa's published code computes, up to the factor 1 / V."""
    mean = torch.logaddexp(p, q) - math.log(2)
    return (_kl(mean, p) + _kl(mean, q)) / 2


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) of log-probabilities, 0 · log 0 being 0."""
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


def _improbable(logprobs: torch.Tensor, share: float) -> torch.Tensor:
    """Where a token is less probable than ``share`` of the most probable one."""
    return logprobs < logprobs.amax(-1, keepdim=True) + math.log(share)


class EarlyExits:
    """The logits that a model's own final norm and head, or its head alone, would give after an
    earlier layer.

    The head is run by the model's own ``forward``, its stack of layers replaced by the hidden
    states in question, so that what an architecture does to its logits (scaling, soft caps) is
    done here as well. Raises StageFailed where the exit after the last layer is not what the model
    itself returns.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.stack, self.layers, self.norm = _stack(model)
        self._check()

    def _check(self) -> None:
        where = torch.arange(2, device=self.model.device)
        inputs = {"input_ids": where[None], "use_cache": False}
        last = len(self.layers)
        kinds = []
        hook = self.stack.register_forward_hook(lambda m, args, output: kinds.append(type(output)))
        try:
            with torch.inference_mode(), self.recorded((last,), where) as hidden:
                expected = self.model(**inputs).logits
        finally:
            hook.remove()
        self.output = kinds[0]
        with torch.inference_mode():
            found = self.logits(hidden[last])
        if not torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3):
            raise StageFailed(
                f"{self.model.config.model_type}: final norm and head do not reproduce its logits, "
                "so earlier layers cannot be read out; evaluate without dola"
            )

    @contextmanager
    def recorded(
        self, layers: tuple[int, ...], where: torch.Tensor
    ) -> Iterator[dict[int, torch.Tensor]]:
        """Hidden states (B, N, D) after the given layers at the positions ``where``, filled in by
        the forward pass that is made inside; layer 0 stands for the embeddings."""
        found: dict[int, torch.Tensor] = {}

        def record(layer: int, output: torch.Tensor | tuple) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found[layer] = hidden[:, where.to(hidden.device)]

        hooks = [
            self.layers[layer - 1].register_forward_hook(
                lambda module, args, output, layer=layer: record(layer, output)
            )
            for layer in layers
            if layer
        ]
        if 0 in layers:
            hooks.append(
                self.layers[0].register_forward_pre_hook(
                    lambda module, args, kwargs: record(
                        0, args[0] if args else kwargs["hidden_states"]
                    ),
                    with_kwargs=True,
                )
            )
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self, hidden: torch.Tensor, normed: bool = True) -> torch.Tensor:
        """Logits (B, N, V) of hidden states (B, N, D), through the final norm or without it."""
        state = self.output(last_hidden_state=self.norm(hidden) if normed else hidden)
        # An attribute of the instance hides the method of its class; a model that is spread over
        # devices has one there already.
        before = self.stack.__dict__.get("forward")
        self.stack.forward = lambda *args, **kwargs: state
        try:
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.model.device)
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            if before is None:
                del self.stack.forward
            else:
                self.stack.forward = before


def _stack(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList, nn.Module]:
    """The module that runs the layers, the layers, and the final norm."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        children = dict(module.named_children())
        for name in ("layers", "h"):
            if isinstance(children.get(name), nn.ModuleList) and len(children[name]) == count:
                norms = ("norm", "final_layer_norm", "final_layernorm", "ln_f")
                norm = next((children[n] for n in norms if n in children), None)
                if norm is not None:
                    return module, children[name], norm
    raise StageFailed(
        f"{model.config.model_type}: its layers and final norm are not found, so earlier layers "
        "cannot be read out; evaluate without dola"
    )


class ModelContrast:
    """Contrastive decoding of a model against an amateur."""

    normalised = True
    contrasted = None

    def __init__(self, model: PreTrainedModel, amateur: PreTrainedModel, technique: Contrastive):
        self.models = [model, amateur]
        self.technique = technique

    def scores(
        self, inputs: dict, where: torch.Tensor, caches: list[Cache | None] | None = None
    ) -> torch.Tensor:
        """See ``Plain.scores``."""
        expert, amateur = (
            _forward(model, inputs, where, caches, place)
            for place, model in enumerate(self.models)
        )
        # Models of one tokenizer may have differently many rows beyond its tokens.
        width = min(expert.shape[-1], amateur.shape[-1])
        parts = []
        for start in range(0, expert.shape[1], POSITIONS):
            here = slice(start, start + POSITIONS)
            both = (each[:, here, :width].float() for each in (expert, amateur))
            parts.append(model_contrast(*both, self.technique))
        return torch.cat(parts, dim=1)


def model_contrast(
    expert: torch.Tensor, amateur: torch.Tensor, technique: Contrastive
) -> torch.Tensor:
    """Log-probabilities (..., V) of contrastive decoding from both models' logits (..., V)."""
    scores = (1 + technique.beta) * expert - technique.beta * amateur
    if not technique.alpha:
        return scores.log_softmax(-1)
    improbable = _improbable(expert.log_softmax(-1), technique.alpha)
    kept = scores.masked_fill(improbable, -torch.inf).log_softmax(-1)
    return kept.masked_fill(improbable, MASKED)


Predictor = Plain | LayerContrast | ModelContrast


@contextmanager
def expert_count(model: PreTrainedModel, technique: ExpertCount) -> Iterator[None]:
    """The model with another number of experts per token, inside the context.

    Raises StageFailed for a dense model, for a number beyond its experts, for a family that has no
    number to set, and where a router goes on choosing another number.
    """
    entry = family(model)
    routers = entry.modules(model, "router") if entry.is_moe else {}
    if not routers:
        raise StageFailed(
            f"technique.top_k: {model.config.model_type} has no experts to count; evaluate a dense "
            "model without expert_count"
        )
    experts = entry.experts_of(model.config.to_dict())[0]
    if technique.top_k > experts:
        raise StageFailed(
            f"technique.top_k: {technique.top_k} is more than the {experts} experts of a layer; "
            f"give 1 to {experts}"
        )
    with choosing(model, technique.top_k):
        yield


class Sampler:
    """Draws the tokens of one answer; the same seed and request draw the same numbers anywhere."""

    def __init__(self, temperature: float, seed: int, request: str):
        self.temperature = temperature
        self.generator = torch.Generator().manual_seed(sample_seed(seed, request))

    def draw(self, logits: torch.Tensor) -> int:
        """A token drawn from logits (V,) divided by the temperature."""
        probabilities = (logits.double().cpu() / self.temperature).softmax(-1)
        drawn = torch.rand((), generator=self.generator, dtype=torch.float64)
        # Rounding may leave the last sum a little below 1.
        return min(int((probabilities.cumsum(-1) <= drawn).sum()), len(probabilities) - 1)
