"""One loaded checkpoint that answers requests of every evaluation."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
from transformers import PreTrainedModel

from stages.errors import StageFailed
from stages.evaluate import seq2seq
from stages.evaluate.base import Request, Response
from stages.evaluate.decoding import (
    LayerContrast,
    ModelContrast,
    Plain,
    Predictor,
    expert_count,
)
from stages.evaluate.generate import generate
from stages.evaluate.heads import Head, has_head
from stages.evaluate.registry import KINDS
from stages.evaluate.scorer import score
from stages.evaluate.techniques import (
    AnyTechnique,
    Contrastive,
    DoLa,
    ExpertCount,
    SelfConsistency,
    read,
)
from stages.evaluate.windows import score_windows
from stages.models.float32_head import with_float32_head
from stages.models.load import load, load_input, load_tokenizer


def device_of(gpus: float) -> str:
    """The device of a worker that has so many accelerators: several share one model's layers."""
    return "auto" if gpus > 1 else "cuda" if gpus else "cpu"


class Engine:
    """A model and its tokenizer or image processor, read once from a Hugging Face folder.

    ``dtype`` names a torch type, that of all but the head, which computes in float32; ``device``
    names a torch device or is ``auto``, which with ``max_memory`` and ``offload`` is as for
    ``load``; ``threads`` is the number of CPU threads of this process from now on (``None`` leaves
    it as it is). ``amateurs`` are the folders of the models that ``contrastive`` decodes against,
    ``surrogates`` those of the other models that procedures hold, by name; each is loaded when
    first needed.
    Raises StageFailed for a folder that cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int | None = None,
        amateurs: Mapping[str, Path] | None = None,
        surrogates: Mapping[str, Path] | None = None,
        max_memory: Mapping[int | str, int] | None = None,
        offload: Path | None = None,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        self.folder = folder
        self.place = {
            "dtype": dtype, "device": device, "max_memory": max_memory, "offload": offload
        }
        self.amateurs = dict(amateurs or {})
        self.surrogates = dict(surrogates or {})
        self.held: dict[str, tuple] = {}
        self.predictors: dict[AnyTechnique, Predictor] = {}
        self.tokenizer = load_input(folder)
        self.head = Head(folder, self.tokenizer, **self.place) if has_head(folder) else None
        if self.head is None:
            self.model  # noqa: B018 - a folder that cannot be loaded fails here

    @cached_property
    def model(self):
        """The causal language model, or the image classifier."""
        if self.head is not None:
            raise StageFailed(
                f"{self.folder}: has a classification head and cannot continue texts; evaluate it "
                "with method: head"
            )
        return self._loaded(self.folder)

    def _loaded(self, folder: Path) -> PreTrainedModel:
        return with_float32_head(load(folder, **self.place)).requires_grad_(False)

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """A response for each request, in their order; the same list gives the same responses."""
        responses: dict[int, Response] = {}

        def kind(index: int) -> tuple[str, str]:
            return requests[index].procedure, requests[index].technique

        for (procedure, technique), group in groupby(sorted(range(len(requests)), key=kind), kind):
            members = list(group)
            asked = [requests[index] for index in members]
            if procedure:
                answered = self._proceed(procedure, asked)
            else:
                answered = self._under(read(technique) if technique else None, asked)
            responses |= dict(zip(members, answered, strict=True))
        return [responses[index] for index in range(len(requests))]

    def _proceed(self, procedure: str, requests: list[Request]) -> list[Response]:
        """What the procedure of one evaluation finds on the requests' rows."""
        evaluation = json.loads(procedure)
        evaluation = KINDS[evaluation["kind"]].model_validate(evaluation)
        rows = [json.loads(request.row) for request in requests]
        others = {s.role: self._surrogate(s.role) for s in evaluation.surrogates()}
        extra = {"surrogates": others} if others else {}
        results = evaluation.procedure(self.model, self.tokenizer, rows, **extra)
        return [
            Response(request.id, result=json.dumps(result))
            for request, result in zip(requests, results, strict=True)
        ]

    def _surrogate(self, name: str) -> tuple:
        """Another model, and its tokenizer or image processor."""
        if name not in self.held:
            folder = self.surrogates[name]
            self.held[name] = self._loaded(folder), load_input(folder)
        return self.held[name]

    def _under(self, technique: AnyTechnique | None, requests: list[Request]) -> list[Response]:
        """Responses to requests of one technique."""
        asks = iter(self._outputs(technique, [request for request in requests if request.head]))
        rest = [request for request in requests if not request.head]
        if not rest:
            return list(asks)
        changed = _changed(self.model, technique)
        if self.model.config.is_encoder_decoder:
            with changed:
                return self._encoded(technique, requests)
        predictor = self._predictor(technique)
        sampling = technique if isinstance(technique, SelfConsistency) else None
        with changed:
            windows = iter(score_windows(predictor, self.tokenizer, [r for r in rest if r.window]))
            scored = iter(
                score(
                    self.model,
                    self.tokenizer,
                    [r for r in rest if r.choices and not r.window],
                    predictor=predictor,
                )
            )
            generated = iter(
                generate(
                    self.model,
                    self.tokenizer,
                    [r for r in rest if r.generates],
                    predictor=predictor,
                    sampling=sampling,
                )
            )

        def kind(request: Request):
            if request.head:
                return asks
            return windows if request.window else scored if request.choices else generated

        return [next(kind(request)) for request in requests]

    def _encoded(
        self, technique: AnyTechnique | None, requests: list[Request]
    ) -> list[Response]:
        """Responses of an encoder-decoder."""
        if isinstance(technique, DoLa | Contrastive | SelfConsistency):
            raise StageFailed(
                f"technique.kind: {technique.kind} is for decoders, {self.folder} is an "
                "encoder-decoder; remove technique"
            )
        if any(request.window for request in requests):
            raise StageFailed(
                f"{self.folder}: an encoder-decoder gives no probability to a text without a "
                "prompt; evaluate it without perplexity"
            )
        scored = iter(seq2seq.score(self.model, self.tokenizer, [r for r in requests if r.choices]))
        generated = iter(
            seq2seq.generate(self.model, self.tokenizer, [r for r in requests if r.generates])
        )
        return [next(scored if request.choices else generated) for request in requests]

    def _outputs(self, technique: AnyTechnique | None, requests: list[Request]) -> list[Response]:
        if not requests:
            return []
        if self.head is None:
            raise StageFailed(
                f"{self.folder}: has no classification head (method: head); train one or evaluate "
                "with method: label_words"
            )
        with _changed(self.head.model, technique):
            return self.head.respond(requests)

    def _predictor(self, technique: AnyTechnique | None) -> Predictor:
        if isinstance(technique, DoLa | Contrastive):
            if technique not in self.predictors:
                self.predictors[technique] = self._made(technique)
            return self.predictors[technique]
        return Plain(self.model)

    def _made(self, technique: DoLa | Contrastive) -> Predictor:
        if isinstance(technique, DoLa):
            return LayerContrast(self.model, technique)
        folder = self.amateurs[technique.amateur]
        if load_tokenizer(folder).get_vocab() != self.tokenizer.get_vocab():
            raise StageFailed(
                f"technique.amateur: {technique.amateur} has another tokenizer than the model; "
                "name one of the same family"
            )
        return ModelContrast(self.model, self._loaded(folder), technique)


def _changed(
    model: PreTrainedModel, technique: AnyTechnique | None
) -> AbstractContextManager[None]:
    """The model with the technique's number of experts, where it is one of experts."""
    counts = isinstance(technique, ExpertCount)
    return expert_count(model, technique) if counts else nullcontext()
