"""What can be said of an architecture: where its parts are and how its router works.

Light to import: neither torch nor transformers is needed to describe a configuration.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stages.models.sparse_layers import every_layer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Role = Literal[
    "router", "expert", "shared_expert", "shared_expert_gate", "embedding", "head", "backbone"
]
"""``expert`` is a routed expert. A head tied to the embedding has no parameters of its own.
``backbone`` is everything else: attention, norms, dense feed-forward blocks."""


@dataclass(frozen=True)
class Family:
    """One architecture. The fields about experts are empty for a dense one.

    A router is a module whose forward returns a tuple: at ``logits`` the raw scores (T, experts)
    before any softmax, at ``weights`` (T, K) and ``index`` (T, K) the chosen experts of each token
    and the weight of each. The experts' module is called as
    ``experts(hidden_states (T, D), index (T, K), weights (T, K))``, with and without expert
    parallelism, and returns the weighted sum (T, D). Families that do otherwise say so.
    """

    model_type: str
    router: str = ""
    """Module whose parameters score the experts; several paths are separated by spaces."""
    experts: str = ""
    """Module that holds all routed experts of a layer; the first axis of its fused parameters, or
    the index of its children, is the expert."""
    routed_sum: str = ""
    """Method that adds up the weighted outputs of a layer's routed experts by ``index_add``, where
    the experts' module does not return that sum; several paths are separated by spaces."""
    residual: str = ""
    """Modules whose outputs a layer adds to its residual stream as they are, or times a constant:
    two of each layer, its attention (or what stands in its place) and its feed-forward block. Empty
    where a norm or another weight stands between, or a layer is built otherwise."""
    shared_expert: str = ""
    """Feed-forward block that every token of a sparse layer passes."""
    shared_expert_gate: str = ""
    """Module that scales the shared expert's output per token."""
    num_experts: str = "num_experts"
    """Configuration attribute: routed experts of a sparse layer."""
    top_k: str | int = "num_experts_per_tok"
    """Configuration attribute: experts that one token passes; a number where it is fixed."""
    layer_counts: tuple[str, ...] = ("num_hidden_layers",)
    """Configuration attributes that count the layers together."""
    sparse_layers: Callable[[Mapping], tuple[int, ...]] = lambda config: ()
    """Indices of the sparse layers, from the content of ``config.json``."""
    scores: Literal["softmax", "softmax of the chosen", "sigmoid", "sparsemixer"] = "softmax"
    """How the raw scores become weights."""
    normalised: bool | str = True
    """Whether the weights of the chosen experts are made to sum to 1 (before any scaling factor),
    or the configuration attribute that says so."""
    logits: int = 0
    """Place of the raw scores in what the router returns."""
    weights: int | None = 1
    """Place of the chosen experts' weights; None where they cannot be read off."""
    index: int | None = 2
    """Place of the chosen experts' numbers; None where they cannot be read off."""
    router_decides_top_k: bool = False
    """The routers' attribute ``top_k`` is all that the number of experts per token depends on,
    although their choice cannot be read off: training and evaluation may set it."""
    choice_bias: str = ""
    """Parameters or buffers that are added to the router's scores for the choice alone."""
    no_gradient: str = ""
    """Other parameters that no gradient reaches, so that recipes never train them (nor let weight
    decay move them): indexers that select what attention reads, and weights that are carried along
    unused."""
    auxiliary_loss: tuple[str, ...] = ()
    """What ``forward(output_router_logits=True)`` calls the load-balancing loss, unweighted, or its
    parts, whose sum it is; empty where it returns none."""
    balanced_by_sequence: bool = False
    """That loss is the mean over a batch's sequences of each one's, not one over all tokens."""
    jitter: str = ""
    """Attributes of modules with the width of the noise by which the architecture itself multiplies
    what its routers (in some also its experts) read in training; several paths are separated by
    spaces."""
    capacity: bool = False
    """Experts drop tokens beyond a capacity, so that a token's output depends on the tokens that
    share its batch: sequences must not be packed together."""
    recurrent: bool = False
    """Some layers carry a state from token to token that no attention mask cuts: sequences must not
    be packed together."""
    factors: tuple[str, ...] = ()
    """Buffers that hidden states are multiplied with: they have the weights' type, as transformers
    loads them, while DeepSpeed casts the weights alone."""
    attention_dropout: bool = True
    """The probability of the attention modules' own dropout can be set."""
    masks_by_position: bool = True
    """Attention keeps sequences of one row apart by positions that start again at 0."""
    modality: Literal["text", "image"] = "text"
    """What it reads: tokens, or pixels (B, C, H, W) of which it makes patches."""
    head: str = ""
    """Module whose outputs are the labels; where empty, what the model calls its output embedding.
    """
    embedding: str = ""
    """Module that embeds the input; where empty, what the model calls its input embedding."""
    read: str = ""
    """Of an encoder-decoder, the modules that the prompt's tokens pass: the encoder, and what makes
    keys and values of its states for the decoder. Empty for others."""
    no_evaluation: str = ""
    """Why evaluation is refused; empty where it is exact."""
    no_training: str = ""
    """Why training is refused; empty where it is exact."""
    no_expert_parallel: str = ""
    """Why expert parallelism is refused; empty where it is exact."""
    no_export: str = ""
    """Why other programs cannot load a checkpoint of it."""
    no_vllm: str = ""
    """Why vLLM, which other checkpoints can be given to, cannot generate with it."""

    @property
    def encoder_decoder(self) -> bool:
        """Whether the prompt goes through an encoder, the answer through a decoder that attends to
        it; layers are counted through both, the encoder's first."""
        return bool(self.read)

    @property
    def is_moe(self) -> bool:
        """Whether the architecture has routed experts."""
        return bool(self.router)

    def experts_of(self, config: Mapping) -> tuple[int | None, int | None]:
        """Routed experts of a sparse layer and those that one token passes, from the content of
        ``config.json``; None where it leaves them to the architecture's default."""
        if not self.is_moe:
            return 0, 0
        chosen = self.top_k if isinstance(self.top_k, int) else config.get(self.top_k)
        # transformers reads the count of experts under a second name and may write that.
        names = (self.num_experts, "num_experts", "num_local_experts")
        return next((config[name] for name in names if name in config), None), chosen

    def layers_of(self, config: Mapping) -> int | None:
        """The number of layers, from the content of ``config.json``; None where it leaves that to
        the architecture's default."""
        counts = [config.get(name) for name in self.layer_counts]
        return None if None in counts else sum(counts)

    @property
    def packs(self) -> bool:
        """Whether sequences may stand one after the other in a row without padding, kept apart by
        their positions alone."""
        texts = self.modality == "text" and self.masks_by_position
        return texts and not (self.capacity or self.recurrent or self.encoder_decoder)

    @property
    def chooses_largest(self) -> bool:
        """Whether a choice of experts that cannot be seen is known all the same: those with the
        largest logits, with no capacity that drops some."""
        return self.index is None and not self.capacity

    @property
    def counts_experts(self) -> bool:
        """Whether evaluation may set the experts per token (``decoding.expert_count``)."""
        return self.is_moe and (self.router_decides_top_k or not self.no_weighing)

    @property
    def no_weighing(self) -> str:
        """Why it cannot be told how experts would be weighed that the router did not choose; empty
        where it can (``routing.weighing``)."""
        if self.index is None:
            return "chooses its experts inside its blocks"
        return "weighs experts by a rule of its own" if self.scores == "sparsemixer" else ""

    def modules(
        self, model: "PreTrainedModel", role: Role | Literal["read"]
    ) -> dict[str, "nn.Module"]:
        """The modules of a role, or of ``read``, by their path, in the order of the layers.

        The same paths before and after ``expert_parallel.convert``.
        """
        pattern = _pattern(getattr(self, "experts" if role == "expert" else role))
        # The root module's path is empty, like the path of a part that the family lacks.
        return {name: m for name, m in model.named_modules() if name and pattern.fullmatch(name)}

    def routed_sums(self, model: "PreTrainedModel") -> "list[tuple[nn.Module, str]]":
        """The methods of ``routed_sum``: the module of each, in the order of the layers, and its
        name."""
        return _attributes(model, self.routed_sum)

    def own_jitter(self, model: "PreTrainedModel") -> "list[tuple[nn.Module, str]]":
        """The attributes of ``jitter``: the module of each, in the order of the layers, and its
        name."""
        return _attributes(model, self.jitter)

    def residual_blocks(self, model: "PreTrainedModel") -> list[str]:
        """The paths of the modules of ``residual``, those of a layer side by side."""
        pattern = _pattern(self.residual)
        return [path for path, _ in model.named_modules() if path and pattern.fullmatch(path)]

    def biases_choice(self, name: str) -> bool:
        """Whether a parameter or buffer of this name moves the choice of experts alone."""
        return _pattern(self.choice_bias).fullmatch(name) is not None

    def has_no_gradient(self, parameter: str) -> bool:
        """Whether a parameter of this name is one that no gradient reaches."""
        unused = _pattern(self.no_gradient).fullmatch(parameter) is not None
        return unused or self.biases_choice(parameter)


def decoder(
    model_type: str,
    *,
    block: str = "mlp",
    mixers: tuple[str, ...] = ("self_attn",),
    router: str = "gate",
    shared: str = "",
    shared_gate: str = "",
    sparse_layers: Callable[[Mapping], tuple[int, ...]] = every_layer,
    **fields,
) -> Family:
    """A decoder of transformers, whose sparse blocks hold a router and ``experts``.

    ``mixers`` are the names that attention, or what stands in its place, has in a layer; none where
    it is not plainly added to the residual stream.
    """
    path = f"model.layers.*.{block}."
    added = (*mixers, block) if mixers else ()
    return Family(
        model_type,
        router=path + router,
        experts=path + "experts",
        residual=" ".join(f"model.layers.*.{name}" for name in added),
        shared_expert=shared and f"model.layers.*.{shared}",
        shared_expert_gate=shared_gate and f"model.layers.*.{shared_gate}",
        sparse_layers=sparse_layers,
        **fields,
    )


def _attributes(model: "PreTrainedModel", paths: str) -> "list[tuple[nn.Module, str]]":
    """Modules, in the order of the layers, and the name of an attribute of each."""
    split = [path.rpartition(".") for path in paths.split()]
    return [
        (module, name)
        for path, module in model.named_modules()
        for owner, _, name in split
        if _pattern(owner).fullmatch(path)
    ]


def _pattern(paths: str) -> re.Pattern:
    """One or the other of the paths, where ``*`` stands for one component."""
    return re.compile("|".join(re.escape(p).replace(r"\*", r"[^.]+") for p in paths.split()))
