"""Inference techniques: how a model is asked, as an option of any evaluation. Light to import.

Each is off unless named, and plain scoring does not go through any of this. How they compute is in
``stages/evaluate/decoding.py``.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, TypeAdapter

from stages.errors import StageFailed
from stages.spec import Seed, Spec

if TYPE_CHECKING:
    from stages.evaluate.base import Request, Response


class DoLa(Spec):
    """Decoding by contrasting layers (Chuang et al. 2024, arXiv 2309.03883).

    At each position the *premature* layer is the candidate whose next-token distribution differs
    most from the last layer's; a token's score is its log-probability in the last layer minus that
    in the premature one. Scores of choices are sums of these differences, not log-probabilities.

    ``dola`` measures the difference by the Jensen-Shannon divergence, as the paper defines it, and
    reads an earlier layer out through the model's final norm and head. ``dola_original`` does what
    the authors' code does (github.com/voidism/DoLa): the divergences' arguments are reversed,
    ½ KL(M‖last) + ½ KL(M‖candidate) with M the mean of both, and earlier layers go through the head
    without the final norm. It may choose other layers and gives other scores.
    """

    kind: Literal["dola", "dola_original"]
    candidate_layers: tuple[Annotated[int, Field(ge=0)], ...] | Literal["low", "high"] = "high"
    """Numbers of decoder layers whose output may be contrasted (0 stands for the embeddings), or
    every second layer of the lower or the upper half, starting even (for 32 layers ``high`` is 16,
    18, …, 30). ``low`` leaves the embeddings out where they are tied to the head."""
    relative_top: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Tokens less probable than this share of the most probable one are out of the question (the
    paper's alpha). The authors use 0 to score choices and 0.1 to generate."""


DOLA_ORIGINAL_VERSION = 1
"""Raised when the scores of ``dola_original`` change and those of ``dola`` do not."""


class Contrastive(Spec):
    """Contrastive decoding against a weaker model (O'Brien and Lewis 2023, arXiv 2309.09117).

    A token's logit is ``(1 + beta)`` times the model's minus ``beta`` times the amateur's, among
    the tokens whose probability is at least ``alpha`` times that of the most probable one; the
    scores are log-probabilities over these. With both 0 it is plain scoring.
    """

    kind: Literal["contrastive"]
    amateur: str
    """A model of the sweep with the same tokenizer."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1
    beta: Annotated[float, Field(ge=0)] = 0.5


class ExpertCount(Spec):
    """Another number of experts per token than the model was trained with.

    In a pair the dense partner is asked plainly; a dense model alone is refused.
    """

    kind: Literal["expert_count"]
    top_k: Annotated[int, Field(ge=1)]
    """Routed experts that a token passes, from 1 to all."""


VOTES_VERSION = 4
"""Raised when the answer that several samples give could be another."""


class SelfConsistency(Spec):
    """The most frequent of several sampled answers (Wang et al. 2023, arXiv 2203.11171).

    Each sample has a random state of its own, made of the seed, the request and its number, so the
    answers depend neither on the batch nor on the number of workers.
    """

    kind: Literal["self_consistency"]
    samples: Annotated[int, Field(ge=2)] = 5
    temperature: Annotated[float, Field(gt=0)] = 0.7
    seed: Seed = 0


AnyTechnique = Annotated[
    DoLa | Contrastive | ExpertCount | SelfConsistency, Field(discriminator="kind")
]
_ADAPTER: TypeAdapter[AnyTechnique] = TypeAdapter(AnyTechnique)


def read(text: str) -> AnyTechnique:
    """The technique that stands in a request."""
    return _ADAPTER.validate_json(text)


def applied(technique: AnyTechnique | None, requests: "list[Request]") -> "list[Request]":
    """The requests under a technique; with self-consistency one per sample of a generation."""
    if technique is None:
        return requests
    text = json.dumps(technique.model_dump(mode="json"), sort_keys=True)
    asked = [replace(request, technique=text) for request in requests]
    if not isinstance(technique, SelfConsistency):
        return asked
    return [
        replace(request, id=_sample(request.id, number))
        for request in asked
        for number in range(technique.samples)
    ]


def collected(
    technique: SelfConsistency,
    requests: "Iterable[Request]",
    responses: "dict[str, Response]",
    vote: "Callable[[Request, str], str]",
) -> "dict[str, Response]":
    """One response per request: the first sample of the largest group with the same vote, by
    preference the group that began first. A sample without an answer, whose vote is empty, has
    none as long as others have one. Raises StageFailed when a sample is missing."""
    chosen = {}
    for request in requests:
        ids = [_sample(request.id, number) for number in range(technique.samples)]
        if missing := [id for id in ids if id not in responses]:
            raise StageFailed(f"response {missing[0]!r} is missing: run the evaluation again")
        votes = [vote(request, responses[id].text) for id in ids]
        # The first of those that are equally frequent, which is how Counter orders them.
        winner = Counter([each for each in votes if each] or votes).most_common(1)[0][0]
        chosen[request.id] = replace(responses[ids[votes.index(winner)]], id=request.id)
    return chosen


def _sample(id: str, number: int) -> str:
    return f"{id}#sample{number}"


def sample_seed(seed: int, request: str) -> int:
    """The seed (below 2^63) of one sampled answer, of the technique's seed and the request's id."""
    digest = hashlib.sha256(f"{seed}/{request}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def candidates(technique: DoLa, layers: int, tied: bool) -> tuple[int, ...]:
    """The candidate layers of a model with so many layers, ascending.

    ``tied`` says whether the head shares the embeddings' weights. Raises StageFailed where none is
    below the last layer.
    """
    chosen = technique.candidate_layers
    half = layers // 2
    if chosen == "low":
        chosen = tuple(range(2 if tied else 0, half, 2))
    elif chosen == "high":
        chosen = tuple(range(half + half % 2, layers, 2))
    if not chosen or max(chosen) >= layers:
        raise StageFailed(
            f"candidate_layers {technique.candidate_layers}: of {layers} layers, those from 0 to "
            f"{layers - 1} can be candidates; name some of them"
        )
    return tuple(sorted(set(chosen)))
