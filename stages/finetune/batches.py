"""From rows of data sets to the tokens of one optimiser step.

Every process holds all examples and derives the batches from the seed and the step alone, so a
resumed run, or one with another number of workers, sees the same global batches. A micro-batch is
*packed*: its sequences stand one after the other in a single row without padding, and positions
that start again at 0 keep them apart in the attention. Not meant for sequences of many thousand
tokens, whose packed attention mask would be large.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from transformers import PreTrainedTokenizerBase

from stages.data.templates import TEMPLATES, Template
from stages.errors import StageFailed
from stages.finetune.spec import FinetuneSpec


@dataclass(frozen=True)
class Example:
    """One training sequence; the loss is taken on its last ``answer`` tokens."""

    input_ids: tuple[int, ...]
    answer: int


def load_examples(
    spec: FinetuneSpec, inputs: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """The examples of one epoch: the train sets one after the other, each repeated as asked."""
    examples = []
    for train_set in spec.train:
        path = inputs[f"data/{train_set.dataset}"] / f"{train_set.split}.parquet"
        rows = parquet.read_table(path).to_pylist()
        if not rows:
            raise StageFailed(
                f"{path}: the train set {train_set.dataset} is empty; take a split with rows"
            )
        if train_set.template is None:
            encoded = [_instruction(row, tokenizer, spec.max_length) for row in rows]
        else:
            template = TEMPLATES[train_set.template]
            encoded = [_classification(row, template, tokenizer, spec.max_length) for row in rows]
        examples += encoded * train_set.repeat
    return examples


def _classification(
    row: dict, template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example:
    """Prompt and label tokenised together, split where the prompt's own tokens end (as scored)."""

    def encode(text: str) -> Example:
        prompt = template.render(text)
        ids = tokenizer(prompt + template.labels[row["label"]])["input_ids"]
        return Example(tuple(ids), len(ids) - len(tokenizer(prompt)["input_ids"]))

    return _fit(row, row["text"], encode, max_length)


def _instruction(row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """The prompt as the user's turn of the chat template, the response closed by the end token."""
    response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    answer = [*response, tokenizer.eos_token_id]

    def encode(text: str) -> Example:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer(chat, add_special_tokens=False)["input_ids"]
        return Example((*prompt, *answer), len(answer))

    return _fit(row, row["prompt"], encode, max_length)


def _fit(row: dict, text: str, encode: Callable[[str], Example], max_length: int) -> Example:
    """Encode the longest beginning of ``text`` whose sequence has at most ``max_length`` tokens."""
    example = encode(text)
    if len(example.input_ids) <= max_length:
        return example
    fits, too_long, example = -1, len(text), None
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        shorter = encode(text[:middle])
        if len(shorter.input_ids) <= max_length:
            fits, example = middle, shorter
        else:
            too_long = middle
    if example is None:
        raise StageFailed(
            f"train row {row['id']}: the answer and the template alone exceed max_length "
            f"{max_length}; raise max_length or leave the row out"
        )
    return example


def global_batch(rows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the examples of optimiser step ``step`` (counted from 0), shape (batch_size,).

    The epochs' permutations form one endless stream that is cut into batches, so every example
    stands equally often and a batch may span two epochs.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    order = {e: np.random.default_rng([seed, e]).permutation(rows) for e in set(places // rows)}
    return np.array([order[place // rows][place % rows] for place in places])


def micro_batches(batch: np.ndarray, rank: int, workers: int, size: int) -> list[np.ndarray]:
    """The micro-batches of one worker: its contiguous share of the global batch, cut in order."""
    share = len(batch) // workers
    own = batch[rank * share : (rank + 1) * share]
    return [own[start : start + size] for start in range(0, share, size)]


def pack(
    examples: list[Example], device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The model's arguments for one packed row of N tokens, and the targets of shape (A,).

    The model returns logits of shape (1, A, vocabulary) for the A positions before an answer's
    token only: the rest of the head's work would be thrown away.
    """
    ids = [token for example in examples for token in example.input_ids]
    positions = [place for example in examples for place in range(len(example.input_ids))]
    ends = np.cumsum([len(example.input_ids) for example in examples])
    answers = np.concatenate(
        [np.arange(end - e.answer, end) for e, end in zip(examples, ends, strict=True)]
    )
    input_ids = torch.tensor([ids], device=device)
    where = torch.from_numpy(answers).to(device)
    arguments = {
        "input_ids": input_ids,
        "position_ids": torch.tensor([positions], device=device),
        "logits_to_keep": where - 1,
    }
    return arguments, input_ids[0, where]
