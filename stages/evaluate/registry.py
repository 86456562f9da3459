"""Every kind of evaluation that a sweep can name.

To add one: write a frozen ``Evaluation`` (``base.py``) with a ``kind``, and enter it in
``AnyEvaluation``.
"""

from typing import Annotated, get_args

from pydantic import Field

from stages.evaluate.adversarial import CharacterEdits
from stages.evaluate.base import Evaluation
from stages.evaluate.harness import LmEval
from stages.evaluate.held_prompts import HeldPrompts, SafetyExperts, TargetAttack
from stages.evaluate.image_attacks import ImageAttacks
from stages.evaluate.image_probes import ImageGeometry, ImageInterventions, ImageLipschitz
from stages.evaluate.labelled_texts import LabelledTexts
from stages.evaluate.language_modelling import Perplexity
from stages.evaluate.open_questions import FalsePremises, OpenQuestion
from stages.evaluate.out_of_distribution import AdversarialSets, OutOfDistribution
from stages.evaluate.probes import ExpertInterventions, LocalLipschitz, RouterGeometry
from stages.evaluate.safety import Refusal
from stages.evaluate.sharpness import Sharpness
from stages.evaluate.specialisation import ExpertSpecialisation, ImageSpecialisation
from stages.evaluate.techniques import ExpertCount
from stages.evaluate.text_attacks import TextAttacks
from stages.evaluate.truthfulness import MultipleChoice
from stages.evaluate.truthfulqa import TruthfulQA, TruthfulQAGeneration
from stages.evaluate.vision import ImageClassification

AnyEvaluation = Annotated[
    Refusal
    | MultipleChoice
    | TruthfulQA
    | TruthfulQAGeneration
    | OpenQuestion
    | FalsePremises
    | CharacterEdits
    | AdversarialSets
    | OutOfDistribution
    | Perplexity
    | TextAttacks
    | ExpertInterventions
    | RouterGeometry
    | ExpertSpecialisation
    | LocalLipschitz
    | TargetAttack
    | SafetyExperts
    | LmEval
    | ImageClassification
    | ImageAttacks
    | ImageInterventions
    | ImageGeometry
    | ImageLipschitz
    | ImageSpecialisation
    | Sharpness,
    Field(discriminator="kind"),
]

KINDS: dict[str, type[Evaluation]] = {
    kind.model_fields["kind"].default: kind for kind in get_args(get_args(AnyEvaluation)[0])
}


def for_decoders(evaluation: Evaluation) -> str:
    """What of an evaluation only decoders can do; empty where there is nothing."""
    technique = evaluation.technique
    if technique is not None and not isinstance(technique, ExpertCount):
        return technique.kind
    if isinstance(evaluation, Perplexity):
        return "perplexity"
    if isinstance(evaluation, LmEval) and evaluation.reads_windows:
        return "the log-probability of whole texts"
    return evaluation.kind if isinstance(evaluation, LabelledTexts | HeldPrompts) else ""
