"""What the evaluate stage is told: one evaluation of one checkpoint."""

from typing import Annotated, Literal

from pydantic import Field

from stages.data.templates import TEMPLATES
from stages.evaluate.registry import AnyEvaluation
from stages.spec import RUN_TIME, Spec


class EvaluateSpec(Spec):
    """Input roles: ``checkpoint`` (a Hugging Face folder) and ``data/<dataset>`` for each data set
    of the evaluation."""

    evaluation: AnyEvaluation
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights and of the forward pass."""

    workers: Annotated[int, Field(ge=1), RUN_TIME] = 1
    cpus: Annotated[float, Field(gt=0), RUN_TIME] = 1
    """CPUs of each worker."""
    gpus: Annotated[float, Field(ge=0), RUN_TIME] = 0
    """Accelerators of each worker; 0 runs on the CPU."""
    shard_size: Annotated[int, Field(ge=1), RUN_TIME] = 64
    """Requests whose responses are written together."""

    def identity(self) -> dict:
        """Also covers the evaluation's version and the wording of its template."""
        identity = super().identity() | {"evaluation_version": self.evaluation.VERSION}
        template = getattr(self.evaluation, "template", None)
        if template is not None:
            identity["template_hash"] = TEMPLATES[template].hash
        return identity
