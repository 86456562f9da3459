"""What an attack on texts is told. Light to import: no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.attack import wordnet
from stages.spec import Spec

Operation = Literal["swap", "substitute", "delete", "insert"]


class TextAttack(Spec):
    """What all attacks on texts share."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] | None = None
    """How it is called in tables; its kind when not given."""

    @property
    def label(self) -> str:
        """How it is called in tables."""
        return self.name or self.kind


class GradientAttack(TextAttack):
    """What attacks that follow the gradient share."""

    loss: Literal["margin", "cross_entropy"] = "margin"
    """Over the closed set of labels: the largest other log-probability minus that of the label, or
    the cross-entropy. Success is judged by the margin."""
    routing: Literal["as_is", "soft", "frozen", "targeted", "joint"] = "as_is"
    """How the choice of experts, which has no gradient itself, takes part. ``soft``: forward as it
    is, backward as if every expert were weighed (BPDA, arXiv 1802.00420, straight through).
    ``frozen``: the loss is taken with the experts of the clean input, weighed anew; success is
    judged with the model's own choice. ``targeted``: instead of the loss, the router logits of
    experts that the clean input does not use, minus those that it does, are raised. ``joint``: the
    loss plus ``routing_weight`` times that. A dense model is attacked as it is."""
    routing_weight: Annotated[float, Field(gt=0)] = 1.0
    steps: Annotated[int, Field(ge=1)] = 10


class EmbeddingPGD(GradientAttack):
    """Projected gradient ascent on the embeddings of the text's tokens (PGD, arXiv 1706.06083).

    Below half the distance to the next token's embedding the perturbed tokens still are the
    original ones: a probe of smoothness, not an input that anybody can write.
    """

    kind: Literal["embedding_pgd"] = "embedding_pgd"
    epsilon: Annotated[float, Field(gt=0)] = 0.1
    """Radius of each token's ball: in units of the median norm of a token's embedding (``l2``), or
    of the root mean square of an element of it (``linf``)."""
    norm: Literal["l2", "linf"] = "l2"
    restarts: Annotated[int, Field(ge=1)] = 5
    """Random starts; the best iterate of all counts."""


class GCG(GradientAttack):
    """Greedy coordinate gradient (arXiv 2307.15043): one token replaced per step, the best of some
    candidates drawn from those that the gradient promises most of."""

    kind: Literal["gcg"] = "gcg"
    substitutions: Annotated[int, Field(ge=1)] = 3
    """Most tokens of the text that may differ from the original."""
    candidates: Annotated[int, Field(ge=1)] = 32
    """Candidates that are evaluated in each step."""
    top: Annotated[int, Field(ge=1)] = 256
    """Replacements of a position from which candidates are drawn."""


class GreedyEdits(TextAttack):
    """What greedy edits of words share: words in the order of their importance, one edit each, the
    candidate of the largest margin kept, until the prediction changes or the budget is spent.

    The model is asked for its answers only, not for gradients.
    """

    edits: Annotated[int, Field(ge=1)] = 5
    """Most words that are edited."""


class DeepWordBug(GreedyEdits):
    """Character edits (after DeepWordBug, arXiv 1801.04354)."""

    kind: Literal["deep_word_bug"] = "deep_word_bug"
    operations: Annotated[tuple[Operation, ...], Field(min_length=1)] = (
        "swap", "substitute", "delete", "insert"
    )  # fmt: skip

    @property
    def draws(self) -> bool:
        """Whether letters are drawn, so that another search finds others."""
        return not {"substitute", "insert"}.isdisjoint(self.operations)


class Homoglyphs(GreedyEdits):
    """A letter of another script that looks alike in the place of one."""

    kind: Literal["homoglyphs"] = "homoglyphs"


class WordNeighbours(GreedyEdits):
    """Other words: those whose embedding in the attacked model is near, or WordNet's synonyms.

    The meaning may change, and no sentence encoder watches over it, so this is not TextFooler.
    """

    kind: Literal["word_neighbours"] = "word_neighbours"
    neighbours: Annotated[int, Field(ge=1)] = 8
    """Words that are tried for each."""
    synonyms: Literal["embedding", "wordnet"] = "embedding"
    """Where the words are from. ``wordnet``: what shares a sense with the word in WordNet, the
    same for every model; only words in their base form have any."""
    cosine: Annotated[float, Field(ge=-1, le=1)] = 0.3
    """Least cosine of the two embeddings."""

    @model_validator(mode="after")
    def _there(self) -> "WordNeighbours":
        if self.synonyms == "wordnet":
            wordnet.folder()
            if self.cosine != type(self).model_fields["cosine"].default:
                raise ValueError("cosine has no effect on synonyms of wordnet; remove it")
        return self


AnyTextAttack = Annotated[
    EmbeddingPGD | GCG | DeepWordBug | Homoglyphs | WordNeighbours, Field(discriminator="kind")
]
