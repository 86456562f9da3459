"""Answers of encoder-decoders: the context goes through the encoder once, answers are decoded.

The results are what ``scorer`` and ``generate`` give for decoders. Requests are answered one by
one: where experts have a capacity, a token's output depends on what shares its batch.

An encoder whose positions are relative (T5, Switch) or computed (NLLB) reads a text of any length,
so a context is read whole. Where lm-evaluation-harness asks, it loses tokens from its left as in
its ``hf`` backend: beyond the length that the configuration names, else the tokenizer, else 2048.
"""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.evaluate.base import Request, Response
from stages.evaluate.generate import cut
from stages.evaluate.scorer import beginning, parted, prompt


@torch.inference_mode()
def score(
    model: PreTrainedModel, tokenizer: Tokenizer, requests: Sequence[Request]
) -> list[Response]:
    """A response for each request, in their order: natural-log probabilities of its choices.

    A choice is tokenised by itself, without special tokens; white space at the end of the context
    belongs to it.
    """
    responses = []
    for request in requests:
        context, texts, special = parted(tokenizer, request)
        choices = tokenizer(
            texts,
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        ).to(model.device)
        labels, real = choices["input_ids"], choices["attention_mask"]
        tokens = _read(model, tokenizer, request, context, special)
        read = model.get_encoder()(input_ids=tokens)
        read.last_hidden_state = read.last_hidden_state.expand(len(labels), -1, -1)
        start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
        logits = model(
            encoder_outputs=read,
            decoder_input_ids=torch.cat([start, labels[:, :-1]], dim=1),
            use_cache=False,
        ).logits
        values = logits.float().log_softmax(-1).gather(2, labels[..., None])[..., 0]
        best = (logits.argmax(-1) == labels) | (real == 0)
        responses.append(
            Response(
                request.id,
                logprobs=tuple((values * real).sum(1).tolist()),
                tokens=tuple(real.sum(1).tolist()),
                greedy=tuple(best.all(1).tolist()),
            )
        )
    return responses


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: Tokenizer, requests: Sequence[Request]
) -> list[Response]:
    """A response for each request, in their order: the most probable next token at each step.

    Of the checkpoint's generation settings only its special tokens act: a penalty, a least length
    or a number of beams would make its answers another model's.
    """
    own, responses = model.generation_config, []
    try:
        model.generation_config = GenerationConfig(
            decoder_start_token_id=model.config.decoder_start_token_id,
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
        )
        for request in requests:
            responses.append(_written(model, tokenizer, request))
    finally:
        model.generation_config = own
    return responses


def _written(model: PreTrainedModel, tokenizer: Tokenizer, request: Request) -> Response:
    context = _read(model, tokenizer, request, *prompt(tokenizer, request))
    (tokens,) = model.generate(context, max_new_tokens=request.max_new_tokens)
    answer = tokens[1:].tolist()  # after the start token
    finished = answer[-1:] == [tokenizer.eos_token_id]
    answer = answer[:-1] if finished else answer
    text = cut(tokenizer.decode(answer, skip_special_tokens=True), request.stop)
    return Response(request.id, tokens=(len(answer),), text=text, finished=finished)


def _read(
    model: PreTrainedModel, tokenizer: Tokenizer, request: Request, context: str, special: bool
) -> torch.Tensor:
    """What the encoder reads of a request, (1, T): at least one token."""
    tokens = tokenizer(context, add_special_tokens=special, verbose=False)["input_ids"]
    if request.harness:
        from lm_eval.models.utils import resolve_max_length

        tokens = tokens[-resolve_max_length(model.config, tokenizer) :]
    return torch.tensor([tokens or [beginning(tokenizer)]], device=model.device)
