"""What the twins of a dense model share: what they can be made of, the proof that they compute the
same function, and what tells their copies apart afterwards.
"""

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.errors import StageFailed
from stages.models.dense import refusal
from stages.models.images import ImageProcessor
from stages.models.spec import UpcycleSpec, WidenSpec

Probe = tuple[list[torch.Tensor], float | None]
"""Logits (1, tokens, vocabulary) of each probe text, and the mean loss over all tokens; of a vision
model its logits (images, labels) of random images, which have no loss."""
Weights = list[tuple[torch.Tensor, int]]
"""Views of a feed-forward block's weights, each with the axis on which its neurons lie; the last
one is the down-projection (D, F)."""

TOLERANCE = 1e-3
"""Largest logit difference to the dense model; rounding alone stays below 1e-4 for logits of 30."""

PROBE_IMAGES = 8
PROBE_TEXTS = (
    "The capital of France is Paris, and its river is the Seine.",
    "Question: What do plants take from the air to make sugar?\nAnswer: carbon dioxide",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "I waited two weeks for this phone. The screen is bright, the battery lasts a day and a half, "
    "but the speaker crackles at any volume above the middle, and the shop would not take it back.",
)


def require_possible(spec: UpcycleSpec | WidenSpec, config: PretrainedConfig) -> None:
    """Raise StageFailed when no such twin can be made of a dense model with this configuration."""
    problem = refusal(spec, config.to_dict())
    if problem:
        kind = "upcycle" if isinstance(spec, UpcycleSpec) else "widen"
        raise StageFailed(f"{kind}{problem}")


def probe(model: PreTrainedModel, tokenizer: Tokenizer | ImageProcessor) -> Probe:
    """What a model makes of the probe texts, or of random images."""
    if isinstance(tokenizer, ImageProcessor):
        shape = (PROBE_IMAGES, tokenizer.channels, tokenizer.size, tokenizer.size)
        pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        return [model(tokenizer.normalised(pixels)).logits], None
    logits, losses = [], []
    for text in PROBE_TEXTS:
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        logits.append(model(tokens).logits)
        losses.append(
            torch.nn.functional.cross_entropy(logits[-1][0, :-1], tokens[0, 1:], reduction="none")
        )
    return logits, torch.cat(losses).mean().item()


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest absolute difference of two models' logits on the probe texts."""
    return torch.stack([(x - y).abs().max() for x, y in zip(a, b, strict=True)]).max().item()


def require_same_function(twin: list[torch.Tensor], dense: list[torch.Tensor]) -> float:
    """The logit difference; raises StageFailed when it (or a NaN) is not below the tolerance."""
    found = difference(twin, dense)
    if not found < TOLERANCE:
        raise StageFailed(
            f"the twin's logits differ from the dense model's by {found:.3g} (allowed: "
            f"{TOLERANCE}) where it must be the same; its dense model is not of the supported kind"
        )
    return found


def add_noise(
    matrix: torch.Tensor, scale: float, generator: torch.Generator, where: torch.Tensor | int
) -> None:
    """Add Gaussian noise to a matrix in place, ``scale`` times the matrix's own std.

    ``where`` is 1 for the entries that get it and 0 for the others, in a shape that broadcasts.
    """
    std = matrix.std(correction=0).item()
    noise = torch.randn(matrix.shape, generator=generator)
    matrix.add_(noise * where, alpha=scale * std)


def draw_anew(weights: Weights, neurons: torch.Tensor, generator: torch.Generator) -> None:
    """Replace some neurons of a block in place, by draws with the mean and deviation they had.

    Drop-Upcycling, arXiv 2502.19261: the same neurons in all matrices, and one
    Gaussian per matrix, fitted to the entries that it replaces.
    """
    for tensor, axis in weights:
        old = tensor.index_select(axis, neurons)
        std, mean = torch.std_mean(old, correction=0)
        new = torch.randn(old.shape, generator=generator) * std + mean
        tensor.index_copy_(axis, neurons, new)


def break_symmetry(
    weights: Weights,
    spec: UpcycleSpec | WidenSpec,
    generator: torch.Generator,
    copied: torch.Tensor | None = None,
) -> None:
    """Draw a share of a block's neurons anew, then add noise to its matrices, as the spec says.

    Only to the neurons whose indices are in ``copied``, where it is given.
    """
    neurons = weights[-1][0].shape[1]
    if copied is None:
        copied = torch.arange(neurons)
    if spec.drop:
        order = torch.randperm(len(copied), generator=generator)
        draw_anew(weights, copied[order[: round(spec.drop * len(copied))]], generator)
    if spec.noise:
        where = torch.zeros(neurons).index_fill_(0, copied, 1)
        for tensor, axis in weights:
            if tensor.ndim == 2:
                mask = where if axis == 1 else where[:, None]
                add_noise(tensor, spec.noise, generator, mask)


def notes(dense: Probe, twin: Probe, spec: UpcycleSpec | WidenSpec) -> dict[str, float | str]:
    """The card's notes: how the copies were told apart, and what that did to logits and loss."""
    made: dict[str, float | str] = {}
    if spec.drop:
        made["drawn_anew"] = f"{spec.drop:g} of the neurons of each copy, seed {spec.seed}"
    if spec.noise:
        made["noise"] = (
            f"Gaussian, {spec.noise:g} of each matrix's own standard deviation, seed {spec.seed}"
        )
    made["logit_difference_of_twin"] = difference(twin[0], dense[0])
    if dense[1] is not None:
        made |= {"loss_of_dense": dense[1], "loss_of_twin": twin[1]}
    return made
