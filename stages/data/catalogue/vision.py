"""Images: CIFAR-10, CIFAR-100 and ImageNet, as the hub has them (Parquet files of encoded images).

Nothing here could be downloaded when it was written, so revisions are branches and the counts are
those of the publications.
"""

from stages.data.published import Form, Hub, Published, Split

_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _same(count: int) -> dict[str, str]:
    return {str(label): str(label) for label in range(count)}


SETS: dict[str, Published] = {
    "cifar10": Published(
        task="images",
        title="CIFAR-10: 32 x 32 colour images of ten kinds",
        citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
        licence="not stated by the authors",
        splits={
            "test": Split(("plain_text/test-*.parquet",), rows=10_000),
            "train": Split(("plain_text/train-*.parquet",), rows=50_000),
        },
        forms=(
            Form({"image": "img", "label": "label"}, {str(i): n for i, n in enumerate(_CIFAR)}),
        ),
        hub=Hub("uoft-cs/cifar10", "main"),
        files="a Parquet file with img and label",
        labels=_CIFAR,
    ),
    "cifar100": Published(
        task="images",
        title="CIFAR-100: 32 x 32 colour images of a hundred kinds, labels 0 to 99",
        citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
        licence="not stated by the authors",
        splits={
            "test": Split(("cifar100/test-*.parquet",), rows=10_000),
            "train": Split(("cifar100/train-*.parquet",), rows=50_000),
        },
        forms=(Form({"image": "img", "label": "fine_label"}, _same(100)),),
        hub=Hub("uoft-cs/cifar100", "main"),
        files="a Parquet file with img and fine_label",
        labels=tuple(_same(100)),
    ),
    "imagenet": Published(
        task="images",
        title="ImageNet (ILSVRC 2012), labels 0 to 999",
        citation="Russakovsky et al. 2015, arXiv:1409.0575",
        licence="ImageNet's terms of access: research only",
        splits={
            "validation": Split(("data/validation-*.parquet",), rows=50_000),
            "train": Split(("data/train-*.parquet",), rows=1_281_167),
        },
        forms=(Form({"image": "image", "label": "label"}, _same(1000), unlabelled=("-1",)),),
        hub=Hub("ILSVRC/imagenet-1k", "main"),
        gated="accept the terms on the hub's page of ILSVRC/imagenet-1k and set HF_TOKEN",
        files="a Parquet file with image and label",
        labels=tuple(_same(1000)),
    ),
}
