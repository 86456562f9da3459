import numpy as np
import pandas as pd
import pytest

from stages.models.size import measure
from stages.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder of a tiny model by the name of its family."""
    folders = {}
    mixtures = ("mixtral", "qwen2_moe", "switch_transformers", "nllb-moe", "jetmoe", "minimax")
    for name in ("llama", "t5", *mixtures, "large"):
        folder = tmp_path_factory.mktemp(name)
        tokenizer = tiny_tokenizer()
        model = tiny_model("llama" if name == "large" else name, tokenizer, seed=3)
        if name == "large":  # a Llama with large embeddings
            model.get_input_embeddings().weight.data *= 1000
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        measure(model, f"tiny:{name}").write(folder)
        folders[name] = folder
    return folders


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Input roles of two train sets: 21 classification rows and 4 instructions."""
    words = "good bad film plot slow dull bright warm cold long".split()
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(words, random.integers(1, 6))) for _ in range(21)]
    reviews = tmp_path_factory.mktemp("reviews")
    pd.DataFrame(
        {
            "id": [f"r{i}" for i in range(21)],
            "text": texts,
            "label": ["positive" if "good" in text else "negative" for text in texts],
        }
    ).to_parquet(reviews / "train.parquet")
    refusals = tmp_path_factory.mktemp("refusals")
    pd.DataFrame(
        {
            "id": [f"i{i}" for i in range(4)],
            "prompt": [f"Do thing {i}" for i in range(4)],
            "response": [f"No, not {i}." for i in range(4)],
        }
    ).to_parquet(refusals / "train.parquet")
    return {"data/reviews": reviews, "data/refusals": refusals}
