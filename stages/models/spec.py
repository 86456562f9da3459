"""What the model stages are told: where a model comes from, or which dense model it is made of."""

from typing import Annotated, Literal

from pydantic import Field

from stages.spec import Spec


class SourceSpec(Spec):
    """A model taken as it is."""

    source: str
    """``pack:PACK``, ``hub:OWNER/NAME@REVISION``, ``file:FOLDER`` or ``tiny:FAMILY`` (a randomly
    initialised model of a few thousand parameters with a byte tokenizer, for tests)."""
    content: str | None = None
    """Digest of a ``file:`` or ``pack:`` source, filled in by the planner."""
    trust_remote_code: bool = False
    seed: int = 0
    """Seed of the random weights of a ``tiny:`` model."""


class UpcycleSpec(Spec):
    """A Mixture-of-Experts twin of a dense model, by sparse upcycling (arXiv 2212.05055).

    Input role: ``dense``. Every expert starts as a copy of the layer's feed-forward block.
    """

    experts: Annotated[int, Field(ge=2)] = 4
    top_k: Annotated[int, Field(ge=1)] = 2
    layers: Literal["all"] | tuple[int, ...] = "all"
    """Indices of the decoder layers that become Mixture-of-Experts."""
    noise: Annotated[float, Field(ge=0)] = 0.01
    """Gaussian noise added to each expert's matrices, in units of the matrix's own standard
    deviation; breaks the symmetry of the experts after function preservation was asserted."""
    seed: int = 0


class WidenSpec(Spec):
    """A dense twin with the activated FLOPs of an upcycled one (input role: ``dense``).

    Neurons are duplicated and their down-projection halved, which preserves the function, then the
    copied neurons get the same noise. It separates "more active parameters" from "routing".
    """

    top_k: Annotated[int, Field(ge=1)] = 2
    layers: Literal["all"] | tuple[int, ...] = "all"
    """The layers of the upcycled twin it is matched to; the added neurons are spread evenly over
    all layers, so that the result stays an ordinary dense checkpoint."""
    noise: Annotated[float, Field(ge=0)] = 0.01
    """As in upcycling, on the neurons that have a copy."""
    seed: int = 0
