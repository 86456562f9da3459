"""What the evaluate stage is told: one evaluation of one checkpoint."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stages.evaluate import techniques, thinking
from stages.evaluate.engines import EngineName
from stages.evaluate.registry import AnyEvaluation
from stages.spec import RUN_TIME, Spec

LOWER_PRECISION_VERSION = 2
"""Raised when scores in a lower precision than float32 change and those in float32 do not."""

AMATEUR = "amateur/"
"""Input role of the model that a contrastive technique decodes against, before its name."""

SURROGATE = "surrogate/"
"""Input role of another checkpoint that a procedure holds, before its model's name."""

JUDGE = "judge/"
"""Input role of a judge that is a model, before its name."""

JUDGE_DTYPE = "float32"
"""Precision of a judge that is a model, whatever that of the judged one is, so that equal answers
have equal scores in every sweep."""

JUDGE_FILE = "judge.json"
"""Where a judge comes from: ``source`` and, of the hub, the ``commit`` that it named then."""


class JudgeSpec(Spec):
    """The model of a judge."""

    VERSION: ClassVar[int] = 3

    kind: Literal["regressor", "guard"]
    source: str
    """``hub:OWNER/NAME@REVISION`` or ``file:FOLDER``."""
    content: str | None = None
    """Digest of a ``file:`` source, filled in by the planner."""


class EvaluateSpec(Spec):
    """Input roles: ``checkpoint`` (a Hugging Face folder), ``data/<dataset>`` for each data set of
    the evaluation, ``amateur/<model>`` for contrastive decoding, ``surrogate/<role>`` for each
    other model of an attack, ``judge/<name>`` for each judge that is a model."""

    VERSION: ClassVar[int] = 2

    evaluation: AnyEvaluation
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights and of the forward pass, but for the head, which in this project's
    own workers computes in float32 (else the larger logits are, the more of them tie), and for
    judges, which are in float32."""
    engine: EngineName = "transformers"
    """What writes the answers that are texts; where two tokens are equally good up to rounding,
    another engine may take the other."""

    workers: Annotated[int, Field(ge=1), RUN_TIME] = 1
    cpus: Annotated[float, Field(gt=0), RUN_TIME] = 1
    """CPUs of each worker."""
    gpus: Annotated[float, Field(ge=0), RUN_TIME] = 0
    """Accelerators of each worker; 0 runs on the CPU."""
    expert_parallel: Annotated[bool, RUN_TIME] = False
    """vLLM spreads whole experts over them, where it would cut each expert otherwise."""
    shard_size: Annotated[int, Field(ge=1), RUN_TIME] = 64
    """Requests whose responses are written together."""

    def identity(self) -> dict:
        """Also covers the evaluation's version, the wording of its prompts, in a lower precision
        what is computed in float32 all the same, of ``dola_original`` what that is and, where it
        takes answers that are texts, how they are stripped and voted on."""
        found = super().identity() | {
            "evaluation_version": self.evaluation.VERSION,
            "wordings": self.evaluation.wordings(),
        }
        for field in self.evaluation.added:
            if not getattr(self.evaluation, field):
                del found["evaluation"][field]
        if self.dtype != "float32":
            found["lower_precision"] = LOWER_PRECISION_VERSION
        if self.evaluation.writes_texts:
            found["thinking"] = thinking.VERSION
        technique = self.evaluation.technique
        if isinstance(technique, techniques.SelfConsistency):
            found["votes"] = techniques.VOTES_VERSION
        if isinstance(technique, techniques.DoLa) and technique.kind == "dola_original":
            found["dola_original"] = techniques.DOLA_ORIGINAL_VERSION
        return found
