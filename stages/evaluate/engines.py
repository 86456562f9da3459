"""What writes the answers of generations: transformers, or vLLM. Light to import.

vLLM is given prompts as token ids and gives back token ids, so that tokenizer, chat template, stop
rules and the seeds of sampled answers are this project's own either way. It takes plain and sampled
generations; whatever else is asked of a model stays with ``engine.py``.
"""

from typing import Literal

from stages.evaluate.base import Evaluation, Request
from stages.evaluate.techniques import AnyTechnique, SelfConsistency, read
from stages.models.family import Family

EngineName = Literal["transformers", "vllm"]
MOST_TEMPERATURE = 2
"""At which vLLM draws tokens."""


def by_vllm(evaluation: Evaluation) -> bool:
    """Whether vLLM can write an evaluation's answers, those of them that are texts."""
    return evaluation.writes_texts and _sampled(evaluation.technique)


def takes(request: Request) -> bool:
    """Whether vLLM can answer a request to a checkpoint."""
    technique = read(request.technique) if request.technique else None
    return request.generates and not request.model and _sampled(technique)


def _sampled(technique: AnyTechnique | None) -> bool:
    """Whether tokens are chosen by the model's own logits: the best one, or drawn."""
    return technique is None or isinstance(technique, SelfConsistency)


def lacks(family: Family) -> str:
    """Why vLLM cannot generate with an architecture; empty where it can."""
    if family.encoder_decoder:
        return "vLLM has no encoder-decoder that reads and writes texts"
    return family.no_export or family.no_vllm
