"""Evaluations of vision models: accuracy, also on shifted images, and attacks on them."""

import base64
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import pandas as pd
from pydantic import Field, model_validator

from stages.attack.image_spec import APGD, PGD, AnyImageAttack, Name, Square
from stages.data.spec import Task
from stages.evaluate.base import Evaluation, Metric, Request, Response, mean_of
from stages.evaluate.examples import difference, mean_where, qualified, results

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stages.models.images import Classifier, ImageProcessor
    from stages.models.routing import Routing


class OnImages(Evaluation):
    """What evaluations of image classifiers share."""

    split: str = "test"

    @property
    def sets(self) -> tuple[str, ...]:
        """The data sets, the clean one first."""
        raise NotImplementedError

    def datasets(self) -> dict[str, str]:
        """Every set and the split."""
        return dict.fromkeys(self.sets, self.split)

    def tasks(self) -> dict[str, Task]:
        """All hold images."""
        return dict.fromkeys(self.sets, "images")

    def rows(self, data: dict[str, pd.DataFrame]) -> pd.DataFrame:
        """The examples in order, with ``example_id``, ``document`` and ``domain``, their set."""
        parts = []
        for name in self.sets:
            frame = data[name]
            parts.append(
                frame.assign(
                    example_id=qualified(name, frame["id"]),
                    document=qualified(name, frame["document"]),
                    domain=name,
                )
            )
        return pd.concat(parts, ignore_index=True)

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One request per image."""
        return [
            self.procedure_request(
                row["example_id"],
                {
                    "id": row["example_id"],
                    "image": base64.b64encode(row["image"]).decode(),
                    "label": row["label"],
                },
            )
            for row in self.rows(data).to_dict("records")
        ]

    def scored(self, data: dict[str, pd.DataFrame], found: list[dict]) -> pd.DataFrame:
        """The columns that every evaluation has, from results with ``prediction``."""
        rows = self.rows(data)
        return pd.DataFrame(
            {
                "example_id": rows["example_id"],
                "document": rows["document"],
                "subset": rows["domain"],
                "prompt": "",
                "gold": rows["label"],
                "prediction": [result["prediction"] for result in found],
                "answer": "",
                "domain": rows["domain"],
                "correct": [
                    float(result["prediction"] == label)
                    for result, label in zip(found, rows["label"], strict=True)
                ],
            }
        )


def _loaded(
    model: "PreTrainedModel", processor: "ImageProcessor", rows: Sequence[dict]
) -> tuple["Classifier", "torch.Tensor", "torch.Tensor"]:
    """The classifier, the images (B, C, H, W) in [0, 1] and their labels (B,), on its device."""
    import torch

    from stages.models.images import Classifier

    pixels = processor.decode([base64.b64decode(row["image"]) for row in rows])
    labels = torch.tensor([processor.label(row["label"]) for row in rows])
    return Classifier(model, processor), pixels.to(model.device), labels.to(model.device)


class ImageClassification(OnImages):
    """Accuracy of an image classifier on clean images and on shifted ones."""

    kind: Literal["image_classification"] = "image_classification"
    dataset: str
    shifted: tuple[str, ...] = ()
    """Sets out of distribution, such as corruptions of the clean one."""

    axis: ClassVar[str] = "out_of_distribution"
    primary: ClassVar[str] = "accuracy"

    @model_validator(mode="after")
    def _sets_differ(self) -> "ImageClassification":
        if len(set(self.sets)) < len(self.sets):
            raise ValueError("names a data set twice; name each set once")
        return self

    @property
    def sets(self) -> tuple[str, ...]:
        """The clean set and the shifted ones."""
        return (self.dataset, *self.shifted)

    def procedure(
        self, model: "PreTrainedModel", tokenizer: "ImageProcessor", rows: Sequence[dict]
    ) -> Iterable[dict]:
        """The prediction for each image, and its loss in nats."""
        import torch

        classifier, pixels, labels = _loaded(model, tokenizer, rows)
        with torch.inference_mode():
            logits = classifier(pixels).float()
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return [
            {"prediction": tokenizer.labels[output], "loss": loss}
            for output, loss in zip(logits.argmax(1).tolist(), losses.tolist(), strict=True)
        ]

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per image: ``correct``, 0 or 1, and ``loss``."""
        found = results(self.rows(data)["example_id"], responses)
        return self.scored(data, found).assign(loss=[result["loss"] for result in found])

    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy on the clean set, on each shifted one and over them, and what is lost."""

        def accuracy(name: str, among: Sequence[str], label: str) -> Metric:
            return mean_where(
                "correct", name, "domain", among, label=label, datasets=tuple(among)
            )

        clean = accuracy("accuracy", [self.dataset], "accuracy")
        loss = mean_where(
            "loss", "loss", "domain", [self.dataset], label="cross-entropy (nats)",
            higher_is_better=False, datasets=(self.dataset,),
        )  # fmt: skip
        if not self.shifted:
            return clean, loss
        each = [accuracy(f"accuracy/{d}", [d], f"accuracy on {d}") for d in self.shifted]
        lost = difference(
            "accuracy_lost", [clean], each, higher_is_better=False,
            label="accuracy lost: clean minus mean shifted",
        )  # fmt: skip
        pooled = accuracy("shifted_accuracy", self.shifted, "accuracy shifted, pooled")
        return clean, pooled, lost, loss, *each


class ImageAttacks(OnImages):
    """Accuracy under attack, at several budgets: of each attack, and the worst case of each image
    over all of them but ``paper``, whose images need not be valid.

    Every attack runs on every image. On a dense model an attack that acts on the choice of experts
    runs without that, with random numbers of its own, so that both sides of a pair meet equally
    many attempts.
    """

    kind: Literal["image_attacks"] = "image_attacks"
    dataset: str
    budgets: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    """Largest perturbations, of images in [0, 1]; 8/255 is 0.03137."""
    attacks: Annotated[dict[Name, AnyImageAttack], Field(min_length=1)] = {
        "pgd": PGD(),
        "apgd_ce": APGD(),
        "apgd_dlr": APGD(loss="dlr"),
        "apgd_soft": APGD(routing="soft"),
        "apgd_frozen": APGD(routing="frozen"),
        "apgd_routing": APGD(routing="joint"),
        "square": Square(),
    }
    seed: int = 0

    axis: ClassVar[str] = "adversarial"
    primary: ClassVar[str] = "robust_accuracy"

    @model_validator(mode="after")
    def _attacks_are_alike(self) -> "ImageAttacks":
        if len({attack.norm for attack in self.attacks.values()}) > 1:
            raise ValueError("attacks: differ in norm; make one evaluation for each norm")
        if all(attack.kind == "paper" for attack in self.attacks.values()):
            raise ValueError(
                "attacks: paper alone, which leaves the valid range, bounds nothing; add pgd"
            )
        if any(attack.kind == "transfer" for attack in self.attacks.values()):
            raise ValueError(
                "attacks: transfer needs a second model, which an evaluation does not hold; use "
                "stages.attack.images from Python, or remove it"
            )
        if list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError("budgets: name each once, the smallest first")
        return self

    @property
    def sets(self) -> tuple[str, ...]:
        """The attacked set."""
        return (self.dataset,)

    def procedure(
        self, model: "PreTrainedModel", tokenizer: "ImageProcessor", rows: Sequence[dict]
    ) -> Iterable[dict]:
        """Per image its clean prediction and what each attack did at each budget."""
        import torch

        from stages.attack import images
        from stages.models.families import family
        from stages.models.routes import routed

        classifier, pixels, labels = _loaded(model, tokenizer, rows)
        with torch.no_grad(), routed(model) as routes:
            clean = classifier(pixels)
        ids = [row["id"] for row in rows]
        found = {id: [] for id in ids}
        for name, attack in self.attacks.items():
            if not family(model).is_moe:
                given = {f: v for f, v in _PLAIN.items() if f in type(attack).model_fields}
                attack = attack.model_copy(update=given)
            seeds = [(self.seed, zlib.crc32(name.encode()), zlib.crc32(id.encode())) for id in ids]
            for budget in self.budgets:
                outcome = images.attack_images(classifier, attack, pixels, labels, budget, seeds)
                changes = _routing_changes(classifier, outcome.images, routes)
                made = images.rows(name, attack, budget, outcome, pixels, clean, labels, ids)
                for row, change in zip(made, changes, strict=True):
                    found[row.pop("id")].append(row | {"routing_change": change})
        predictions = clean.argmax(1).tolist()
        return [
            {"prediction": tokenizer.labels[prediction], "attacks": found[id]}
            for prediction, id in zip(predictions, ids, strict=True)
        ]

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per image: ``correct``; of each attack at each budget ``robust/…``,
        ``prediction_change/…``, ``routing_change/…`` (1 - IoU of the chosen experts, mean over
        tokens and layers; NaN for a dense model) and ``zero_gradient/…``; ``worst/…`` of each
        budget, and ``robust``, the mean of those."""
        found = results(self.rows(data)["example_id"], responses)
        columns: dict[str, list[float]] = {}
        for result in found:
            worst = dict.fromkeys(self.budgets, 1.0)
            for row in result["attacks"]:
                where = f"{row['attack']}/{_shown(row['budget'])}"
                for column, value in (
                    ("robust", row["robust"]),
                    ("prediction_change", row["prediction_changed"]),
                    ("routing_change", row["routing_change"]),
                    ("zero_gradient", row["zero_gradient"]),
                ):
                    columns.setdefault(f"{column}/{where}", []).append(value)
                if row["kind"] != "paper":
                    worst[row["budget"]] = min(worst[row["budget"]], row["robust"])
            for budget, robust in worst.items():
                columns.setdefault(f"worst/{_shown(budget)}", []).append(robust)
            columns.setdefault("robust", []).append(sum(worst.values()) / len(worst))
        return self.scored(data, found).assign(**columns)

    def metrics(self) -> tuple[Metric, ...]:
        """Worst case over attacks, its mean over the budgets first; clean accuracy; each attack."""
        count = sum(attack.kind != "paper" for attack in self.attacks.values())
        every = f"robust accuracy, worst of {count} attacks"
        budgets = [_shown(budget) for budget in self.budgets]
        of = (self.dataset,)
        return (
            mean_of("robust", "robust_accuracy", label=f"{every}, mean of budgets", datasets=of),
            mean_of("correct", "clean_accuracy", label="clean accuracy", datasets=of),
            *(
                mean_of(f"worst/{b}", f"robust_accuracy_{b}", label=f"{every}, {b}/255",
                        datasets=of)
                for b in budgets
            ),
            *(
                mean_of(f"robust/{name}/{b}", f"{name}_{b}",
                        label=f"accuracy under {name}, {b}/255", datasets=of)
                for name in self.attacks for b in budgets
            ),
            *(
                mean_of(f"prediction_change/{name}/{b}", higher_is_better=False, datasets=of,
                        label=f"predictions changed by {name}, {b}/255")
                for name in self.attacks for b in budgets
            ),
            *(
                mean_of(f"routing_change/{name}/{b}", higher_is_better=False, datasets=of,
                        of_experts=True, label=f"routing change by {name}, {b}/255")
                for name in self.attacks for b in budgets
            ),
        )  # fmt: skip


def _routing_changes(
    classifier: "Classifier", images: "torch.Tensor", before: "list[Routing]"
) -> list[float]:
    """1 - IoU of the experts chosen for images and in the routes before, per image: the mean over
    its tokens and the layers; NaN for a dense model."""
    import torch

    from stages.models.routes import routed, selected
    from stages.probe.change import overlap

    with torch.no_grad(), routed(classifier.model) as after:
        classifier(images)
    if not before:
        return [float("nan")] * len(images)
    layers = [
        overlap(selected(one), selected(other)).view(len(images), -1).nanmean(1)
        for one, other in zip(before, after, strict=True)
    ]
    return (1 - torch.stack(layers).nanmean(0)).tolist()


_PLAIN = {"routing": "as_is", "importance_loss_weight": 0.0, "gshard_loss_weight": 0.0}


def _shown(budget: float) -> str:
    """A budget in units of 1/255, for names."""
    return f"{budget * 255:.4g}"
