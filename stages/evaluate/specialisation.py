"""Expert specialisation: does an expert serve one kind of token, one kind of example?

Each example leaves the table of its chosen experts against a feature. Tables add up, so every
number and its interval are functions of sums over examples.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd

from stages.evaluate.base import Evaluation, Metric, Response
from stages.evaluate.examples import results
from stages.evaluate.labelled_images import LabelledImages
from stages.evaluate.labelled_texts import LabelledTexts
from stages.probe.specialisation import information, purity
from stages.spec import Seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.models.images import ImageProcessor

TOKEN_CLASSES = ("word", "word_part", "digits", "punctuation", "other")
"""What part of a text a token is: letters that begin a word, letters within one, digits, signs that
are neither letters nor digits, and all else (mixtures, blanks)."""
Tables = Callable[[pd.DataFrame], np.ndarray]
"""Scores of n examples to their tables (n, L, E, F), L sparse layers."""


def token_class(text: str, begin: int, end: int) -> int:
    """The place in ``TOKEN_CLASSES`` of a token that stands for ``text[begin:end]``."""
    piece = text[begin:end].strip()
    if piece.isdigit():
        return TOKEN_CLASSES.index("digits")
    if piece.isalpha():
        first = begin + text[begin:end].index(piece)
        inside = first > 0 and text[first - 1].isalpha()
        return TOKEN_CLASSES.index("word_part" if inside else "word")
    signs = piece and not any(c.isalnum() for c in piece)
    return TOKEN_CLASSES.index("punctuation" if signs else "other")


class Specialisation(Evaluation):
    """Scores and metrics, whatever the examples are.

    A procedure's result holds ``prediction`` and, by layer, ``used``: how many of the example's
    tokens chose each expert.
    """

    seed: Seed = 0
    """Of the permutations."""

    axis: ClassVar[str] = "adversarial"
    primary: ClassVar[str] = "specialisation"
    FEATURES: ClassVar[dict[str, str]]
    """Features and what they are called in tables; the first one's is the primary metric."""

    def labelled(self, scores: pd.DataFrame, found: Sequence[dict]) -> pd.DataFrame:
        """The scores with ``used/LAYER`` (a list, by expert) and ``permuted_gold``, the labels
        dealt out anew."""
        layers = list(found[0]["used"]) if found else []
        drawn = np.random.default_rng(self.seed).permutation(len(scores))
        columns = {f"used/{layer}": [result["used"][layer] for result in found] for layer in layers}
        gold = scores["gold"].to_numpy()[drawn]
        return scores.assign(permuted_gold=gold, **columns)

    def _label_tables(self, column: str) -> Tables:
        """Experts against the example's label, its own or a permuted one."""

        def tables(scores: pd.DataFrame) -> np.ndarray:
            used = _stacked(scores, "used/")
            labels = sorted(scores["gold"].unique())
            here = scores[column].to_numpy()[:, None] == np.array(labels, dtype=object)
            return used[..., None] * here[:, None, None]

        return tables

    def tables(self, feature: str) -> tuple[Tables, Tables]:
        """The tables of a feature, and of the same with its values permuted."""
        return self._label_tables("gold"), self._label_tables("permuted_gold")

    def metrics(self) -> tuple[Metric, ...]:
        """The mean over layers of the share of a feature's entropy that experts tell, beyond that
        of the permuted feature; both shares, and the experts' purity, of each feature.

        Shares and purity are too large in small tables, and more so in their resamples, whose
        interval can lie above them: only what is beyond the permuted feature is to be read alone.
        """
        found = []
        for number, (feature, title) in enumerate(self.FEATURES.items()):
            own, permuted = self.tables(feature)
            beyond = _metric(
                f"specialisation_{feature}" if number else self.primary,
                lambda t: information(t[..., 0, :, :, :]) - information(t[..., 1, :, :, :]),
                f"experts tell of {title}, beyond chance", own, permuted,
            )  # fmt: skip
            found.append(beyond)
            for name, measure, of, words in (
                ("information", information, own, "experts tell of"),
                ("information_permuted", information, permuted, "experts tell of permuted"),
                ("purity", purity, own, "purity of experts by"),
                ("purity_permuted", purity, permuted, "purity of experts by permuted"),
            ):
                found.append(_metric(
                    f"{name}_{feature}",
                    lambda t, measure=measure: measure(t[..., 0, :, :, :]),
                    f"{words} {title}", of,
                ))  # fmt: skip
        return tuple(found)

    def curves(self, scores: pd.DataFrame) -> tuple[Metric, ...]:
        """By layer, what experts tell, and how pure each of them is."""
        layers = [c.removeprefix("used/") for c in scores if c.startswith("used/")]
        found = []
        for feature in self.FEATURES:
            own, permuted = self.tables(feature)
            for place, layer in enumerate(layers):
                for name, of in (("information", own), ("information_permuted", permuted)):
                    found.append(_one(f"{name}/{feature}/{layer}", of, place, None, information))
                experts = len(scores[f"used/{layer}"].iloc[0])
                found += [
                    _one(f"purity/{feature}/{layer}/{expert}", own, place, expert, purity)
                    for expert in range(experts)
                ]
        return tuple(found)


def _stacked(scores: pd.DataFrame, prefix: str) -> np.ndarray:
    """List columns of that prefix, one a layer, (n, L, …)."""
    columns = [column for column in scores if column.startswith(prefix)]
    return np.stack([np.array(scores[column].tolist(), dtype=float) for column in columns], axis=1)


def _metric(
    name: str, value: Callable[[np.ndarray], np.ndarray], label: str, *parts: Tables
) -> Metric:
    """The mean over layers of a value of sums of tables, (…, parts, L, E, F) to (…, L)."""
    shape: list[tuple[int, ...]] = []  # known once the scores are; sums come after them

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        tables = np.stack([part(scores) for part in parts], axis=1)
        shape[:] = [tables.shape[1:]]
        return tables.reshape(len(scores), -1)

    def of_sums(sums: np.ndarray) -> np.ndarray:
        return value(sums.reshape(*sums.shape[:-1], *shape[0])).mean(axis=-1)

    return Metric(name, statistics, of_sums, label=label, of_experts=True)


def _one(
    name: str, tables: Tables, layer: int, expert: int | None, value: Callable
) -> Metric:
    """The same of one layer, or of one of its experts."""
    experts = slice(None) if expert is None else slice(expert, expert + 1)
    shape: list[tuple[int, ...]] = []

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        part = tables(scores)[:, layer, experts]
        shape[:] = [part.shape[1:]]
        return part.reshape(len(scores), -1)

    def of_sums(sums: np.ndarray) -> np.ndarray:
        return value(sums.reshape(*sums.shape[:-1], *shape[0]))

    return Metric(name, statistics, of_sums, of_experts=True)


class ExpertSpecialisation(Specialisation, LabelledTexts):
    """Of a text's tokens, whether an expert is chosen for one class of them (``TOKEN_CLASSES``) or
    for the texts of one label. The template around the text does not count."""

    kind: Literal["expert_specialisation"] = "expert_specialisation"

    FEATURES: ClassVar[dict[str, str]] = {"token_class": "token classes", "label": "labels"}

    def procedure(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        rows: Sequence[dict],
    ) -> Iterable[dict]:
        """Tables of each text (``specialising.py``)."""
        from stages.evaluate.specialising import Profiler

        return Profiler(self, model, tokenizer).run(rows)

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per example. For each layer ``used/LAYER`` (choices of each expert),
        ``tokens/LAYER`` and ``permuted/LAYER`` (choices by expert and token class, one list; in the
        second the text's tokens have changed their classes among them)."""
        about = self.about(data)
        found = results(about["example_id"], responses)
        scores = about.assign(prediction=[r["prediction"] for r in found], answer="")
        columns = {
            f"{kind}/{layer}": [result[kind][layer] for result in found]
            for kind in ("tokens", "permuted")
            for layer in (found[0]["used"] if found else ())
        }
        return self.labelled(scores, found).assign(**columns)

    def tables(self, feature: str) -> tuple[Tables, Tables]:
        """Token classes are permuted within each text, labels among the texts."""
        if feature == "label":
            return super().tables(feature)

        def tables(prefix: str) -> Tables:
            def of(scores: pd.DataFrame) -> np.ndarray:
                flat = _stacked(scores, prefix)
                return flat.reshape(*flat.shape[:-1], -1, len(TOKEN_CLASSES))

            return of

        return tables("tokens/"), tables("permuted/")


class ImageSpecialisation(Specialisation, LabelledImages):
    """Of an image's tokens (patches and class token), whether an expert is chosen for the images of
    one class."""

    kind: Literal["image_specialisation"] = "image_specialisation"

    FEATURES: ClassVar[dict[str, str]] = {"label": "classes"}

    def procedure(
        self, model: "PreTrainedModel", tokenizer: "ImageProcessor", rows: Sequence[dict]
    ) -> Iterable[dict]:
        """How often each image's tokens chose each expert (``specialising.py``)."""
        from stages.evaluate.specialising import ImageProfiler

        return ImageProfiler(self, model, tokenizer, rows).run()

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per image; for each layer ``used/LAYER``, choices of each expert."""
        about = self.about(data)
        found = results(about["example_id"], responses)
        predictions = [result["prediction"] for result in found]
        return self.labelled(about.assign(prediction=predictions, answer=""), found)
