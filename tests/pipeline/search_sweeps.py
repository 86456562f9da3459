"""Sweeps with a search, as the tests of the search use them."""

import json

from smoke import SMOKE

from pipeline.search.spec import Search
from pipeline.sweep import Sweep
from pipeline.sweep_file import load
from stages.finetune.spec import Recipe

BASE = Recipe(
    data=[{"dataset": "reviews", "template": "sentiment"}, {"dataset": "refusals"}], steps=9,
    batch_size=8, learning_rate=1e-3, schedule="constant", auxiliary_loss_weight=0.01)
RATE = {"learning_rate": {"log_uniform": [1e-5, 1e-1]}}
SEARCH = {"base": "sft", "space": RATE, "objectives": [{"score": "edits/clean_accuracy"}],
          "trials": 4}


def search_of(**fields: object) -> Search:
    """A search section with some fields other than those of SEARCH."""
    return Search.model_validate_json(json.dumps({**SEARCH, **fields}), strict=True)


def searching(*overrides: str, **fields: object) -> Sweep:
    """The smoke sweep with a search."""
    content = json.dumps({**SEARCH, **fields})
    return load(SMOKE, [f"search={content}", *overrides])
