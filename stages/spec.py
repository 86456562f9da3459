"""What a stage is told to do: a frozen pydantic model whose fields are identity or run time.

Identity fields change the result and enter the node's fingerprint. Run-time fields say only where
and how fast the work is done (workers, devices, micro-batch); they are marked with ``RUN_TIME``::

    class TrainSpec(Spec):
        steps: int
        workers: Annotated[int, RUN_TIME] = 1
"""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

RUN_TIME = "run time: does not change results"


def independent(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """The seeds; ValueError where one is negative or stands twice, since its results would count as
    two draws."""
    if min(seeds) < 0:
        raise ValueError(f"names {min(seeds)}, and a seed is 0 or more; take another")
    if len(set(seeds)) < len(seeds):
        raise ValueError("names a seed twice; keep one")
    return seeds


Seed = Annotated[int, Field(ge=0)]
"""NumPy's generators take no negative one."""
Seeds = Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(independent)]
"""Seeds of independent trainings."""


class Spec(BaseModel):
    """Base of every stage's spec: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    VERSION: ClassVar[int] = 1
    """Of the stage's computation; raised when the same spec would give another result."""

    @classmethod
    def run_time_fields(cls) -> set[str]:
        """Names of the fields that do not change results."""
        return {name for name, field in cls.model_fields.items() if RUN_TIME in field.metadata}

    def identity(self) -> dict:
        """The JSON-ready content that a fingerprint covers: every field but the run-time ones."""
        return self.model_dump(mode="json", exclude=self.run_time_fields())
