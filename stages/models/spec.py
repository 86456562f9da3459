"""What the model stages are told: where a model comes from, or which dense model it is made of."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from stages.spec import Seed, Spec


class SourceSpec(Spec):
    """A model taken as it is, but for quantized weights, which become plain ones."""

    VERSION: ClassVar[int] = 2

    source: str
    """``pack:PACK``, ``hub:OWNER/NAME@REVISION``, ``file:FOLDER`` or ``tiny:FAMILY`` (a randomly
    initialised model of a few thousand parameters with a byte tokenizer, for tests)."""
    content: str | None = None
    """Digest of a ``file:`` or ``pack:`` source, filled in by the planner."""
    seed: Seed = 0
    """Seed of the random weights of a ``tiny:`` model."""
    labels: Annotated[int, Field(ge=2)] | Annotated[tuple[str, ...], Field(min_length=2)] | None = (
        None
    )
    """The data's labels in the order of an image classifier's outputs, in place of the names in its
    configuration; a number stands for 0, 1, …"""

    def identity(self) -> dict:
        """Without ``labels`` where none are given."""
        found = super().identity()
        if self.labels is None:
            del found["labels"]
        return found


class EveryNth(Spec):
    """The decoder layers n - 1, 2n - 1, and so on."""

    every: Annotated[int, Field(ge=2)]


class LastN(Spec):
    """The last n decoder layers."""

    last: Annotated[int, Field(ge=1)]


def _kind(layers: Any) -> str:
    if isinstance(layers, EveryNth | LastN):
        layers = layers.model_dump()
    if isinstance(layers, dict):
        return "last" if "last" in layers else "every"
    return "all" if isinstance(layers, str) else "list"


Layers = Annotated[
    Annotated[Literal["all"], Tag("all")]
    | Annotated[tuple[int, ...], Tag("list")]
    | Annotated[EveryNth, Tag("every")]
    | Annotated[LastN, Tag("last")],
    Discriminator(_kind),
]
"""Decoder layers: ``all``, a list of indices, ``{every: n}`` or ``{last: n}``."""


def indices(layers: Layers, count: int) -> tuple[int, ...]:
    """The chosen ones of ``count`` decoder layers, counted from 0."""
    if isinstance(layers, EveryNth):
        return tuple(range(layers.every - 1, count, layers.every))
    if isinstance(layers, LastN):
        return tuple(range(count))[-layers.last :]
    return tuple(range(count)) if layers == "all" else layers


def _usual_noise(given: dict[str, Any]) -> float:
    """Equal copies need something that tells them apart; everything else differs already."""
    return 0.01 if given.get("experts_from") == "copies" and not given.get("drop") else 0.0


def _usual_router(given: dict[str, Any]) -> str:
    return "centroid" if given.get("experts_from") == "clustered_split" else "random"


class UpcycleSpec(Spec):
    """A Mixture-of-Experts twin of a dense model (input role: ``dense``)."""

    experts: Annotated[int, Field(ge=2)] = 4
    top_k: Annotated[int, Field(ge=1)] = 2
    layers: Layers = "all"
    """The layers that become Mixture-of-Experts."""
    experts_from: Literal["copies", "random_split", "clustered_split"] = "copies"
    """What an expert is made of. ``copies``: each is the layer's whole feed-forward block, so a
    token passes ``top_k`` times its neurons (sparse upcycling, arXiv 2212.05055).
    ``random_split``: the neurons are dealt out at random, an equal share to each expert, and a
    token passes ``top_k / experts`` of them (LLaMA-MoE, arXiv 2406.16554).
    ``clustered_split``: neurons with similar input weights come together, by balanced k-means
    (MoEfication, arXiv 2110.01786)."""
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each copy's neurons that is drawn anew, others in each expert, with the mean and
    standard deviation of the weights that they replace (Drop-Upcycling, arXiv 2502.19261)."""
    noise: Annotated[float, Field(ge=0, default_factory=_usual_noise)]
    """Gaussian noise added to each expert's matrices, in units of the matrix's own standard
    deviation. By default 0.01 for plain copies, which would be equal, and none otherwise."""
    rescale: bool = False
    """Splits only: multiply the chosen experts' sum by ``experts / top_k`` (LLaMA-MoE, arXiv
    2406.16554), which makes up for the size of what the others would have added."""
    router: Annotated[Literal["random", "zero", "centroid"], Field(default_factory=_usual_router)]
    """Initial router, by default ``centroid`` for ``clustered_split`` and ``random`` otherwise, as
    the sources of the methods have it. ``random``: Gaussian with the model's
    ``initializer_range``. ``zero``: even weights, for ``top_k`` = ``experts`` only. ``centroid``,
    for splits: the mean input weights of an expert's neurons, so that a token goes where they match
    it (MoEfication), at a tenth of the length of random rows, so that the chosen
    experts start with nearly even weights."""
    seed: Seed = 0

    def identity(self) -> dict:
        """Also tells, of one expert per token, that V-MoE's weight of it is its own, not always 1.
        """
        found = super().identity()
        if self.top_k == 1:
            found["weight_of_one"] = "V-MoE's own"
        return found


class WidenSpec(Spec):
    """A dense twin with the activated FLOPs of an upcycled one (input role: ``dense``).

    It separates "more, or fewer, active parameters" from "routing". Where the upcycled twin
    activates more neurons than the dense model, neurons are duplicated and their down-projection
    is divided by the number of copies, which preserves the function; then the copies get the same
    noise and the same share of them is drawn anew. Where it activates fewer, the neurons of the
    smallest weights are left out.
    """

    top_k: Annotated[int, Field(ge=1)] = 2
    parts: Annotated[int, Field(ge=1)] = 1
    """Into how many experts the upcycled twin splits a feed-forward block; 1 for whole copies."""
    layers: Layers = "all"
    """The layers of the upcycled twin it is matched to; the change is spread evenly over all
    layers, so that the result stays an ordinary dense checkpoint."""
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """As in upcycling, of the neurons that have a copy."""
    noise: Annotated[float, Field(ge=0)] = 0.01
    """As in upcycling, on the neurons that have a copy."""
    seed: Seed = 0

    def added(self, neurons: int, count: int) -> int:
        """Neurons added to each feed-forward block of ``neurons``, in a model of ``count`` layers.

        Negative where the upcycled twin activates fewer than the dense model.
        """
        return round(self.extra(neurons, count) / count)

    def extra(self, neurons: int, count: int) -> int:
        """Neurons that the upcycled twin activates beyond the dense model, over all layers."""
        activated = self.top_k * (neurons // self.parts)
        return (activated - neurons) * len(indices(self.layers, count))
