"""Checkpoints with a classification head: fine-tuned classifiers and judges that give a score."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.errors import StageFailed
from stages.evaluate.base import Request, Response
from stages.models.classifier import is_classifier, register
from stages.models.families import FAMILIES
from stages.models.float32_head import with_float32_head
from stages.models.load import check_fits

LONGEST = 512
"""Tokens of a text at most, where the model does not say."""


def has_head(folder: Path) -> bool:
    """Whether a checkpoint's folder holds a model for sequence classification or regression."""
    file = folder / "config.json"
    return file.is_file() and is_classifier(json.loads(file.read_text()))


def most_tokens(model: PreTrainedModel) -> int:
    """Most tokens that a model can read.

    A table of positions that has an entry for padding (RoBERTa's) counts from behind that entry.
    """
    positions = getattr(model.config, "max_position_embeddings", LONGEST)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return positions - padding - 1
    return positions


class Head:
    """A model with a head over whole sequences.

    The keywords are those of ``stages.models.load.load``; raises StageFailed where weights are
    missing or do not fit.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        dtype: str,
        device: str,
        max_memory: Mapping[int | str, int] | None = None,
        offload: Path | None = None,
    ):
        self.tokenizer = tokenizer
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
        if model_type in FAMILIES:
            register(model_type)
        elif device == "auto":  # a judge of another architecture, which fits on one accelerator
            device = "cuda"
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                device_map=device,
                max_memory=max_memory and dict(max_memory),
                offload_folder=offload,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise StageFailed(f"{folder}: cannot be loaded as a classifier: {reason}") from error
        if missing := sorted(report["missing_keys"]):
            raise StageFailed(
                f"{folder}: {len(missing)} weights are missing, first {missing[0]}; its head was "
                "never trained"
            )
        if device == "auto" and offload is None:
            check_fits(model, folder)
        self.model = with_float32_head(model.eval())

    @torch.inference_mode()
    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """The head's outputs (labels,) on each context, one at a time so that no padding and no
        neighbour has a part in them.

        A prompt too long for the model loses tokens from its left, as everywhere: at its end is
        what is asked. A judge keeps the beginning, where the request and the answer begin.
        """
        longest = most_tokens(self.model)
        responses = []
        for request in requests:
            self.tokenizer.truncation_side = "right" if request.model else "left"
            tokens = self.tokenizer(
                request.context,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(self.model.device)
            inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            outputs = self.model(**inputs).logits[0].float().tolist()
            responses.append(
                Response(request.id, tokens=(inputs["input_ids"].shape[1],), outputs=tuple(outputs))
            )
        return responses
