"""One forward pass of training: what the tests of the knobs look at."""

import torch

from stages.finetune.evidence import Evidence
from stages.finetune.knobs import Knobs
from stages.finetune.recipe import Recipe

TOKENS = torch.arange(3, 67)[None]


def recipe(**fields):
    given = {"data": ({"dataset": "d"},), "steps": 1, "batch_size": 1, "learning_rate": 1.0}
    return Recipe.model_validate(given | fields)


def run(model, seed=0, **fields):
    """Logits, routings and the evidence of one forward pass of training."""
    evidence = Evidence()
    knobs = Knobs(model, recipe(**fields), evidence)
    knobs.attach()
    torch.manual_seed(seed)
    with knobs.forward() as routings:
        logits = plain(model)
    return logits, routings, evidence


def plain(model):
    asked = {"labels": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **asked, use_cache=False).logits
