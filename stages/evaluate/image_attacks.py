"""Adversarial robustness: classification of images under attacks that hold the model.

Every attack runs on every image, at several budgets, beside random noise, which all must beat. An
image counts as robust only where none of the attacks succeeds. On the way the routes of a
Mixture-of-Experts model are recorded and exchanged.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from stages.attack.image_spec import (
    APGD,
    PGD,
    AnyImageAttack,
    GradientAttack,
    Name,
    Noise,
    Norm,
    PaperPGD,
    Square,
    Surrogate,
    Transfer,
)
from stages.evaluate import hygiene
from stages.evaluate.base import Metric, Request, Response, mean_of
from stages.evaluate.examples import results
from stages.evaluate.labelled_images import LabelledImages
from stages.spec import Seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.models.images import ImageProcessor

SWAPS = {
    "clean_attacked": "clean image, attacked routes",
    "attacked_clean": "attacked image, clean routes",
}
_WHAT = {
    "clean_attacked": {"": "prediction kept", "_experts": "prediction kept, weighed anew",
                       "_correct": "accuracy"},
    "attacked_clean": {"": "accuracy", "_experts": "accuracy, weighed anew",
                       "_agrees": "prediction kept"},
}  # fmt: skip
CONTROL = "random noise"
"""Name of the noise that attacks are checked against where a sweep names none; the blank keeps it
apart from all names that a sweep can give."""
EFFORT = {
    "steps": "twice the steps",
    "restarts": "twice the restarts",
    "queries": "twice the queries",
}


class ImageAttacks(LabelledImages):
    """Accuracy under attack, at several budgets: of each attack, and the worst case of each image
    over all of them but ``paper``, whose images need not be valid.

    Every attack runs on every image. Where none of them is ``noise``, that runs as well, with its
    default queries, as the control of the others alone. On a dense model an attack that acts on the
    choice of experts runs without that, with random numbers of its own, so that both sides of a
    pair meet equally many attempts.
    """

    kind: Literal["image_attacks"] = "image_attacks"
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
    checked: Annotated[int, Field(ge=0)] = 16
    """Images on which each attack is checked: with twice the effort, and without a bound. 0 leaves
    the checks out that need further attacks."""
    seed: Seed = 0

    axis: ClassVar[str] = "adversarial"
    VERSION: ClassVar[int] = 6
    primary: ClassVar[str] = "robust_accuracy"

    @model_validator(mode="after")
    def _attacks_are_alike(self) -> "ImageAttacks":
        if len({attack.norm for attack in self.attacks.values()}) > 1:
            raise ValueError("attacks: differ in norm; make one evaluation for each norm")
        if all(attack.kind == "paper" for attack in self.attacks.values()):
            raise ValueError(
                "attacks: paper alone, which leaves the valid range, bounds nothing; add pgd"
            )
        if list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError("budgets: name each once, the smallest first")
        return self

    @property
    def shown_budgets(self) -> list[str]:
        """The budgets in units of 1/255, as they stand in names."""
        return [shown(budget) for budget in self.budgets]

    @property
    def counted(self) -> dict[str, AnyImageAttack]:
        """The attacks that the worst case is over."""
        return {n: a for n, a in self.attacks.items() if not isinstance(a, PaperPGD)}

    @property
    def tried(self) -> dict[str, AnyImageAttack]:
        """The attacks, and noise of their norm where none of them is."""
        if any(isinstance(attack, Noise) for attack in self.attacks.values()):
            return self.attacks
        return self.attacks | {CONTROL: Noise(norm=self.norm)}

    @property
    def norm(self) -> Norm:
        """That of all attacks."""
        return next(iter(self.attacks.values())).norm

    def surrogates(self) -> tuple[Surrogate, ...]:
        """The models that ``transfer`` attacks, as the sweep has them."""
        found = [a.surrogate for a in self.attacks.values() if isinstance(a, Transfer)]
        return tuple(dict.fromkeys(found))

    def with_surrogates(self, chosen: Mapping[Surrogate, str]) -> "ImageAttacks":
        """The same with other names of those models."""
        attacks = {
            name: attack.model_copy(update={"model": chosen[attack.surrogate]})
            if isinstance(attack, Transfer)
            else attack
            for name, attack in self.attacks.items()
        }
        return self.model_copy(update={"attacks": attacks})

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """One per image; the first ones are those that attacks are checked on."""
        return [
            self.procedure_request(row["id"], row | {"checked": index < self.checked})
            for index, row in enumerate(self.rows(data[self.dataset]))
        ]

    def procedure(
        self,
        model: "PreTrainedModel",
        tokenizer: "ImageProcessor",
        rows: Sequence[dict],
        surrogates: "Mapping[str, tuple[PreTrainedModel, ImageProcessor]] | None" = None,
    ) -> Iterable[dict]:
        """What each attack did to each image (``image_attacking.py``)."""
        from stages.evaluate.image_attacking import Attacker

        return Attacker(self, model, tokenizer, rows, surrogates or {}).run()

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per image. B is a budget in units of 1/255, A an attack or their control.

        ``correct``; of each attack at each budget ``robust/A/B``, ``prediction_change/A/B``,
        ``loss_rise/A/B`` (nats), ``zero_gradient/A/B`` and ``routing_change/A/B`` (1 - IoU of the
        chosen experts, mean over tokens and layers; by layer ``routing_change/A/B/LAYER``; of
        ``paper`` by that work's rule, by which a token that no expert took has changed) with
        ``experts_first_changed/A/B``, ``experts_kept/A/B`` and ``experts_none/A/B``
        (``probe/change.py``);
        ``worst/B``, the least of ``robust`` over the attacks, and ``robust``, the mean of those.

        What ``routing_change`` is to be read beside, each also by layer: ``routing_change_noise``,
        of the same image in another batch, and ``routing_change_noise_bfloat16`` in that precision;
        ``routing_change_random/B``, of a random perturbation of the same size;
        ``routing_change_chance``, of two even random choices.

        Of the worst image of each budget ``swap_clean_attacked/B``: whether the prediction for the
        clean image under its routes is the clean one, and ``swap_attacked_clean/B``: whether that
        for it under the clean image's routes is right; both with the weights that the experts had,
        or weighed anew (``…_experts/B``), and by layer, the others left free.
        ``swap_clean_attacked_correct/B`` and ``swap_attacked_clean_agrees/B`` are the other half of
        the two by two. ``check/A/B/…``: whether the attack succeeds with more effort. Everything
        about routes is NaN for a dense model.
        """
        about = self.about(data)
        rows = []
        for label, result in zip(
            about["gold"], results(about["example_id"], responses), strict=True
        ):
            row = {
                "prediction": result["prediction"],
                "answer": "",
                "domain": self.dataset,
                "correct": float(result["prediction"] == label),
                **_by_layer("routing_change_noise", result["noise"]),
                **_by_layer("routing_change_noise_bfloat16", result["noise_bfloat16"]),
                "routing_change_chance": result["chance"],
            }
            worst = dict.fromkeys(self.shown_budgets, 1.0)
            for found in result["attacks"]:
                budget = shown(found["budget"])
                row |= _attacked(found, f"{found['attack']}/{budget}")
                if found["attack"] in self.counted:
                    worst[budget] = min(worst[budget], found["robust"])
            for budget, found in result["budgets"].items():
                row |= _by_layer(f"routing_change_random/{budget}", found["random"])
                row |= _swapped(found["swaps"], budget, result["prediction"], label)
                row[f"worst/{budget}"] = worst[budget]
            row["robust"] = sum(worst.values()) / len(worst)
            for key, succeeded in result["checks"].items():
                row[f"check/{key}"] = float(succeeded)
            rows.append(row)
        return pd.concat([about, pd.DataFrame(rows)], axis=1)

    def metrics(self) -> tuple[Metric, ...]:
        """Worst case over attacks, its mean over the budgets first; clean accuracy; each attack;
        what the routes did, beside what they do anyway."""
        every = f"robust accuracy, worst of {len(self.counted)} attacks"
        lower, routes = {"higher_is_better": False}, {"of_experts": True}
        change = {**lower, **routes, "bounded": True}
        found = [
            mean_of("robust", "robust_accuracy", label=f"{every}, mean of budgets", bounded=True),
            mean_of("correct", "clean_accuracy", label="clean accuracy"),
        ]
        for b in self.shown_budgets:
            found.append(mean_of(f"worst/{b}", f"robust_accuracy_{b}", label=f"{every}, {b}/255"))
        for name in self.attacks:
            for b in self.shown_budgets:
                at, by = f"{name}/{b}", f"by {name}, {b}/255"
                found += [
                    mean_of(f"robust/{at}", f"{name}_{b}", label=f"accuracy under {by[3:]}"),
                    mean_of(f"prediction_change/{at}", label=f"predictions changed {by}", **lower),
                    mean_of(f"loss_rise/{at}", label=f"loss added {by} (nats)", **lower),
                    mean_of(f"routing_change/{at}", label=f"routing change {by}", **change),
                ]
        for b in self.shown_budgets:
            found.append(
                mean_of(
                    f"routing_change_random/{b}",
                    label=f"routing change at random, {b}/255",
                    **change,
                )
            )
            for swap, text in SWAPS.items():
                found += [
                    mean_of(f"swap_{swap}{which}/{b}", label=f"{what}: {text}, {b}/255", **routes)
                    for which, what in _WHAT[swap].items()
                ]
        baselines = {"noise": "other batch", "noise_bfloat16": "bfloat16", "chance": "chance"}
        found += [
            mean_of(f"routing_change_{name}", label=f"routing change, {text}", **change)
            for name, text in baselines.items()
        ]
        return tuple(found)

    def curves(self, scores: pd.DataFrame) -> tuple[Metric, ...]:
        """Routing change and swaps by layer, what else is told of the choice of experts, and
        success with more effort."""
        of = {"routing_change": 4, "routing_change_noise": 2, "routing_change_random": 3}
        of["routing_change_noise_bfloat16"] = 2
        of |= {f"swap_{swap}": 3 for swap in SWAPS}
        layers = [c for c in scores if (parts := c.split("/")) and len(parts) == of.get(parts[0])]
        others = [c for c in scores if c.startswith(("experts_", "check/"))]
        return (*(mean_of(c, bounded=True) for c in layers), *map(mean_of, others))

    def checks(self, scores: pd.DataFrame) -> list[dict]:
        """The hygiene report: one row per attack and check, at the budget where it comes out worst.

        ``paper`` is not asked: that it is weak is why it does not count.
        """
        asked = {n: a for n, a in self.tried.items() if not isinstance(a, PaperPGD)}
        found = [check for name in self.counted for check in self._checks_of(name, scores)]
        for stronger, strong in asked.items():
            for weaker, weak in asked.items():
                if _should_beat(strong, weak):
                    found.append(
                        hygiene.at_worst(
                            hygiene.not_weaker(
                                f"{stronger} at {b}/255", weaker, _success(scores, stronger, b),
                                _success(scores, weaker, b),
                            )
                            for b in self.shown_budgets
                        )
                    )  # fmt: skip
        return found

    def _checks_of(self, name: str, scores: pd.DataFrame) -> Iterator[dict]:
        """The checks of one attack by itself."""
        budgets = self.shown_budgets
        if isinstance(self.attacks[name], GradientAttack):
            # At the image itself, so that all budgets have the same. Where it is misclassified the
            # difference-of-logits ratio can be constant, and there is nothing to break.
            zero = scores[f"zero_gradient/{name}/{budgets[0]}"][scores["correct"] == 1]
            if len(zero):
                yield hygiene.gradients(name, zero.to_numpy())
        if len(budgets) > 1:
            yield hygiene.monotone(name, [_success(scores, name, b) for b in budgets])
        for key, words in EFFORT.items():
            columns = {b: f"check/{name}/{b}/{key}" for b in budgets}
            if columns[budgets[0]] in scores:
                yield hygiene.at_worst(
                    hygiene.more_effort(
                        f"{name} at {b}/255", words,
                        _success(scores[scores[column].notna()], name, b),
                        scores[column].dropna().to_numpy().astype(bool),
                    )
                    for b, column in columns.items()
                )  # fmt: skip
        if (column := f"check/{name}/unbounded") in scores:
            yield hygiene.unbounded(name, scores[column].dropna().to_numpy().astype(bool))


def _should_beat(strong: AnyImageAttack, weak: AnyImageAttack) -> bool:
    """Whether one attack must find, image by image, what the other does.

    It has the model's gradients and the other has none, or another model's. Or it is the plain
    attack and the other the same through, around or on the choice of experts: what that finds in
    addition, the plain one was blind to. Attacks that aim at routers as well need only beat noise.
    """
    if isinstance(strong, Square):
        return isinstance(weak, Noise)
    if not isinstance(strong, PGD | APGD):
        return False
    if isinstance(weak, Noise):
        return strong.routing != "targeted"
    if isinstance(weak, Square | Transfer):
        return strong.routing in ("as_is", "soft", "frozen")
    around = strong.routing == "as_is" != weak.routing
    return around and (strong.kind, strong.loss) == (weak.kind, weak.loss)


def _success(scores: pd.DataFrame, attack: str, budget: str) -> np.ndarray:
    """Where an attack succeeds, booleans."""
    return scores[f"robust/{attack}/{budget}"].to_numpy() == 0


def _attacked(found: dict, at: str) -> dict[str, float]:
    """The columns of one attack at one budget."""
    return {
        f"robust/{at}": found["robust"],
        f"prediction_change/{at}": found["prediction_changed"],
        f"loss_rise/{at}": found["loss"] - found["clean_loss"],
        f"zero_gradient/{at}": found["zero_gradient"],
        **_by_layer(f"routing_change/{at}", found["routing_change"]),
        **{f"{name}/{at}": value for name, value in found["choices"].items()},
    }


def _swapped(predictions: dict, budget: str, clean: str, label: str) -> dict[str, float]:
    """The columns of exchanged routes at one budget."""
    right = {"clean_attacked": clean, "attacked_clean": label}
    other = {"clean_attacked": ("correct", label), "attacked_clean": ("agrees", clean)}
    row = {f"swap_{swap}{which}/{budget}": np.nan for swap in SWAPS for which in _WHAT[swap]}
    for key, prediction in predictions.items():
        swap, what = key.split("/")
        hit = float(prediction == right[swap])
        if what == "routes":
            row[f"swap_{swap}/{budget}"] = hit
            name, target = other[swap]
            row[f"swap_{swap}_{name}/{budget}"] = float(prediction == target)
        elif what == "experts":
            row[f"swap_{swap}_experts/{budget}"] = hit
        else:
            row[f"swap_{swap}/{budget}/{what}"] = hit
    return row


def _by_layer(column: str, values: dict[str, float]) -> dict[str, float]:
    """A column with the mean over layers, and one for each."""
    each = {f"{column}/{layer}": value for layer, value in values.items()}
    return {column: float(np.mean(list(values.values()))) if values else np.nan} | each


def shown(budget: float) -> str:
    """A budget in units of 1/255, for names."""
    return f"{budget * 255:.4g}"


def variants(name: str, attack: AnyImageAttack) -> dict[str, tuple[str, AnyImageAttack]]:
    """The same attack with twice the effort, by the name of the check that it serves, and the name
    that its random numbers come from.

    None of a transfer, which more steps on the other model need not make stronger.
    """
    if isinstance(attack, Square):
        return {"queries": (name, attack.model_copy(update={"queries": 2 * attack.queries}))}
    if not isinstance(attack, PGD | APGD):
        return {}
    found = {"steps": (name, attack.model_copy(update={"steps": 2 * attack.steps}))}
    if getattr(attack, "random_start", True):
        # What it has not broken meets as many starts again.
        found["restarts"] = f"{name}/again", attack
    return found


def checked_without_bound(attack: AnyImageAttack) -> bool:
    """Whether an attack is also tried where every image is within its budget: those on the loss."""
    return isinstance(attack, Square) or (
        isinstance(attack, PGD | APGD) and attack.routing != "targeted"
    )
