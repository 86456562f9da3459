"""What the model sees: tokens, answers, and which rows in which step on which worker."""

import numpy as np
import pandas as pd
import pytest
import torch

from stages.data.templates import INSTRUCTION_CHAT
from stages.errors import StageFailed
from stages.evaluate.base import Request
from stages.evaluate.scorer import prompt
from stages.finetune.batches import (
    Example,
    global_batch,
    load_examples,
    micro_batches,
    pack,
    select_rows,
)
from stages.finetune.export import training_logits, write_folder
from stages.finetune.spec import FinetuneSpec, TrainSet
from stages.models.load import load_tokenizer
from stages.models.size import measure
from stages.models.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()  # one token per byte


def spec(*train, **fields):
    return FinetuneSpec(data=train, steps=1, batch_size=1, learning_rate=1.0, **fields)


def texts(example):
    ids = list(example.input_ids)
    cut = len(ids) - example.answer
    return TOKENIZER.decode(ids[:cut]), TOKENIZER.decode(ids[cut:])


@pytest.fixture
def reviews(tmp_path):
    rows = {"id": ["a", "b"], "text": ["fine", "x" * 60], "label": ["positive", "negative"]}
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    return {"data/reviews": tmp_path}


@pytest.fixture
def refusals(tmp_path):
    frame = pd.DataFrame({"id": ["c"], "prompt": ["Do it now"], "response": ["No."]})
    frame.to_parquet(tmp_path / "train.parquet")
    return {"data/refusals": tmp_path}


SENTIMENT = TrainSet(dataset="reviews", template="sentiment")


def test_classification_answers_with_the_label(reviews):
    first, second = load_examples(spec(SENTIMENT, max_length=128), reviews, TOKENIZER)
    assert texts(first) == ("Text: fine\nSentiment:", " positive")
    assert texts(second) == (f"Text: {'x' * 60}\nSentiment:", " negative")


def test_truncation_cuts_the_text_and_nothing_else(reviews):
    _, second = load_examples(spec(SENTIMENT, max_length=40), reviews, TOKENIZER)
    # "Text: " + "\nSentiment:" + " negative" are 6 + 11 + 9 bytes, which leaves 14 of the text.
    assert texts(second) == (f"Text: {'x' * 14}\nSentiment:", " negative")


def test_an_answer_that_cannot_fit_is_refused(reviews):
    with pytest.raises(StageFailed, match="train row a: .* exceed max_length 25; raise max_length"):
        load_examples(spec(SENTIMENT, max_length=25), reviews, TOKENIZER)


def test_instructions_go_through_the_chat_template(refusals):
    train = TrainSet(dataset="refusals", repeat=2)
    first, second = load_examples(spec(train), refusals, TOKENIZER)
    prompt = "<|im_start|>user\nDo it now<|im_end|>\n<|im_start|>assistant\n"
    assert texts(first) == (prompt, "No.<|im_end|>")
    assert second == first
    chat = len(TOKENIZER(prompt)["input_ids"])
    (shorter,) = load_examples(
        spec(TrainSet(dataset="refusals"), max_length=chat), refusals, TOKENIZER
    )
    assert texts(shorter) == (prompt.replace("Do it now", "Do it"), "No.<|im_end|>")


def test_without_a_chat_template_instructions_go_through_ours(refusals):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (example,) = load_examples(
        spec(TrainSet(dataset="refusals"), max_length=128), refusals, tokenizer
    )
    prompt, answer = texts(example)
    assert prompt == "<|im_start|>### Instruction:\nDo it now\n\n### Response:\n"
    assert answer == "No.<|im_end|>"


@pytest.mark.parametrize("own", [True, False])
def test_a_checkpoint_is_asked_as_it_was_trained(own, refusals, tmp_path):
    """Byte for byte the tokens of training, whether the model came with a chat template or not."""
    source, output = tmp_path / "source", tmp_path / "output"
    output.mkdir()
    tokenizer = tiny_tokenizer()
    if not own:
        tokenizer.chat_template = None
    model = tiny_model("llama", tokenizer, seed=0)
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    measure(model, "tiny:llama").write(source)
    recipe = spec(TrainSet(dataset="refusals"), max_length=128)
    examples = load_examples(recipe, refusals, load_tokenizer(source))
    logits = training_logits(model, examples)
    write_folder(model.state_dict(), recipe, source, output, examples, logits, 1)
    made = load_tokenizer(output)
    assert made.chat_template == (tokenizer.chat_template if own else INSTRUCTION_CHAT)
    text, special = prompt(made, Request("a", "Do it now", max_new_tokens=1, chat=True))
    asked = made(text, add_special_tokens=special)["input_ids"]
    (trained,) = examples
    assert asked == list(trained.input_ids[: -trained.answer])


def test_every_row_stands_once_in_an_epoch_and_epochs_differ():
    stream = np.concatenate([global_batch(10, 4, seed=7, step=step) for step in range(5)])
    first, second = stream[:10], stream[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    assert not np.array_equal(first, np.arange(10))
    other = np.concatenate([global_batch(10, 4, seed=8, step=step) for step in range(5)])
    assert not np.array_equal(stream, other)


@pytest.mark.parametrize(("workers", "size"), [(1, 4), (2, 2), (2, 4), (4, 1)])
def test_workers_share_the_same_global_batch_in_order(workers, size):
    batch = global_batch(100, 8, seed=0, step=3)
    shares = [np.concatenate(micro_batches(batch, rank, workers, size)) for rank in range(workers)]
    assert np.concatenate(shares).tolist() == batch.tolist()
    assert {len(m) for r in range(workers) for m in micro_batches(batch, r, workers, size)} == {
        size
    }


def test_packing_keeps_positions_and_answers_apart():
    arguments, targets = pack(
        [Example((11, 12, 13), 1), Example((21, 22, 23, 24), 2)], torch.device("cpu")
    )
    assert arguments["input_ids"].tolist() == [[11, 12, 13, 21, 22, 23, 24]]
    assert arguments["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert arguments["logits_to_keep"].tolist() == [1, 4, 5]
    assert targets.tolist() == [13, 23, 24]


def test_a_limit_draws_rows_by_the_seed_and_a_smaller_one_a_part_of_them(tmp_path):
    rows = {"id": [f"r{i}" for i in range(20)], "prompt": ["p"] * 20, "response": ["a"] * 20}
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    inputs = {"data/d": tmp_path}

    def drawn(limit, seed=0):
        return {r["id"] for r in select_rows(TrainSet(dataset="d", limit=limit), inputs, seed)[0]}

    assert len(drawn(12)) == 12 and drawn(5) < drawn(12) and drawn(5) != drawn(5, seed=1)
    with pytest.raises(StageFailed, match="limit 21 is more than the 20 rows of d"):
        drawn(21)


def test_excluded_phrases_are_whole_words_and_every_removal_names_its_phrase(tmp_path):
    responses = ["This is Illegal.", "Legally it is illegality", "it is important to", "illegal x"]
    frame = {"id": list("abcd"), "prompt": ["p"] * 4, "response": responses}
    pd.DataFrame(frame).to_parquet(tmp_path / "train.parquet")
    train = TrainSet(dataset="d", exclude=("illegal", "it is important"))
    kept, removed = select_rows(train, {"data/d": tmp_path}, seed=0)
    assert [row["id"] for row in kept] == ["b"]
    assert removed == [
        {"dataset": "d", "id": "a", "phrase": "illegal"},
        {"dataset": "d", "id": "c", "phrase": "it is important"},
        {"dataset": "d", "id": "d", "phrase": "illegal"},
    ]


def test_language_inference_answers_with_its_words_and_cuts_the_premise(tmp_path):
    frame = {"id": ["a"], "premise": ["x" * 200], "hypothesis": ["It {premise}."],
             "label": ["neutral"]}  # fmt: skip
    pd.DataFrame(frame).to_parquet(tmp_path / "train.parquet")
    train = TrainSet(dataset="d", template="nli")
    (example,) = load_examples(spec(train, max_length=100), {"data/d": tmp_path}, TOKENIZER)
    prompt, answer = texts(example)
    kept = 100 - len("Premise: \nHypothesis: It {premise}.\nDoes the premise entail it? Maybe")
    assert prompt == (
        f"Premise: {'x' * kept}\nHypothesis: It {{premise}}.\nDoes the premise entail it?"
    )
    assert answer == " Maybe"
