"""The three parts of an evaluation: requests, scores, metrics.

An evaluation is a frozen spec (its fields are what a sweep sets) with three methods' worth of
meaning: it turns data sets into *requests* for the model, turns the model's *responses* into one
*score* row per example, and names the *metrics* that summarise score rows. It never sees a model,
but for a *procedure*: an attack or a probe, which no list of questions can express, is handed the
loaded model and the rows, by the same workers and in the same shards.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from pydantic import model_validator

from stages.attack.image_spec import Surrogate
from stages.evaluate.techniques import AnyTechnique, SelfConsistency
from stages.evaluate.thinking import stripped
from stages.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.evaluate.judges import ModelJudge

AXES = (
    "safety",
    "truthfulness",
    "adversarial",
    "out_of_distribution",
    "language_modelling",
    "capability",
)


TEXT_COLUMNS = ("prompt", "answer")
"""Columns of a score table that no metric reads: long, and left on disk."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a model, of one of five kinds: the first of these that applies.

    - ``procedure``: what the evaluation's own ``procedure`` finds on one row, with the model in
      hand.
    - ``head``: the outputs of the model's classification head on the context.
    - ``window``: the log-probability of every token of the context.
    - ``choices``: the log-probability of each choice given the context (both tokenised together, as
      ``context + choice``, split where the context's own tokens end).
    - Otherwise a generation of at most ``max_new_tokens`` tokens after the context.
    """

    id: str
    context: str
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 0
    chat: bool = False
    """Put the context through the tokenizer's chat template as the user's turn."""
    reply: str | None = None
    """The assistant's turn after it, empty or not, for a judge of answers; needs a chat template.
    """
    messages: str = ""
    """A conversation in place of the context: a JSON list of ``{role, content}``; where the last
    turn is the assistant's, it is gone on with. Needs a chat template."""
    stop: tuple[str, ...] = ()
    """Texts before which a generation is cut off."""
    thoughts: bool = True
    """Keep in a generation the special tokens that tell thought from answer."""
    window: int = 0
    """Most tokens that are read at once; longer texts are read in windows without overlap."""
    special_tokens: bool = False
    """Read a windowed text with the special tokens that the tokenizer adds, and score them too."""
    head: bool = False
    harness: bool = False
    """Asked by lm-evaluation-harness: an encoder reads as much of the context as its ``hf`` backend
    gives it."""
    technique: str = ""
    """The inference technique as JSON (``stages/evaluate/techniques.py``); plain when empty."""
    model: str = ""
    """The judge that is asked; empty for the checkpoint."""
    procedure: str = ""
    """The evaluation whose procedure is run, as JSON (``Evaluation.procedure_request``)."""
    row: str = ""
    """What the procedure is given, as JSON."""

    @property
    def generates(self) -> bool:
        """Whether the response is a text."""
        return not (self.procedure or self.head or self.window or self.choices)


@dataclass(frozen=True, slots=True)
class Response:
    """What the model answered to the request of the same id."""

    id: str
    logprobs: tuple[float, ...] = ()
    """Per choice, the sum of its tokens' natural-log probabilities; of a windowed text, the sum
    over all its tokens (one entry). Under a technique, the sum of its token scores."""
    tokens: tuple[int, ...] = ()
    """Per choice, its number of tokens; for a generation or a windowed text, one entry."""
    greedy: tuple[bool, ...] = ()
    """Per choice, whether each of its tokens has the best score: the choice is what the model
    itself would write."""
    outputs: tuple[float, ...] = ()
    """What a classification head gives, before any softmax."""
    text: str = ""
    """The generated text."""
    finished: bool = True
    """The generation ended by itself, not at ``max_new_tokens``."""
    layers: tuple[int, ...] = ()
    """Under DoLa, the layer that was contrasted for each token, choice after choice."""
    result: str = ""
    """What a procedure found on its row, as JSON."""


@dataclass(frozen=True)
class Metric:
    """A number computed from score rows through sums, so that a bootstrap is a matrix product.

    ``statistics`` maps n score rows to an (n, k) array; ``value`` maps sums of such rows, an array
    of shape (..., k), to an array of shape (...). A mean is ``(x, 1)``, ``s[..., 0] / s[..., 1]``.
    """

    name: str
    statistics: Callable[[pd.DataFrame], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    column: str | None = None
    """The per-example score that this is the mean of; makes an exact paired test possible."""
    bounded: bool = False
    """It lies between 0 and 1, and so does its interval. Means of scores that are all 0 or 1 do so
    without being marked."""
    higher_is_better: bool = True
    label: str = ""
    """The metric's name in tables."""
    datasets: tuple[str, ...] | None = None
    """The data sets that it is computed from, where they are not all of the evaluation and its name
    does not tell (``partial.py``)."""
    judge: str = ""
    """The judge whose scores it is computed from, if that is what it is."""
    of_experts: bool = False
    """It is about experts and routes: a dense model has no such number. It is then compared between
    a model before and after a recipe and not between the models of a pair, so that the routes of an
    upcycled model, whose experts start alike, count as change from the untrained twin."""
    gap: str = ""
    """Why there is no number for it, where there is none: no row of a table may be missing."""
    per: str = ""
    """Score column that counts the parts of an example (tokens) that it is a mean over, where
    models may cut examples into parts of their own: those whose counts differ are not compared."""


def mean_of(
    column: str, name: str | None = None, subset: str | None = None, **fields: object
) -> Metric:
    """The mean of a score column over one subset or all rows, leaving out rows without a score."""

    def statistics(scores: pd.DataFrame) -> np.ndarray:
        counted = scores[column].notna().to_numpy()
        if subset is not None:
            counted = counted & (scores["subset"] == subset).to_numpy()
        values = np.where(counted, scores[column].to_numpy(dtype=float, na_value=0.0), 0.0)
        return np.stack([values, counted.astype(float)], axis=1)

    def value(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[..., 0] / sums[..., 1]

    return Metric(name or column, statistics, value, column=column, **fields)


class Evaluation(Spec):
    """Base of every kind of evaluation. Light to import: no torch, no Ray."""

    technique: AnyTechnique | None = None
    """Inference technique under which the model answers; plain scoring and decoding when absent."""

    axis: ClassVar[str]
    VERSION: ClassVar[int] = 1
    """Raised when requests or scoring change, so that stored scores become stale."""
    primary: ClassVar[str]
    """Name of the metric that enters the Holm correction."""
    added: ClassVar[tuple[str, ...]] = ()
    """Fields that came later: off, they are no part of the identity, so that older scores stand."""
    units: ClassVar[dict[str, str]] = {}
    """Score column that is a sum over units of an example, to the column that counts them."""

    declared: dict[str, tuple[str | dict, ...]] = {}
    """Where some data sets or judges could not be had: each field that names one, as the sweep has
    it; filled in by a run (``partial.py``)."""

    def datasets(self) -> dict[str, str]:
        """Dataset name (of the sweep) to the split that is read."""
        raise NotImplementedError

    def tasks(self) -> dict[str, str]:
        """Dataset name to the task (``stages/data/spec.py``) that it must be of."""
        raise NotImplementedError

    def sources(self) -> dict[str, tuple[str, str]]:
        """Key in ``data`` to the dataset and split read for it; by default as ``datasets``."""
        return {name: (name, split) for name, split in self.datasets().items()}

    def wordings(self) -> dict[str, str]:
        """Hashes of the fixed texts in its prompts, by name; part of its scores' identity."""
        return {}

    @property
    def outside(self) -> tuple[str, ...]:
        """Those of its data sets that are unlike the training's: they never select a recipe."""
        return ()

    @property
    def asks_head(self) -> bool:
        """Whether it is for checkpoints with a classification head, and for no others."""
        return False

    @property
    def generates(self) -> bool:
        """Whether the model's answers are texts."""
        return False

    @property
    def writes_texts(self) -> bool:
        """Whether at least some of them are."""
        return self.generates

    @property
    def holds_model(self) -> bool:
        """Whether it has a ``procedure``: attacks, probes and all evaluations of images.

        The model is in float32 then: in bfloat16 small steps are rounded away, and near ties go to
        other experts.
        """
        return type(self).procedure is not Evaluation.procedure

    @model_validator(mode="after")
    def _technique_acts(self) -> "Evaluation":
        if isinstance(self.technique, SelfConsistency) and not self.generates:
            raise ValueError(
                "self_consistency samples several answers, and this evaluation generates none; "
                "remove technique"
            )
        return self

    def vote(self, request: Request, text: str) -> str:
        """What of an answer self-consistency counts: answers with the same vote agree."""
        return " ".join(stripped(text)[0].casefold().split())

    def voter(self, data: dict[str, pd.DataFrame]) -> Callable[[Request, str], str]:
        """``vote``, or one that needs the data."""
        return self.vote

    def requests(self, data: dict[str, pd.DataFrame]) -> list[Request]:
        """Every request that the evaluation needs, in a fixed order; ids are unique."""
        raise NotImplementedError

    def procedure_request(self, id: str, row: dict) -> Request:
        """A request for what ``procedure`` finds on a row of JSON-ready values."""
        asked = self.model_dump_json(exclude={"declared"})
        return Request(id, "", procedure=asked, row=json.dumps(row))

    def procedure(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        rows: Sequence[dict],
    ) -> Iterable[dict]:
        """One JSON-ready result for each row, in their order.

        The model is in evaluation mode and its parameters want no gradient; it is left as it was
        found. A row's result depends on that row, the model and the evaluation alone, never on the
        rows beside it, so that neither workers nor restarts change it.
        """
        raise NotImplementedError

    def surrogates(self) -> tuple[Surrogate, ...]:
        """Other models of the sweep that ``procedure`` is handed as well, by their role:
        checkpoints of the same recipe."""
        return ()

    def judge_models(self) -> "dict[str, ModelJudge]":
        """The judges that are models, by name."""
        return {}

    def judgements(
        self, data: dict[str, pd.DataFrame], responses: dict[str, Response]
    ) -> list[Request]:
        """What the judges are asked about the responses."""
        return []

    def score(self, data: dict[str, pd.DataFrame], responses: dict[str, Response]) -> pd.DataFrame:
        """One row per example, in the order of the data.

        Columns: ``example_id`` (unique), ``document`` (bootstrap cluster), ``subset``, ``prompt``,
        ``gold``, ``prediction``, ``answer`` (text of the model or empty), then the score columns.
        """
        raise NotImplementedError

    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of the evaluation, the primary one first."""
        raise NotImplementedError

    def curves(self, scores: pd.DataFrame) -> tuple[Metric, ...]:
        """Further metrics that only the scores can name, such as one for each layer of the model;
        summarised beside the others and not compared."""
        return ()

    def checks(self, scores: pd.DataFrame) -> list[dict]:
        """What the scores tell about the attack that they come from (``hygiene.py``)."""
        return []

    @property
    def of_experts(self) -> bool:
        """Whether a dense model has none of its metrics."""
        return all(metric.of_experts for metric in self.metrics())
