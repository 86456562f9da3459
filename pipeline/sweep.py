"""The schema of a sweep file."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.search.spec import Search
from stages.compare.spec import AskedHypotheses
from stages.data.spec import DataSpec, Task
from stages.evaluate.engines import EngineName
from stages.evaluate.registry import AnyEvaluation
from stages.finetune.recipe import Recipe as StageRecipe
from stages.models.spec import SourceSpec, UpcycleSpec, WidenSpec
from stages.models.vision_spec import VisionSpec
from stages.spec import Seed, Seeds, Spec

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]
UNTUNED = "none"
"""The recipe name of a model that was not fine-tuned."""


class Dataset(DataSpec):
    """A data set of the sweep."""

    disjoint_from: tuple[Name, ...] | None = None
    """Rows whose normalised text occurs in one of these data sets are dropped and counted, beside
    those with a text that is trained on (``Sweep.kept_from``). ``[]`` keeps them all."""


class Upcycle(UpcycleSpec):
    """A Mixture-of-Experts twin of another model of the sweep."""

    model: Annotated[Name, Field(alias="from")]
    """The dense model it is made of."""


class Widen(Spec):
    """A dense twin with the activated FLOPs of an upcycled model of the sweep."""

    like: Name
    """The upcycled model; dense model, layers, activated neurons, noise and seed are its own."""


class Model(SourceSpec):
    """A model of the sweep: exactly one of ``source``, ``upcycle``, ``widen`` and ``vision``."""

    source: str | None = None
    upcycle: Upcycle | None = None
    widen: Widen | None = None
    vision: VisionSpec | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "Model":
        origins = ("source", "upcycle", "widen", "vision")
        given = [name for name in origins if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"needs exactly one of {', '.join(origins)}; has {found}")
        return self


class Pair(Spec):
    """A Mixture-of-Experts model and the dense model it is compared with."""

    moe: Name
    dense: Name

    @property
    def name(self) -> str:
        """How the pair is called in tables."""
        return f"{self.moe} vs {self.dense}"


class Recipe(StageRecipe):
    """A recipe of the sweep."""

    models: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """The models that it fine-tunes; all models of all pairs when absent."""
    after: Name | None = None
    """Start from the checkpoints of this recipe, of the same model and seed, instead of from the
    models as they are (a curriculum)."""
    evaluations: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """The evaluations of what it fine-tunes; when absent, all of the sweep that ask for what it
    has, a classification head (``method: head``) or a language model."""


class Resources(Spec):
    """What one kind of stage asks of the cluster."""

    workers: Annotated[int, Field(ge=1)] = 1
    """Worker processes."""
    cpus: Annotated[float, Field(ge=0)] = 1
    """CPUs of each worker."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of each worker."""


class FinetuneResources(Resources):
    """Workers of one fine-tune."""

    expert_parallel: Annotated[int, Field(ge=1)] = 1
    """Workers that share the experts of a Mixture-of-Experts model; divides experts and workers."""
    micro_batch: Annotated[int, Field(ge=1)] = 8
    """Sequences per forward pass and worker."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 20
    """Optimiser steps between two resumable checkpoints."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """How often a fine-tune restarts from its last checkpoint after a worker died."""
    deepspeed_config: str | None = None
    """A file of ``deepspeed_configs/``; chosen from model and device when absent."""


class EvaluateResources(Resources):
    """Actors of one evaluation pass; each loads the model once, over all GPUs that it has.

    vLLM cuts each layer over them (tensor parallelism), transformers deals whole layers out.
    """

    gpu_memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU, in 10^9 bytes; a plan whose models do not fit is then refused."""

    expert_parallel: bool = False
    """With vLLM, each GPU of an actor holds whole experts, not a part of every one."""
    shard_size: Annotated[int, Field(ge=1)] = 64
    """Requests that are written (and, after a kill, repeated) together."""


class MachineKind(Spec):
    """Machines of one kind that a cluster can start by itself."""

    count: Annotated[int, Field(ge=1)]
    """At most so many at a time, those that run already among them."""
    cpus: Annotated[float, Field(ge=0)]
    """CPUs of each."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of each."""


class AllResources(Spec):
    """Resources by stage; what is absent runs on one worker with one CPU."""

    data: Resources = Resources()
    model: Resources = Resources()
    finetune: FinetuneResources = FinetuneResources()
    evaluate: EvaluateResources = EvaluateResources()
    compare: Resources = Resources()
    machines: tuple[MachineKind, ...] = ()
    """What the cluster can grow to; without it, only the machines that run are counted with."""


class Assumptions(Spec):
    """What ``plan`` assumes for its estimate where nothing is counted; changes no result."""

    characters_per_token: Annotated[float, Field(gt=0)] = 4.0
    """English text under the tokenizers of today's language models has 4 to 5."""
    tokens_per_row: dict[Task, Annotated[float, Field(gt=0)]] = {
        "classification": 25,
        "nli": 75,
        "paraphrase": 45,
        "prompts": 20,
        "multiple_choice": 110,
        "statements": 120,
        "open_question": 20,
        "text": 600,
        "instructions": 100,
        "images": 50,
    }
    """Of a data set's text, by task, where its rows are not at hand (of an image, its patches);
    about those of the pinned archives' sets."""
    training_tflops: Annotated[float, Field(gt=0)] = 100
    """Sustained by one GPU in training, in 10^12 operations per second."""
    scoring_tflops: Annotated[float, Field(gt=0)] = 100
    """The same when prompts are read."""
    decoding_tflops: Annotated[float, Field(gt=0)] = 5
    """The same when answers are written, token by token."""

    @model_validator(mode="after")
    def _every_task(self) -> "Assumptions":
        default = type(self).model_fields["tokens_per_row"].default
        object.__setattr__(self, "tokens_per_row", default | self.tokens_per_row)
        return self


class Statistics(Spec):
    """How intervals are made."""

    resamples: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap resamples."""
    seed: Seed = 0


class Sweep(Spec):
    """A whole study: pairs of models, recipes, evaluations, seeds."""

    name: Name
    description: str = ""
    seeds: Seeds = (0,)
    """Each fine-tune is done once per seed."""
    datasets: dict[Name, Dataset]
    models: dict[Name, Model]
    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]
    recipes: dict[Name, Recipe] = {}
    untuned: bool = True
    """Also evaluate the models as they are, before any fine-tuning."""
    trained_on: tuple[Name, ...] = ()
    """Data sets that models were trained on elsewhere; those that a recipe trains on are known."""
    evaluations: Annotated[dict[Name, AnyEvaluation], Field(min_length=1)]
    scoring_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights during evaluation; attacks, probes and all of images are float32."""
    generation_engine: EngineName = "transformers"
    """What writes the answers that are texts; other requests stay with transformers."""
    statistics: Statistics = Statistics()
    hypotheses: AskedHypotheses = None
    """Verdicts on H1 to H5 about attacks and experts; ``true``, or which evaluations and models."""
    resources: AllResources = AllResources()
    assumptions: Assumptions = Assumptions()
    search: Search | None = None
    """What ``moe-reliability search`` looks for; ``run`` leaves it alone."""

    @property
    def trained(self) -> dict[str, Dataset]:
        """The data sets that models are trained on, here or elsewhere."""
        here = [t.dataset for recipe in self.recipes.values() for t in recipe.data]
        return {n: self.datasets[n] for n in (*here, *self.trained_on) if n in self.datasets}

    def kept_from(self, name: str) -> tuple[str, ...]:
        """The data sets that are trained on and whose texts are left out of this one unasked.

        Not one of the same source, whose other splits may be what is scored here, nor one of
        images, which would be read whole, nor one that itself waits for a data set that is only
        scored: that could close a circle.
        """
        dataset, trained = self.datasets[name], self.trained
        asked = dataset.disjoint_from
        if name in trained or dataset.task == "images" or asked == ():
            return ()
        return tuple(
            other for other, entry in trained.items()
            if entry.task != "images" and entry.source != dataset.source
            and other not in (asked or ()) and self._waits_for(other) <= set(trained))

    def _waits_for(self, name: str) -> set[str]:
        """The data sets that one is asked to be disjoint from, and theirs."""
        found, stack = set(), [name]
        while stack:
            entry = self.datasets.get(stack.pop())
            new = set(entry.disjoint_from or ()) - found if entry else set()
            found |= new
            stack += new
        return found

    @property
    def may_share(self) -> dict[str, tuple[str, ...]]:
        """Each scored split whose texts may stand in splits that are trained on, with these, as
        ``DATASET/SPLIT``.

        Splits of one data set share no text, and neither do data sets of which one is kept disjoint
        from the other. Images are left out: what is trained on would be read whole.
        """
        trained = dict.fromkeys(
            (t.dataset, t.split) for recipe in self.recipes.values() for t in recipe.data)
        apart = {name: (*(entry.disjoint_from or ()), *self.kept_from(name))
                 for name, entry in self.datasets.items()}
        found: dict[str, tuple[str, ...]] = {}
        for evaluation in self.evaluations.values():
            for name, split in evaluation.datasets().items():
                others = tuple(f"{other}/{part}" for other, part in trained
                               if other != name and self.datasets[other].task != "images"
                               and other not in apart[name] and name not in apart[other])
                if others:
                    found[f"{name}/{split}"] = others
        return found


def model_spec(
    sweep: Sweep, name: str
) -> tuple[SourceSpec | UpcycleSpec | WidenSpec | VisionSpec, str | None]:
    """The stage's spec of a model whose references exist, and the dense model it is made of."""
    model = sweep.models[name]
    if model.source is not None:
        return SourceSpec(**{f: getattr(model, f) for f in SourceSpec.model_fields}), None
    if model.vision is not None:
        return model.vision, None
    if model.upcycle is not None:
        upcycle = model.upcycle
        return UpcycleSpec(**{f: getattr(upcycle, f) for f in UpcycleSpec.model_fields}), (
            upcycle.model
        )
    upcycle = sweep.models[model.widen.like].upcycle
    same = {f: getattr(upcycle, f) for f in ("top_k", "layers", "seed")}
    if upcycle.experts_from == "copies":
        return WidenSpec(**same, drop=upcycle.drop, noise=upcycle.noise), upcycle.model
    return WidenSpec(**same, parts=upcycle.experts, noise=0), upcycle.model
