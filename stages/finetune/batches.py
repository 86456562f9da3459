"""From rows of data sets to the tokens of one optimiser step.

Every process holds all examples and derives the batches from the seed and the step alone, so a
resumed run, or one with another number of workers, sees the same global batches. A micro-batch is
*packed* where the architecture allows it: its sequences stand one after the other in a single row
without padding, and positions that start again at 0 keep them apart in the attention. Not meant for
sequences of many thousand tokens, whose packed attention mask would be large. Otherwise it is
padded to its longest sequence; an encoder-decoder reads the prompt and answers. Images are kept
encoded and decoded per micro-batch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as parquet
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from stages.data.templates import INSTRUCTION_CHAT, TEMPLATES, Template
from stages.errors import StageFailed
from stages.finetune.spec import FinetuneSpec, TrainSet
from stages.models.families import family
from stages.models.images import ImageProcessor
from stages.models.routing import Routing


@dataclass(frozen=True)
class Example:
    """One training sequence; the loss is taken on its last ``answer`` tokens, or where there is a
    ``label`` on the classification head's outputs, which counts as one token."""

    input_ids: tuple[int, ...]
    answer: int
    label: int | None = None

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return len(self.input_ids)


@dataclass(frozen=True)
class ImageExample:
    """One image, encoded as in its data set, and the number of its label."""

    image: bytes
    label: int
    processor: ImageProcessor
    answer: ClassVar[int] = 1
    """Targets of the loss."""

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return self.processor.tokens


def load_examples(
    spec: FinetuneSpec,
    inputs: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase | ImageProcessor,
    *,
    encoder_decoder: bool = False,
    held_out: bool = False,
) -> list[Example] | list[ImageExample]:
    """The examples of one epoch: the train sets one after the other, each repeated as asked; or
    those that are held out for validation, none without it."""
    examples = []
    for train_set in spec.reads[len(spec.data) :] if held_out else spec.data:
        rows, _ = select_rows(train_set, inputs, spec.seed_of_rows, at_most=held_out)
        if isinstance(tokenizer, ImageProcessor):
            encoded = [
                ImageExample(row["image"], tokenizer.label(row["label"]), tokenizer) for row in rows
            ]
        elif train_set.template is None:
            encoded = [_instruction(row, tokenizer, spec.max_length) for row in rows]
        else:
            template = TEMPLATES[train_set.template]
            if spec.head == "classification":
                encode = _headed
            else:
                encode = _labelled if encoder_decoder else _classification
            encoded = [encode(row, template, tokenizer, spec.max_length) for row in rows]
        examples += encoded * train_set.repeat
    return examples


def select_rows(
    train_set: TrainSet, inputs: dict[str, Path], seed: int, *, at_most: bool = False
) -> tuple[list[dict], list[dict[str, str]]]:
    """The rows of a train set that are used, and those removed: data set, id, matched phrase.

    Raises StageFailed where there are fewer than its limit, unless that many are wanted
    ``at_most``.
    """
    path = inputs[f"data/{train_set.dataset}"] / f"{train_set.split}.parquet"
    rows, removed = parquet.read_table(path).to_pylist(), []
    if not rows:
        raise StageFailed(
            f"{path}: the train set {train_set.dataset} is empty; take a split with rows"
        )
    if train_set.exclude:
        longest_first = sorted(train_set.exclude, key=len, reverse=True)
        phrases = "|".join(map(re.escape, longest_first))
        pattern = re.compile(rf"(?<!\w)(?:{phrases})(?!\w)", re.IGNORECASE)
        found = [(row, pattern.search(row["response"])) for row in rows]
        removed = [
            {"dataset": train_set.dataset, "id": row["id"], "phrase": match[0].lower()}
            for row, match in found
            if match
        ]
        rows = [row for row, match in found if not match]
    if train_set.limit is not None:
        if train_set.limit > len(rows) and not at_most:
            raise StageFailed(
                f"{path}: limit {train_set.limit} is more than the {len(rows)} rows of "
                f"{train_set.dataset} that are there; lower it"
            )
        chosen = np.random.default_rng(seed).permutation(len(rows))[: train_set.limit]
        rows = [rows[i] for i in sorted(chosen)]
    return rows, removed


def _classification(
    row: dict, template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example:
    """Prompt and label tokenised together, split where the prompt's own tokens end (as scored)."""
    column = template.columns[0]

    def encode(text: str) -> Example:
        prompt = template.fill(row | {column: text})
        ids = tokenizer(prompt + template.labels[row["label"]])["input_ids"]
        return Example(tuple(ids), len(ids) - len(tokenizer(prompt)["input_ids"]))

    return _fit(row, row[column], encode, max_length)


def _labelled(
    row: dict, template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example:
    """Prompt for an encoder, label for a decoder: each tokenised by itself."""
    answer = tokenizer(template.labels[row["label"]], add_special_tokens=False)["input_ids"]
    column = template.columns[0]

    def encode(text: str) -> Example:
        prompt = template.fill(row | {column: text})
        return Example((*tokenizer(prompt)["input_ids"], *answer), len(answer))

    return _fit(row, row[column], encode, max_length)


def _headed(
    row: dict, template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example:
    """The prompt for a classification head, and the place of the label among its outputs."""
    column, label = template.columns[0], list(template.labels).index(row["label"])

    def encode(text: str) -> Example:
        prompt = template.fill(row | {column: text})
        return Example(tuple(tokenizer(prompt)["input_ids"]), 1, label)

    return _fit(row, row[column], encode, max_length)


def _instruction(row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """The prompt as the user's turn of the model's chat template, or of the one that its checkpoint
    will have, and the response closed by the end token."""
    response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    answer = [*response, tokenizer.eos_token_id]

    def encode(text: str) -> Example:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            chat_template=None if tokenizer.chat_template else INSTRUCTION_CHAT,
            add_generation_prompt=True,
            tokenize=False,
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


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass gets, and where its logits speak about an answer's token (or all of a
    classification head's, with the labels as targets)."""

    arguments: dict[str, torch.Tensor]
    answers: tuple
    """Index into the logits that gives those of the A answer tokens, shape (A, vocabulary); of
    images, those of all A images, shape (A, labels)."""
    targets: torch.Tensor
    """The answers' tokens or the images' labels, shape (A,)."""
    real: dict[str, torch.Tensor]
    """Which tokens are no padding, shape (tokens,), by the part of the model that reads them
    (``encoder``, ``decoder``, or empty for all of it); empty where rows hold no padding."""

    @property
    def sequences(self) -> torch.Tensor:
        """Of texts, to which sequence each token of ``input_ids`` belongs, the same shape; -1 where
        it is padding."""
        if not self.real:
            return (self.arguments["position_ids"] == 0).cumsum(-1) - 1
        mask = self.arguments["attention_mask"]
        rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
        return rows.masked_fill(mask == 0, -1)

    def without_padding(self, routings: list[Routing]) -> list[Routing]:
        """What the sparse blocks decided for the real tokens alone."""
        if not self.real:
            return routings
        return [routing.only(self.real_tokens(routing.layer)) for routing in routings]

    def by_sequence(self, routings: list[Routing]) -> list[list[Routing]]:
        """What the sparse blocks decided for the real tokens of each sequence of padded rows, from
        that for the real tokens of all."""
        rows, parts = len(self.arguments["attention_mask"]), []
        for routing in routings:
            lengths = self.real_tokens(routing.layer).view(rows, -1).sum(1).tolist()
            tensors = (routing.logits, routing.experts, routing.weights)
            split = zip(*(tensor.split(lengths) for tensor in tensors), strict=True)
            parts.append([Routing(routing.layer, *each) for each in split])
        return [list(sequence) for sequence in zip(*parts, strict=True)]

    def real_logits(self, logits: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Router logits by layer (tokens, E), of the real tokens alone."""
        flat = {layer: each.flatten(0, -2) for layer, each in logits.items()}
        if not self.real:
            return flat
        return {layer: each[self.real_tokens(layer)] for layer, each in flat.items()}

    def real_tokens(self, layer: str) -> torch.Tensor | None:
        """Which tokens are no padding where a layer reads them, shape (tokens,); None where rows
        hold no padding."""
        if not self.real:
            return None
        return next(m for part, m in self.real.items() if not part or part in layer.split("."))


def micro_batch(
    examples: list[Example], config: PretrainedConfig, device: torch.device
) -> MicroBatch:
    """The examples as the architecture takes them: images, or packed or padded sequences, or those
    for an encoder-decoder.

    A classification head looks for the last token that is no padding, so rows are padded for it.
    """
    entry = family(config)
    if entry.modality == "image":
        processor = examples[0].processor
        pixels = processor.decode([example.image for example in examples]).to(device)
        targets = torch.tensor([example.label for example in examples], device=device)
        return MicroBatch({"pixel_values": processor.normalised(pixels)}, (...,), targets, {})
    if examples[0].label is not None:
        ids, mask = padded([e.input_ids for e in examples], config.pad_token_id, device)
        arguments, real = {"input_ids": ids, "attention_mask": mask}, {"": mask.flatten().bool()}
        targets = torch.tensor([example.label for example in examples], device=device)
        return MicroBatch(arguments, (slice(None),), targets, real)
    if entry.packs:
        arguments, targets = pack(examples, device)
        return MicroBatch(arguments, (0,), targets, {})
    answers = [example.input_ids[-example.answer :] for example in examples]
    targets = torch.tensor([token for answer in answers for token in answer], device=device)
    if entry.encoder_decoder:
        prompts = [example.input_ids[: -example.answer] for example in examples]
        ids, mask = padded(prompts, config.pad_token_id, device)
        # A place further than the answers, as transformers shifts its labels.
        labels, told = padded(answers, config.pad_token_id, device)
        start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
        arguments = {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": torch.cat([start, labels[:, :-1]], dim=1),
            "decoder_attention_mask": told,  # padding takes no place at an expert
        }
        real = {"encoder": mask.flatten().bool(), "decoder": told.flatten().bool()}
        return MicroBatch(arguments, told.bool().nonzero(as_tuple=True), targets, real)
    ids, mask = padded([example.input_ids for example in examples], 0, device)
    places = [
        (row, place - 1)
        for row, example in enumerate(examples)
        for place in range(len(example.input_ids) - example.answer, len(example.input_ids))
    ]
    rows, columns = torch.tensor(places, device=device).T
    arguments, real = {"input_ids": ids, "attention_mask": mask}, {"": mask.flatten().bool()}
    return MicroBatch(arguments, (rows, columns), targets, real)


def padded(
    rows: list[tuple[int, ...]], filler: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids filled up on the right, and the mask of the real ones, both (rows, longest)."""
    ids = torch.full((len(rows), max(map(len, rows))), filler)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    return ids.to(device), mask.to(device)


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
