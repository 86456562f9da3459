"""What an attack on images is told. Light to import: no torch.

Budgets are in units of images whose pixels lie in [0, 1]: 8/255 is eight steps of an 8-bit image.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import ConfigDict, Field, model_validator

from stages.spec import Spec

Norm = Literal["linf", "l2"]

PAPER_BUDGETS: tuple[float, ...] = (
    *(0.1275 * k / 255 for k in range(1, 7)),
    *(k / 255 for k in range(1, 21)),
)
"""The 26 budgets of arXiv 2210.10253 (its authors' code), ascending."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class ImageAttack(Spec):
    """What all attacks on images share."""

    norm: Norm = "linf"


class GradientAttack(ImageAttack):
    """What attacks that follow the gradient share."""

    loss: Literal["ce", "dlr", "margin"] = "ce"
    """Cross-entropy; the difference-of-logits ratio, for three labels or more (arXiv 2003.01690);
    or the largest other logit minus that of the label."""
    routing: Literal["as_is", "soft", "frozen", "targeted", "joint"] = "as_is"
    """How a Mixture-of-Experts model's choice of experts takes part, which has no gradient itself.

    ``soft``: forward as it is, backward as if every expert were weighed by the softmax over all
    (BPDA, arXiv 1802.00420, straight through). ``frozen``: the loss is taken with each token kept
    at the experts that it has in the clean image, weighed anew; success is judged with the model's
    own choice. ``targeted``: instead of the loss, the mean logit of experts that the clean image's
    tokens do not use, minus that of those that they do, is raised (``objectives.leaning``).
    ``joint``: the loss plus ``routing_weight`` times that. On a dense model only ``as_is`` is
    possible."""
    routing_weight: Annotated[float, Field(gt=0)] = 1.0
    """Of ``joint``, in units of the loss (nats, for cross-entropy) per unit of a router's logit.
    The larger, the more routes change and the fewer predictions: try several."""
    importance_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """The auxiliary loss is attacked as well: weight of the importance loss of the batch,
    summed over the layers."""
    gshard_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """The same of the GShard loss."""
    restarts: Annotated[int, Field(ge=1)] = 1
    """Runs from different random starts; each example keeps its best."""


class PGD(GradientAttack):
    """Projected gradient descent (arXiv 1706.06083), steps of fixed length, best iterate kept."""

    kind: Literal["pgd"] = "pgd"
    steps: Annotated[int, Field(ge=1)] = 40
    relative_step: Annotated[float, Field(gt=0)] = 2.5
    """Length of a step in units of budget / steps."""
    random_start: bool = True
    """Begin anywhere in the ball instead of at the image."""
    restarts: Annotated[int, Field(ge=1)] = 5
    """Runs from different random starts; each example keeps its best."""

    @model_validator(mode="after")
    def _restarts_differ(self) -> "PGD":
        if self.restarts > 1 and not self.random_start:
            raise ValueError("restarts without random_start are equal; set restarts to 1")
        return self


class PaperPGD(ImageAttack):
    """The attack of arXiv 2210.10253 as its authors' code has it, for comparison with it alone.

    Steps of budget / steps along the sign from the image itself: no random start, no restart, no
    clipping to [0, 1], and the last iterate counts. A pixel whose gradient changes sign on a share
    q of the steps ends at (1 - 2q) of the budget. The default attack has none of these weaknesses.
    """

    kind: Literal["paper"] = "paper"
    steps: Annotated[int, Field(ge=1)] = 40
    importance_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    gshard_loss_weight: Annotated[float, Field(ge=0)] = 0.0


class APGD(GradientAttack):
    """Auto-PGD (arXiv 2003.01690): momentum, and steps that halve where progress stalls."""

    kind: Literal["apgd"] = "apgd"
    steps: Annotated[int, Field(ge=2)] = 100
    targets: Annotated[int, Field(ge=0)] = 0
    """Aim at so many of the most probable wrong labels, one after the other, by the targeted ratio
    (``loss: dlr``; four labels or more); 0 is untargeted."""

    @model_validator(mode="after")
    def _targets_by_ratio(self) -> "APGD":
        if self.targets and self.loss != "dlr":
            raise ValueError("targets are aimed at by loss: dlr; set it, or targets to 0")
        return self


class Square(ImageAttack):
    """Square attack (arXiv 1912.00049): random search by squares, queries and no gradient."""

    kind: Literal["square"] = "square"
    queries: Annotated[int, Field(ge=1)] = 5000
    initial_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the pixels that the first squares cover."""


class Noise(ImageAttack):
    """Random points of the ball (for l2 of its surface, within [0, 1]): the control that every
    attack must beat."""

    kind: Literal["noise"] = "noise"
    queries: Annotated[int, Field(ge=1)] = 100


class Surrogate(NamedTuple):
    """The other model that a transfer attacks, of the same sweep and recipe."""

    model: str | None
    """None stands for the partner or, of another seed, for the attacked model itself."""
    other_seed: bool = False

    @property
    def role(self) -> str:
        """Its name among the inputs of an evaluation."""
        return f"{self.model}/other-seed" if self.other_seed else f"{self.model}"


class Transfer(GradientAttack):
    """Auto-PGD on another model, whose adversarial images are shown to this one."""

    model_config = ConfigDict(populate_by_name=True)

    kind: Literal["transfer"] = "transfer"
    model: Annotated[str | None, Field(alias="from")] = None
    """The other model, of the same sweep, recipe and seed; the partner of the attacked one in the
    first pair whose models both have the recipe, where nothing or the attacked model itself is
    given."""
    seed: Literal["same", "other"] = "same"
    """``other``: that model, or where none is given the attacked one, as trained with the next of
    the sweep's seeds (with the first, for the last). An untuned model has no other seed: there it
    is the same as ``same``."""
    steps: Annotated[int, Field(ge=2)] = 100

    @property
    def surrogate(self) -> Surrogate:
        """The model that is attacked."""
        return Surrogate(self.model, self.seed == "other")


AnyImageAttack = Annotated[
    PGD | PaperPGD | APGD | Square | Noise | Transfer, Field(discriminator="kind")
]
"""Every attack on images, by its ``kind``."""
