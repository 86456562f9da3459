"""What the twins of a dense model share: what they can be made of, the proof that they compute the
same function, and the noise that tells their copies apart afterwards.
"""


import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.errors import StageFailed

TOLERANCE = 1e-3
"""Largest logit difference to the dense model; rounding alone stays below 1e-4 for logits of 30."""

PROBE_TEXTS = (
    "The capital of France is Paris, and its river is the Seine.",
    "Question: What do plants take from the air to make sugar?\nAnswer: carbon dioxide",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "I waited two weeks for this phone. The screen is bright, the battery lasts a day and a half, "
    "but the speaker crackles at any volume above the middle, and the shop would not take it back.",
)


def require_llama_like(dense: PreTrainedModel) -> None:
    """Raise StageFailed unless the model is a Llama: pre-norm RMSNorm, rotary positions, gated
    feed-forward, no biases, no norms on queries and keys, full attention.
    """
    config = dense.config
    # OLMo and Cohere have the same weights as a Llama and other norms, so the type is asked too.
    reason = None
    if config.model_type not in ("llama", "mistral"):
        reason = f"is of type {config.model_type}"
    elif biases := [name for name, _ in dense.named_parameters() if name.endswith(".bias")]:
        reason = f"has biases ({biases[0]})"
    elif getattr(config, "sliding_window", None) is not None:
        reason = f"attends to a sliding window of {config.sliding_window}"
    if reason:
        raise StageFailed(
            f"the dense model {reason}; twins are made of Llama-like models only (llama, or "
            "mistral without sliding window)"
        )


def probe(model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[list[torch.Tensor], float]:
    """Logits (1, tokens, vocabulary) of each probe text, and the mean loss over all tokens."""
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
            f"{TOLERANCE}) before any noise; its dense model is not of the supported kind"
        )
    return found


def add_noise(
    matrix: torch.Tensor, scale: float, generator: torch.Generator, where: torch.Tensor | int = 1
) -> None:
    """Add Gaussian noise to a matrix in place, ``scale`` times the matrix's own std.

    ``where`` is 1 for the entries that get it and 0 for the others, in a shape that broadcasts.
    """
    std = matrix.std(correction=0).item()
    noise = torch.randn(matrix.shape, generator=generator)
    matrix.add_(noise * where, alpha=scale * std)


def noise_notes(
    before: float,
    dense: tuple[list[torch.Tensor], float],
    twin: tuple[list[torch.Tensor], float],
    scale: float,
    seed: int,
) -> dict[str, float | str]:
    """The card's notes: logit difference before and after the noise, loss of both models."""
    return {
        "logit_difference": before,
        "noise": f"Gaussian, {scale:g} of each matrix's own standard deviation, seed {seed}",
        "logit_difference_after_noise": difference(twin[0], dense[0]),
        "loss_of_dense": dense[1],
        "loss_after_noise": twin[1],
    }
