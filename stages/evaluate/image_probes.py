"""Probes of image classifiers: the measures of ``probes.py``, taken on images."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from stages.evaluate.labelled_images import LabelledImages
from stages.evaluate.probes import GEOMETRY, Geometry, Interventions, Lipschitz
from stages.spec import Seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.models.images import ImageProcessor


class ImageInterventions(Interventions, LabelledImages):
    """Interventions while images are classified.

    The images that usage is counted on travel with every request; take few of them.
    """

    VERSION: ClassVar[int] = 3

    kind: Literal["image_interventions"] = "image_interventions"
    budget: Annotated[float, Field(ge=0)] = 0.0
    """Above 0 every image in [0, 1] is attacked first (``pgd``, l-infinity, one start), and all is
    asked about the attacked ones."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Of that attack."""
    seed: Seed = 0

    def procedure(
        self, model: "PreTrainedModel", tokenizer: "ImageProcessor", rows: Sequence[dict]
    ) -> Iterable[dict]:
        """The predictions under each intervention (``image_probing.py``)."""
        from stages.evaluate.image_probing import ImageIntervenor

        return ImageIntervenor(self, model, tokenizer, rows).run()


class ImageGeometry(Geometry, LabelledImages):
    """Geometry at the tokens of images: the patches and the class token. A token that an expert
    had no room for (``dropped``, their share) is left out of what hangs on its choice."""

    VERSION: ClassVar[int] = 4
    quantities: ClassVar[dict[str, str]] = GEOMETRY | {
        "dropped": "tokens that an expert had no room for"
    }

    kind: Literal["image_geometry"] = "image_geometry"
    budget: Annotated[float, Field(gt=0)] = 0.03
    """Of an l-infinity attack (``pgd``, one start) whose loss rise the routing term is correlated
    with, of images in [0, 1]."""
    steps: Annotated[int, Field(ge=1)] = 20
    seed: Seed = 0

    def procedure(
        self, model: "PreTrainedModel", tokenizer: "ImageProcessor", rows: Sequence[dict]
    ) -> Iterable[dict]:
        """Means by layer (``image_probing.py``)."""
        from stages.evaluate.image_probing import ImageSurveyor

        return ImageSurveyor(self, model, tokenizer, rows).run()


class ImageLipschitz(Lipschitz, LabelledImages):
    """Slopes of the logits over the pixels of an image, within [0, 1]."""

    VERSION: ClassVar[int] = 5

    kind: Literal["image_lipschitz"] = "image_lipschitz"
    radius: Annotated[float, Field(gt=0)] = 0.5
    """Of the l2 ball around an image in [0, 1]."""
    seed: Seed = 0

    def procedure(
        self, model: "PreTrainedModel", tokenizer: "ImageProcessor", rows: Sequence[dict]
    ) -> Iterable[dict]:
        """Slopes around each image (``image_probing.py``)."""
        from stages.evaluate.image_probing import ImageClimber

        return ImageClimber(self, model, tokenizer, rows).run()
