"""Corruptions of images, for sets out of distribution: the same images, seen worse.

The kinds are among those of ImageNet-C (arXiv 1903.12261); the strengths are this project's own,
for images of 8 x 8 to 224 x 224 pixels.
"""

import io

import numpy as np
import pyarrow as pa
from PIL import Image
from scipy.ndimage import gaussian_filter

from stages.data.images import png
from stages.data.spec import Corruption

STRENGTHS = {
    "noise": (0.04, 0.08, 0.13, 0.2, 0.3),
    "blur": (0.15, 0.2, 0.27, 0.35, 0.45),
    "contrast": (0.7, 0.5, 0.35, 0.22, 0.12),
}
"""By level, 1 to 5: standard deviation of normal noise on pixels in [0, 1]; that of a Gaussian
kernel in pixels, over the square root of the image's side (0.4 to 1.3 pixels of 8, 2.2 to 6.7 of
224); factor of every pixel's distance from the mean."""


def corrupted(table: pa.Table, corruption: Corruption, seed: int) -> pa.Table:
    """The rows with corrupted images, as PNG; ids, documents and labels stay.

    The noise of an image is drawn from the seed and its id, the same at every level.
    """
    images = [
        png(_corrupt(_pixels(image), corruption, f"{seed}/{id}"))
        for id, image in zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True)
    ]
    place = table.column_names.index("image")
    return table.set_column(place, "image", pa.array(images, pa.binary()))


def _pixels(image: bytes) -> np.ndarray:
    """In [0, 1], (H, W) for grey images and (H, W, 3) for others."""
    opened = Image.open(io.BytesIO(image))
    opened = opened if opened.mode == "L" else opened.convert("RGB")
    return np.asarray(opened, dtype=np.float64) / 255


def _corrupt(pixels: np.ndarray, corruption: Corruption, name: str) -> np.ndarray:
    strength = STRENGTHS[corruption.kind][corruption.level - 1]
    if corruption.kind == "noise":
        generator = np.random.default_rng(list(name.encode()))
        changed = pixels + strength * generator.standard_normal(pixels.shape)
    elif corruption.kind == "blur":
        sigma = strength * pixels.shape[0] ** 0.5
        changed = gaussian_filter(pixels, [sigma, sigma] + [0] * (pixels.ndim - 2))
    else:
        mean = pixels.mean(axis=(0, 1), keepdims=True)
        changed = mean + strength * (pixels - mean)
    return np.round(np.clip(changed, 0, 1) * 255).astype(np.uint8)
