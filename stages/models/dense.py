"""The dense architectures that twins can be made of, and what cannot be made: without torch.

Which Mixture-of-Experts architecture a dense one becomes is chosen by what computes the same
function. Experts that are whole copies, weighted by a softmax that sums to 1, do so in any
architecture whose attention, norms and activation are the dense model's own:

====================  ====================================  =======================================
dense                 experts in every layer                experts in some layers
====================  ====================================  =======================================
Llama, Mistral        Mixtral                               Qwen2-MoE without its attention biases
Qwen2                 Qwen2-MoE                             Qwen2-MoE
Qwen3                 Qwen3-MoE                             Qwen3-MoE
OLMo 2                FlexOlmo                              none has its norms and dense layers
GPT-NeoX (Pythia)     GPTNeoXMoe, a class of this project   the same
ViT                   V-MoE, a class of this project        the same
====================  ====================================  =======================================

No architecture of transformers has OLMo's norms without weights and experts, nor GPT-NeoX's
parallel residual, biases and ungated feed-forward blocks and experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from stages.models.spec import UpcycleSpec, WidenSpec, indices


@dataclass(frozen=True)
class Dense:
    """A dense architecture: where its feed-forward weights are, and what it becomes."""

    sparse: str
    """``model_type`` of its twin with experts in every layer."""
    mixed: str | None
    """The same with experts in some layers; None if no architecture has both."""
    block: str = "model.layers.{}.mlp"
    """Path of the feed-forward block of a layer."""
    inputs: tuple[str, ...] = ("gate_proj.weight", "up_proj.weight")
    """Parameters of the block whose rows are neurons: (F, D), or (F,) for a bias. The first one
    decides how much a neuron fires."""
    output: str = "down_proj.weight"
    """Parameter of shape (D, F): its columns are neurons."""
    output_bias: str | None = None
    """Parameter of shape (D,), which belongs to no neuron."""


DENSE = {
    "llama": Dense("mixtral", "qwen2_moe"),
    "mistral": Dense("mixtral", "qwen2_moe"),
    "qwen2": Dense("qwen2_moe", "qwen2_moe"),
    "qwen3": Dense("qwen3_moe", "qwen3_moe"),
    "olmo2": Dense("flex_olmo", None),
    "gpt_neox": Dense(
        "gpt_neox_moe",
        "gpt_neox_moe",
        block="gpt_neox.layers.{}.mlp",
        inputs=("dense_h_to_4h.weight", "dense_h_to_4h.bias"),
        output="dense_4h_to_h.weight",
        output_bias="dense_4h_to_h.bias",
    ),
    "vit": Dense(
        "vit_moe",
        "vit_moe",
        block="vit.layers.{}.mlp",
        inputs=("fc1.weight", "fc1.bias"),
        output="fc2.weight",
        output_bias="fc2.bias",
    ),
}
"""By ``model_type``."""


def becomes(spec: UpcycleSpec, model_type: str, count: int | None) -> str | None:
    """The ``model_type`` of the upcycled twin of a dense model with ``count`` layers.

    None where no architecture can be named: there is none, or the number of layers must be known.
    """
    dense = DENSE[model_type]
    if spec.layers == "all" or dense.sparse == dense.mixed:
        return dense.sparse
    if count is None:
        return None
    return dense.sparse if len(indices(spec.layers, count)) == count else dense.mixed


def refusal(spec: UpcycleSpec | WidenSpec, config: Mapping) -> str | None:
    """Why a twin cannot be made, as ``.field: reason; remedy`` or ``: reason; remedy``, or None.

    ``config`` is what is known of the dense model's ``config.json``; what it does not hold is not
    judged.
    """
    upcycle = isinstance(spec, UpcycleSpec)
    return (
        (_experts(spec) if upcycle else None)
        or _layers(spec, config.get("num_hidden_layers"))
        or _architecture(spec, config)
        or (_neurons(spec, config.get("intermediate_size")) if upcycle else None)
    )


def _experts(spec: UpcycleSpec) -> str | None:
    if spec.top_k > spec.experts:
        return f".top_k: {spec.top_k} is more than the {spec.experts} experts; lower it"
    copies = spec.experts_from == "copies"
    if copies and spec.rescale:
        return ".rescale: the weights of whole copies sum to 1 as they are; remove it"
    if copies and spec.router == "centroid":
        return ".router: copies all have the same centroid; use random"
    if not copies and spec.drop:
        return ".drop: the experts of a split share no neuron; remove it"
    if spec.router == "zero" and spec.top_k < spec.experts:
        return (
            f".router: zero sends every token to the same {spec.top_k} of {spec.experts} experts; "
            "use random, or centroid for a split"
        )
    return None


def _layers(spec: UpcycleSpec | WidenSpec, count: int | None) -> str | None:
    if isinstance(spec.layers, tuple):
        if not spec.layers:
            return ".layers: is empty; name at least one layer, or all"
        if len(set(spec.layers)) < len(spec.layers):
            return ".layers: names a layer twice; name each once"
        for layer in spec.layers:
            if layer < 0 or (count is not None and layer >= count):
                known = "0 or more" if count is None else f"0 to {count - 1}"
                return f".layers: {layer} is no layer of the dense model; use {known}"
    elif spec.layers != "all" and count is not None:
        ((name, number),) = spec.layers.model_dump().items()
        if number > count:
            return f".layers.{name}: {number} is more than the dense model's {count} layers"
    return None


def _architecture(spec: UpcycleSpec | WidenSpec, config: Mapping) -> str | None:
    name = config.get("model_type")
    if name is None:
        return None
    if name not in DENSE:
        kind = "upcycled" if isinstance(spec, UpcycleSpec) else "widened"
        known = ", ".join(DENSE)
        return f": its dense model is of the {name} architecture; only {known} can be {kind}"
    if isinstance(spec, WidenSpec):
        if name == "vit" and spec.parts > 1:
            return ": the neurons that a narrowed twin keeps are chosen on texts; use copies"
        return None
    count = config.get("num_hidden_layers")
    target = becomes(spec, name, count)
    if target is None:
        return None if count is None else (
            f".layers: no architecture has the norms of {name} and both dense and sparse layers; "
            "use all"
        )
    for field in ("attention_bias", "mlp_bias"):
        if name in ("llama", "mistral") and config.get(field):
            return f": its dense model has {field}, which {target} cannot hold; use one without"
    return _window(config, target)


def _window(config: Mapping, target: str) -> str | None:
    """Sliding windows: Mixtral has one for all layers, as Qwen3-MoE, the other twins none."""
    windows = config.get("layer_types") or []
    name, window = config["model_type"], config.get("sliding_window")
    if name == "mistral":
        windows = ["sliding_attention" if window else "full_attention"]
    elif not config.get("use_sliding_window"):
        return None
    if "sliding_attention" not in windows:
        return None
    if target == "mixtral":
        return None
    if target == "qwen3_moe" and set(windows) == {"sliding_attention"}:
        return None
    return (
        f": its dense model attends to a sliding window of {window} in some layers, which "
        f"{target} cannot do there; use one without, or layers: all for a Mistral"
    )


def _neurons(spec: UpcycleSpec, neurons: int | None) -> str | None:
    if neurons is None:
        return None
    if spec.experts_from != "copies" and neurons % spec.experts:
        return (
            f".experts: {spec.experts} does not divide the {neurons} neurons of a feed-forward "
            "block; use a divisor"
        )
    if spec.drop and not round(spec.drop * neurons):
        return f".drop: {spec.drop:g} of {neurons} neurons is none; raise it"
    return None
