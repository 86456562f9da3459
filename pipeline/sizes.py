"""Sizes of models that are made of one whose size is known, and of models trained with another
number of experts per token. Imports no torch."""

from dataclasses import replace

from stages.models.known import Known
from stages.models.spec import UpcycleSpec, WidenSpec, indices

GATED_BLOCKS = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
"""Dense families whose feed-forward block is three matrices without biases."""


def with_top_k(size: Known, top_k: int | None) -> Known:
    """The size of a model whose tokens pass another number of experts."""
    if top_k is None:
        return size
    more, read = (top_k - size.top_k) * size.flops_per_expert, size.flops_per_read_token
    # Released encoder-decoders have as many sparse layers in the one stack as in the other.
    return replace(size, flops_per_token=size.flops_per_token + more,
                   flops_per_read_token=read and read + more // 2)


def twin(spec: UpcycleSpec | WidenSpec, dense: Known) -> Known | None:
    """The size of a twin of a dense model of a gated family or of a Vision Transformer; None for
    others.

    Leaves out the one neuron of a shared expert that some architectures cannot do without.
    """
    config = dense.config
    if config.get("model_type") == "vit":
        return _vision_twin(spec, dense)
    if config.get("model_type") not in GATED_BLOCKS:
        return None
    hidden, neurons = config["hidden_size"], config["intermediate_size"]
    layers, block = config["num_hidden_layers"], 3 * hidden * neurons
    if isinstance(spec, WidenSpec):
        added = layers * 3 * hidden * spec.added(neurons, layers)
        return Known(dense.total + added, dense.active + added,
                     dense.flops_per_token + 2 * added, 4)
    sparse = len(indices(spec.layers, layers))
    router = sparse * hidden * spec.experts
    if spec.experts_from == "copies":
        held, used = (spec.experts - 1) * block, (spec.top_k - 1) * block
    else:
        held, used = 0, round(block * (spec.top_k / spec.experts - 1))
    active = sparse * used + router
    expert = block if spec.experts_from == "copies" else round(block / spec.experts)
    return Known(dense.total + sparse * held + router, dense.active + active,
                 dense.flops_per_token + 2 * active, 4,
                 top_k=spec.top_k, flops_per_expert=2 * sparse * expert)


def _vision_twin(spec: UpcycleSpec | WidenSpec, dense: Known) -> Known:
    """The same of a Vision Transformer, whose blocks are two matrices with biases; copies only."""
    hidden, neurons = dense.config["hidden_size"], dense.config["intermediate_size"]
    layers = dense.config["num_hidden_layers"]
    if isinstance(spec, WidenSpec):
        more = layers * spec.added(neurons, layers)
        return replace(dense, total=dense.total + (2 * hidden + 1) * more,
                       active=dense.active + (2 * hidden + 1) * more,
                       flops_per_token=dense.flops_per_token + 4 * hidden * more)
    sparse = len(indices(spec.layers, layers))
    router, block = sparse * hidden * spec.experts, (2 * hidden + 1) * neurons + hidden
    used = sparse * (spec.top_k - 1)
    multiplied = router + used * 2 * hidden * neurons
    return replace(dense, total=dense.total + router + sparse * (spec.experts - 1) * block,
                   active=dense.active + router + used * block, top_k=spec.top_k,
                   flops_per_expert=sparse * 4 * hidden * neurons,
                   flops_per_token=dense.flops_per_token + 2 * multiplied)
