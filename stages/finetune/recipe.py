"""The recipe: how a model is fine-tuned. All of it is what a sweep sets, and all changes results.

Each knob has one definition for all architectures. A part of the model is named by its role in
``stages/models/families.py``, never by a piece of a parameter's name.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from stages.data.templates import TEMPLATES
from stages.finetune.sets import TrainSet, Validation
from stages.spec import Spec

TrainedRole = Literal["router", "expert", "shared_expert", "backbone", "head", "embedding"]
"""``expert`` is the routed experts, ``shared_expert`` includes the gate of the shared expert,
``backbone`` is attention, norms and dense feed-forward blocks."""
MOE_ROLES = ("router", "expert", "shared_expert")
VISION_WEIGHTS = ("importance_loss_weight", "load_loss_weight", "gshard_loss_weight")
AUXILIARY_WEIGHTS = ("auxiliary_loss_weight", "z_loss_weight", *VISION_WEIGHTS)
"""Fields that weigh a loss on the routers."""

# After a validator of its own, pydantic takes no list for a tuple any more.


def _listed(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _of_kind(value: object) -> object:
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict):
        return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return value


def _short(value: Spec) -> str | dict:
    given = value.model_dump(mode="json", exclude_defaults=True)
    return {"kind": value.kind, **given} if given else value.kind


Probability = Annotated[float, Field(ge=0, lt=1)]


class Constant(Spec):
    """The learning rate stays."""

    kind: Literal["constant"] = "constant"


class Linear(Spec):
    """The learning rate falls to 0 in a line."""

    kind: Literal["linear"] = "linear"


class Cosine(Spec):
    """The learning rate follows (1 + cos(2 π cycles x)) / 2, x from 0 after warm-up to 1."""

    kind: Literal["cosine"] = "cosine"
    cycles: Annotated[float, Field(gt=0)] = 0.5
    """Waves: 0.5 falls to 0 once."""


class Step(Spec):
    """The learning rate is multiplied by ``gamma`` at every step of a staircase."""

    kind: Literal["step"] = "step"
    gamma: Annotated[float, Field(gt=0, lt=1)]
    every: Annotated[int, Field(ge=1)] | Literal["epoch"] = "epoch"
    """Optimiser steps, counted from the first one, or epochs."""


Schedule = Annotated[
    Annotated[Constant | Linear | Cosine | Step, Field(discriminator="kind")],
    BeforeValidator(_of_kind),
    PlainSerializer(_short),
]


class AdamW(Spec):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8


class Adam(AdamW):
    """Adam (arXiv 1412.6980); weight decay is added to the gradient."""

    kind: Literal["adam"] = "adam"


class SGD(Spec):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    momentum: Probability = 0.0


class Adagrad(Spec):
    """Adagrad (Duchi et al., 2011)."""

    kind: Literal["adagrad"] = "adagrad"
    eps: Annotated[float, Field(gt=0)] = 1e-10


Optimizer = Annotated[
    Annotated[AdamW | Adam | SGD | Adagrad, Field(discriminator="kind")],
    BeforeValidator(_of_kind),
    PlainSerializer(_short),
]


class Router(Spec):
    """What is done to the routers. All but ``initial`` and ``learning_rate`` act on the forward
    passes of training alone: evaluation and the exported model route as the family does."""

    initial: Literal["pretrained", "random"] = "pretrained"
    """``random`` draws the routers anew before training, normal with the family's own width, with
    biases of 0, also those that move the choice alone."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of the routers' own parameter group; the recipe's when absent."""
    noise: Annotated[float, Field(ge=0)] | Literal["1/E"] = 0.0
    """Standard deviation of normal noise that is added to the router logits before the choice
    (noisy top-k gating, arXiv 1701.06538, without its learned width); ``1/E`` is one over the
    number of experts (V-MoE, arXiv 2106.05974)."""
    jitter: Probability | None = None
    """The router's input, and nothing else, is multiplied element by element by uniform noise from
    [1 - jitter, 1 + jitter] (Switch Transformers, arXiv 2101.03961), in place of the model's own
    jitter; 0 takes that away. The model's own when absent, as its configuration has it (0.01 by
    default in Switch Transformers, 0 in Mixtral, whose own moves the experts' input as well)."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Experts per token in training; the model's own when absent."""
    capacity: Annotated[int, Field(ge=1)] | None = None
    """Tokens that an expert takes in training, in families that have such a limit; the model's own
    when absent. Of one sequence in Switch, of a micro-batch's sequences together in NLLB-MoE."""
    assignment: Literal["top_k", "random", "balanced"] = "top_k"
    """``random`` draws the experts of each token evenly; ``balanced`` gives every expert the same
    number of a micro-batch's tokens, padding left out, and maximises the sum of their logits (BASE
    layers, arXiv 2103.16716; for k > 1 one expert per token after the other). The weights stay the
    router's, and no expert is full: a capacity does not act."""


class Experts(Spec):
    """What is done to the routed experts in training."""

    dropout: Probability = 0.0
    """Dropout on the elements of the routed experts' weighted sum, before a shared expert and the
    residual stream are added."""
    drop: Probability = 0.0
    """Each expert of a layer is dropped as a whole with this probability for one micro-batch: its
    outputs count 0 and the others' weights are divided by 1 - drop."""


class Dropout(Spec):
    """Dropout in the parts that dense models have as well, in training."""

    residual: Probability = 0.0
    """On what each attention and feed-forward block adds to the residual stream."""
    attention: Probability | None = None
    """On the attention weights; the model's own when absent."""


class Lora(Spec):
    """Low-rank adapters (arXiv 2106.09685) by PEFT, merged into the weights on export."""

    roles: Annotated[tuple[TrainedRole, ...], Field(min_length=1)]
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The adapter's product is scaled by alpha / rank."""
    dropout: Probability = 0.0


class Alternate(Spec):
    """Train the routers and all the rest in turns; who waits keeps weights and moments."""

    every: Annotated[int, Field(ge=1)] | Literal["epoch"]
    """Length of a turn: optimiser steps, or one epoch."""
    first: Literal["router", "backbone"] = "backbone"


class FreeLB(Spec):
    """Adversarial training in embedding space (arXiv 1909.11764, algorithm 1), L2 norms over one
    sequence: the mean loss of ``steps`` forward passes, between which the perturbation climbs."""

    kind: Literal["freelb"] = "freelb"
    steps: Annotated[int, Field(ge=1)] = 3
    initial: Annotated[float, Field(ge=0)] = 2e-2
    """The perturbation starts uniform within ± initial / √(tokens × hidden size)."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """Length of one ascent step."""
    max_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the perturbation; unbounded when absent."""

    @model_validator(mode="after")
    def _perturbs(self) -> "FreeLB":
        if self.steps == 1 and not self.initial:
            raise ValueError("one step from initial 0 perturbs nothing; take more steps")
        return self


class ImageAdversary(Spec):
    """What the two kinds of adversarial training on images share: projected gradient ascent from a
    random start, its last iterate, against the model as it is, without noise and dropout."""

    norm: Literal["linf", "l2"] = "linf"
    budget: Annotated[float, Field(gt=0)] = 8 / 255
    """Largest perturbation of images in [0, 1]."""
    steps: Annotated[int, Field(ge=1)] = 10
    relative_step: Annotated[float, Field(gt=0)] = 2.5
    """Length of a step in units of budget / steps."""


class AdversarialPGD(ImageAdversary):
    """Every image is replaced by one that raises its loss (arXiv 1706.06083)."""

    kind: Literal["pgd"] = "pgd"


class Trades(ImageAdversary):
    """The loss of the clean image plus ``beta`` times how far the prediction moves, in KL
    divergence, for the image that moves it most (arXiv 1901.08573)."""

    kind: Literal["trades"] = "trades"
    beta: Annotated[float, Field(gt=0)] = 6.0
    router_beta: Annotated[float, Field(ge=0)] = 0.0
    """The same for how far the routers' probabilities move, in the loss and for the attack, which
    then moves both; mean over tokens and layers. With ``alternate`` near to AdvMoE (arXiv
    2308.10110), without that work's labels for the routers."""


def _freelb_by_default(value: object) -> object:
    if isinstance(value, dict) and "kind" not in value:
        return {"kind": "freelb"} | value
    return {"kind": value} if isinstance(value, str) else value


Adversarial = Annotated[
    Annotated[FreeLB | AdversarialPGD | Trades, Field(discriminator="kind")],
    BeforeValidator(_freelb_by_default),
]
"""Adversarial training: of texts in embedding space, or of images."""


class Recipe(Spec):
    """How a model is fine-tuned."""

    data: Annotated[tuple[TrainSet, ...], Field(min_length=1)]
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps; this or ``epochs``."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Passes over the data; the last batch is filled up from the next one."""
    head: Literal["language_model", "classification"] = "language_model"
    """What is trained on labelled rows: to write the label's word after the prompt, or a new head
    with one output per label, read at the prompt's last token. The head is drawn by the seed,
    unless the model that is fine-tuned has one for the same labels already."""
    batch_size: Annotated[int, Field(ge=1)]
    """Sequences per optimiser step, over all workers."""
    max_length: Annotated[int, Field(ge=8)] = 128
    """Tokens; longer sequences are cut at the end of the prompt's text, never in the answer."""
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Schedule = Linear()
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_ratio: Probability = 0.0
    """Share of all steps, instead of ``warmup_steps``."""
    optimizer: Optimizer = AdamW()
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clipping: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global L2 norm of the gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights."""
    max_nonfinite_steps: Annotated[int, Field(ge=1)] = 1
    """A step with a loss or gradient that is not finite is skipped; so many stop the run."""

    train: Annotated[
        tuple[Literal["all", TrainedRole], ...], Field(min_length=1), BeforeValidator(_listed)
    ] = ("all",)
    """``all``, or the roles that are trained. With ``lora``: those trained in full beside it."""
    freeze: tuple[TrainedRole, ...] = ()
    """The roles that are not; instead of ``train``."""
    lora: Lora | None = None
    alternate: Alternate | None = None
    auxiliary_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the load-balancing loss (arXiv 2101.03961, equation 4, over all sparse layers
    together as Hugging Face computes it; of routers with sigmoids, on their shares of the sum)."""
    z_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the router z-loss (ST-MoE, arXiv 2202.08906, equation 5), mean over the layers."""
    importance_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared variation of the experts' summed probabilities (V-MoE, arXiv
    2106.05974), without ``router.noise``; as the next two over a micro-batch, and the sum over the
    layers: for the weight of a mean, divide by their number."""
    load_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared variation of the experts' smooth loads; needs ``router.noise``."""
    gshard_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the balancing loss of GShard (arXiv 2006.16668), on first choices."""
    router: Router = Router()
    experts: Experts = Experts()
    dropout: Dropout = Dropout()
    adversarial: Adversarial | None = None
    validation: Validation | None = None

    @property
    def reads(self) -> tuple[TrainSet, ...]:
        """All rows that training reads, with those to validate on behind the others."""
        return (*self.data, self.validation.rows) if self.validation else self.data

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels of a classification head, in the order of its outputs."""
        template = TEMPLATES.get(self.data[0].template)
        return tuple(template.labels) if self.head == "classification" and template else None

    def trains(self, role: str) -> bool:
        """Whether the weights of a role are trained in full; adapters do not count."""
        every = "all" in self.train and self.lora is None
        return role not in self.freeze and (every or role in self.train)

    def trained_roles(self) -> set[str]:
        """The roles that training changes, in full or through adapters."""
        roles = {role for role in TrainedRole.__args__ if self.trains(role)}
        return roles | set(self.lora.roles if self.lora else ())

    @property
    def passes(self) -> int:
        """Forward and backward passes over an example in a step, an adversary's ascents included.
        """
        passes = self.adversarial.steps if self.adversarial else 1
        if isinstance(self.adversarial, ImageAdversary):
            passes += 2 if isinstance(self.adversarial, Trades) else 1
        return passes

    @property
    def random(self) -> bool:
        """Whether training draws random numbers beside the order of the data."""
        return bool(
            self.router.noise or self.router.jitter or self.router.assignment == "random"
            or self.experts.dropout or self.experts.drop
            or self.dropout.residual or self.dropout.attention
            or (self.lora and self.lora.dropout) or self.adversarial
        )  # fmt: skip

    @property
    def depends_on_micro_batch(self) -> bool:
        """Whether the size of the micro-batches changes more than rounding: the auxiliary losses
        are means over a micro-batch, random numbers are drawn for each one, and a capacity may be
        one of all its tokens.

        By the recipe alone, as a plan is made before a download tells the architecture: what one
        has of its own (dropout and jitter, NLLB-MoE's capacity, the experts that Phi-MoE's routers
        draw) is left out, and README names it."""
        return bool(
            any(getattr(self, name) for name in AUXILIARY_WEIGHTS) or self.random
            or self.router.assignment == "balanced" or self.router.capacity
        )  # fmt: skip
