"""Vision models made from scratch: what the model stage is told, and what follows from it.

Light to import: no torch.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from stages.models.spec import EveryNth, Layers, indices
from stages.spec import Seed, Spec


class Size(NamedTuple):
    """Width, depth and heads of a Vision Transformer."""

    hidden: int
    depth: int
    neurons: int
    heads: int


SIZES = {
    "tiny": Size(64, 4, 256, 4),
    "S": Size(512, 8, 2048, 8),
    "B": Size(768, 12, 3072, 12),
    "B+": Size(832, 15, 3328, 13),
    "B++": Size(896, 18, 3584, 14),
    "B+++": Size(960, 21, 3840, 15),
    "L": Size(1024, 24, 4096, 16),
    "H": Size(1280, 32, 5120, 16),
}
"""The sizes of *On the Adversarial Robustness of Mixture of Experts* (arXiv 2210.10253), as in its
authors' code, whose S is not the usual ViT-S; and ``tiny``, for small images on a CPU."""


class VisionSpec(Spec):
    """A Vision Transformer, dense or with experts (V-MoE), with random weights."""

    size: str = "S"
    """A name in ``SIZES``."""
    hidden: Annotated[int, Field(ge=1)] | None = None
    """Width instead of the size's; so for ``depth``, ``neurons`` (of a feed-forward block and of
    each expert) and ``heads``."""
    depth: Annotated[int, Field(ge=1)] | None = None
    neurons: Annotated[int, Field(ge=1)] | None = None
    heads: Annotated[int, Field(ge=1)] | None = None
    patch: Annotated[int, Field(ge=1)] = 32
    """Side of a patch in pixels; divides ``image_size``."""
    image_size: Annotated[int, Field(ge=1)] = 224
    """Side of the square that every image is resized to."""
    channels: Annotated[int, Field(ge=1, le=3)] = 3
    """3 for colours, 1 for grey."""
    labels: Annotated[int, Field(ge=2)] | Annotated[tuple[str, ...], Field(min_length=2)]
    """The labels of the data in the order of the outputs, or how many: they are then 0, 1, …"""
    experts: Annotated[int, Field(ge=0)] = 0
    """Experts of a sparse layer; 0 makes a dense model."""
    top_k: Annotated[int, Field(ge=1)] = 1
    layers: Layers = EveryNth(every=2)
    """The sparse layers. V-MoE's *Every 2* is ``{every: 2}``, its *Last 2* of 8 layers ``[5, 7]``.
    """
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    """Limit of an expert's tokens in training, in units of an even share; none when absent, so that
    no image depends on the others of its batch."""
    eval_capacity_factor: Annotated[float, Field(gt=0)] | None = None
    """The same outside training."""
    group_size: Annotated[int, Field(ge=1)] | None = None
    """Images that share a capacity; all of a forward pass when absent."""
    batch_prioritized: bool = False
    """Tokens with the largest weights are served first, instead of in their order."""
    shared_start: bool = True
    """The experts of a layer start with equal weights, as in the authors' code."""
    head: Literal["linear", "dense", "soft_moe", "sparse_moe"] = "linear"
    """What makes labels of the class token: one matrix, a block of two layers, or such blocks as
    experts, all of them mixed or the best ones (arXiv 2601.15021, ``vision_heads.py``)."""
    head_neurons: Annotated[int, Field(ge=1)] | None = None
    """Hidden neurons of such a head, over all its experts, so that heads of equal neurons have
    equal parameters but for the router; as many as a feed-forward block has when absent."""
    head_experts: Annotated[int, Field(ge=2)] = 8
    head_top_k: Annotated[int, Field(ge=1)] = 2
    """Of ``sparse_moe``."""
    ensemble: Annotated[int, Field(ge=1)] = 1
    """Members whose probabilities are averaged."""
    ensemble_of: Annotated[
        Literal["experts", "models"],
        Field(default_factory=lambda given: "experts" if given.get("experts") else "models"),
    ]
    """What a member has of its own: an equal share of the experts (E³, ``vision_moe.py``; the
    default of a model with experts), or everything (a deep ensemble, ``vision_ensembles.py``)."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _parts_fit(self) -> "VisionSpec":
        if self.size not in SIZES:
            raise ValueError(f"size: there is no {self.size!r}; one of {', '.join(SIZES)}")
        if self.image_size % self.patch:
            raise ValueError(
                f"patch: {self.patch} does not divide image_size {self.image_size}; use a divisor"
            )
        shape = self.shape
        if shape.hidden % shape.heads:
            raise ValueError(
                f"heads: {shape.heads} does not divide the width {shape.hidden}; use a divisor"
            )
        if self.experts and self.top_k > self.experts:
            raise ValueError(
                f"top_k: {self.top_k} is more than the {self.experts} experts; lower it"
            )
        if self.experts and not set(self.moe_layers) & set(range(shape.depth)):
            raise ValueError(f"layers: names none of the {shape.depth} layers; mend it")
        if self.head != "linear" and self.experts:
            raise ValueError(f"head: {self.head} stands on a dense body; remove experts")
        if self.ensemble > 1 and self.head != "linear":
            raise ValueError(f"ensemble: its members have linear heads, not {self.head}; remove it")
        if self.is_partitioned:
            if not self.experts:
                raise ValueError("ensemble_of: a dense model has no experts to share; use models")
            if self.experts % self.ensemble:
                raise ValueError(
                    f"ensemble: {self.ensemble} does not divide the {self.experts} experts; use a "
                    "divisor"
                )
            if self.top_k > self.experts // self.ensemble:
                raise ValueError(
                    f"top_k: {self.top_k} is more than the {self.experts // self.ensemble} experts "
                    "of a member; lower it"
                )
        if self.has_head_experts and self.width_of_head % self.head_experts:
            raise ValueError(
                f"head_neurons: {self.width_of_head} cannot be shared equally by "
                f"{self.head_experts} experts; use a multiple"
            )
        if self.has_head_experts and self.head_top_k > self.head_experts:
            raise ValueError(
                f"head_top_k: {self.head_top_k} is more than the {self.head_experts} experts of "
                "the head; lower it"
            )
        return self

    @property
    def is_partitioned(self) -> bool:
        """Whether it is an ensemble whose members share all but the experts."""
        return self.ensemble > 1 and self.ensemble_of == "experts"

    @property
    def is_deep_ensemble(self) -> bool:
        """Whether it is an ensemble whose members share nothing."""
        return self.ensemble > 1 and self.ensemble_of == "models"

    @property
    def has_head_experts(self) -> bool:
        """Whether the head is a mixture."""
        return self.head in ("soft_moe", "sparse_moe")

    @property
    def width_of_head(self) -> int:
        """Hidden neurons of a head of two layers, over all its experts."""
        return self.head_neurons or self.shape.neurons

    @property
    def experts_of_head(self) -> tuple[int, int]:
        """Experts of the head, and those that an image passes; (1, 1) of a dense one."""
        if not self.has_head_experts:
            return 1, 1
        return self.head_experts, self.head_experts if self.head == "soft_moe" else self.head_top_k

    @property
    def shape(self) -> Size:
        """The size with what is given instead of its parts."""
        given = {name: getattr(self, name) for name in Size._fields}
        return SIZES[self.size]._replace(**{k: v for k, v in given.items() if v is not None})

    @property
    def names(self) -> tuple[str, ...]:
        """The labels in the order of the outputs."""
        if isinstance(self.labels, int):
            return tuple(map(str, range(self.labels)))
        return self.labels

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the sparse layers."""
        return indices(self.layers, self.shape.depth) if self.experts else ()

    @property
    def tokens(self) -> int:
        """Patches of an image and the class token."""
        return (self.image_size // self.patch) ** 2 + 1

    @property
    def title(self) -> str:
        """The model's name as the paper writes it."""
        if self.is_deep_ensemble:
            return f"deep ensemble of {self.ensemble}: {self._member}"
        if self.is_partitioned:
            return f"{self._member}, experts shared by {self.ensemble} members"
        return self._member

    @property
    def _member(self) -> str:
        if self.head != "linear":
            experts, top_k = self.experts_of_head
            mixed = f", E={experts}, K={top_k}" if self.has_head_experts else ""
            head = self.head.replace("_moe", "-MoE")
            return f"ViT-{self.size}/{self.patch}, {head} head of {self.width_of_head}{mixed}"
        if not self.experts:
            return f"ViT-{self.size}/{self.patch}"
        layers = ", ".join(map(str, self.moe_layers))
        return (
            f"V-MoE-{self.size}/{self.patch}, E={self.experts}, K={self.top_k}, layers {layers}"
        )

    def counts(self) -> tuple[int, int, int]:
        """Parameters, those that one token uses, and operations of a token, as on the card."""
        shape, sparse = self.shape, len(self.moe_layers)
        width, depth = shape.hidden, shape.depth
        pixels = self.patch**2 * self.channels
        matrices = 4 * width * width, 2 * width * shape.neurons
        biases = 4 * width, shape.neurons + width
        embedding = (self.tokens + 2 + pixels) * width
        head, active_head = self._head_counts()
        rest = embedding + 2 * width
        each = sum(matrices) + sum(biases) + 4 * width
        router = self.experts * width
        block = matrices[1] + biases[1]
        members = self._members
        tiled = depth - min(self.moe_layers) if sparse else 0
        total = rest + head + depth * each + sparse * (router + (self.experts - 1) * block)
        active = rest + active_head + depth * each + sparse * (
            router + (members * self.top_k - 1) * block
        )
        multiplied = pixels * width + (depth + (members - 1) * tiled) * sum(matrices)
        multiplied += members * sparse * (router + (self.top_k - 1) * matrices[1])
        models = self._models
        return models * total, models * active, models * 2 * multiplied

    @property
    def flops_per_expert(self) -> int:
        """Operations of a token in one routed expert of each sparse layer, as on the card."""
        matrices = 2 * self.shape.hidden * self.shape.neurons
        return self._models * self._members * len(self.moe_layers) * 2 * matrices

    @property
    def _models(self) -> int:
        return self.ensemble if self.is_deep_ensemble else 1

    @property
    def _members(self) -> int:
        """Those of a partitioned ensemble, which pass what lies behind the first sparse layer
        one by one."""
        return self.ensemble if self.is_partitioned else 1

    def _head_counts(self) -> tuple[int, int]:
        """Parameters of the head, and those that an image uses."""
        width, labels = self.shape.hidden, len(self.names)
        if self.head == "linear":
            return ((width + 1) * labels,) * 2
        experts, top_k = self.experts_of_head
        neurons = self.width_of_head // experts
        expert = (width + 1) * neurons + (neurons + 1) * labels
        router = experts * width if self.has_head_experts else 0
        return router + experts * expert, router + top_k * expert
