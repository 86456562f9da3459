"""From encoded images to a model's input: what a tokenizer is for texts."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers import PreTrainedModel

from stages.errors import StageFailed

PREPROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class ImageProcessor:
    """Size, channels and normalisation of a vision model's input, and its labels.

    Attacks and corruptions act on images in [0, 1] of this size; ``normalised`` is what the model
    itself then reads, so a budget of 8/255 means the same for every model.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...]
    """In the order of the model's outputs."""
    tokens: int
    """Patches of an image and the class token."""

    def decode(self, images: Sequence[bytes]) -> torch.Tensor:
        """Encoded images (PNG, JPEG …), resized (bilinear, whole image) and converted to grey or
        RGB: shape (B, C, H, W), float32 in [0, 1]. Raises StageFailed for bytes that are no image.
        """
        return torch.from_numpy(np.stack([self._pixels(image) for image in images])).float() / 255

    def _pixels(self, image: bytes) -> np.ndarray:
        try:
            opened = Image.open(io.BytesIO(image)).convert("L" if self.channels == 1 else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise StageFailed(f"an image cannot be decoded: {error}; mend the data set") from error
        if opened.size != (self.size, self.size):
            opened = opened.resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = np.asarray(opened)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] as the model reads them; differentiable."""
        mean = pixels.new_tensor(self.mean)[:, None, None]
        return (pixels - mean) / pixels.new_tensor(self.std)[:, None, None]

    def label(self, name: str) -> int:
        """The output that a label of the data belongs to; raises StageFailed for an unknown one."""
        if name not in self.labels:
            raise StageFailed(
                f"label {name!r} is none of the model's ({', '.join(self.labels[:12])}"
                f"{' …' if len(self.labels) > 12 else ''}); map it with the data set's labels"
            )
        return self.labels.index(name)

    def save_pretrained(self, folder: Path) -> None:
        """Write ``preprocessor_config.json`` in Hugging Face's form."""
        content = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": int(Image.Resampling.BILINEAR),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        (folder / PREPROCESSOR_FILE).write_text(json.dumps(content, indent=1) + "\n")


def load_processor(folder: Path) -> ImageProcessor:
    """The image processor of a Hugging Face folder; raises StageFailed where there is none."""
    try:
        found = json.loads((folder / PREPROCESSOR_FILE).read_text())
        config = json.loads((folder / "config.json").read_text())
        channels = config.get("num_channels", 3)
        mean, std = (tuple(found[name]) for name in ("image_mean", "image_std"))
        if len(mean) != channels:
            raise ValueError(f"image_mean has {len(mean)} entries for {channels} channels")
        labels = tuple(config["id2label"][str(i)] for i in range(len(config["id2label"])))
        tokens = (config["image_size"] // config["patch_size"]) ** 2 + 1
        return ImageProcessor(config["image_size"], channels, mean, std, labels, tokens)
    except (OSError, KeyError, ValueError) as error:
        raise StageFailed(
            f"{folder}: cannot read {PREPROCESSOR_FILE}: {error}; write one with image_mean and "
            "image_std beside the model"
        ) from error


class Classifier(torch.nn.Module):
    """A vision model as a function of images in [0, 1].

    What attacks and evaluations hold: pixels (B, C, H, W) in, logits (B, labels) out. ``model`` is
    the Hugging Face model, whose routing ``stages.models.routing`` sees.
    """

    def __init__(self, model: PreTrainedModel, processor: ImageProcessor):
        super().__init__()
        self.model, self.processor = model, processor

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (B, labels) of images (B, C, H, W) in [0, 1]."""
        return self.model(self.processor.normalised(pixels)).logits
