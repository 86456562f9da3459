"""Texts of a shop, attacks on them, and the scores of an evaluation asked by hand."""

import string

import pandas as pd
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from stages.evaluate.engine import Engine
from stages.evaluate.shards import plan_shards
from stages.evaluate.text_attacks import TextAttacks
from stages.models.tiny import tiny_model, tiny_tokenizer

ATTACKS = [
    {"kind": "embedding_pgd", "epsilon": 0.5, "steps": 4, "restarts": 2},
    {"kind": "embedding_pgd", "name": "routes", "epsilon": 0.5, "steps": 4, "restarts": 2,
     "routing": "targeted"},
    {"kind": "gcg", "substitutions": 2, "steps": 3, "candidates": 8, "top": 32},
    {"kind": "deep_word_bug", "edits": 2},
    {"kind": "homoglyphs", "edits": 2},
    {"kind": "word_neighbours", "edits": 2},
]
TEXTS = ["Great little thing", "Awful dull thing", "A nice warm day", "Not my day"]


def spec(**changes):
    fields = {"dataset": "shop", "template": "sentiment", "attacks": ATTACKS, "checked": 0,
              "swap_layers": True}
    return TextAttacks(**fields | changes)


def shop():
    """The data of the evaluation: one row per text, labels in turn."""
    ids = [str(n) for n in range(len(TEXTS))]
    rows = {"id": ids, "document": ids, "text": TEXTS, "label": ["positive", "negative"] * 2}
    return {"shop": pd.DataFrame(rows)}


def engine_of(name, folder):
    """A tiny model of that architecture, saved into a folder and loaded again."""
    tokenizer = tiny_tokenizer()
    tiny_model(name, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Engine(folder)


def prepending_tokenizer():
    """Llama 2's normaliser, which puts a blank before a text, also before one that begins with a
    special token. Letters are tokens, and so are some words with the beginnings they merge from."""
    merges = [(word[:n], word[n]) for word in ("▁thing", "▁day", "▁film", "▁good")
              for n in range(1, len(word))]  # fmt: skip
    letters = sorted({*"".join(TEXTS), *"Text:\nSentiment:", *string.ascii_letters, "▁"} - {" "})
    symbols = dict.fromkeys(("<unk>", "<s>", "</s>", *letters, *(a + b for a, b in merges)))
    tokenizer = Tokenizer(models.BPE(
        vocab={symbol: number for number, symbol in enumerate(symbols)},
        merges=list(dict.fromkeys(merges)), unk_token="<unk>"))  # fmt: skip
    blank = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   pad_token="</s>", unk_token="<unk>")


def scores_of(engine, evaluation, data, size=64):
    shards = plan_shards(evaluation.requests(data), size)
    responses = {r.id: r for shard in shards for r in engine.respond(shard.requests)}
    return evaluation.score(data, responses)
