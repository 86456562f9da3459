"""An actor with several accelerators: the model's layers lie on them, and the answers are the same.

This machine may have none. An actor is then told of two that hold three quarters of the weights
each; both stand for the CPU, under names of their own, so that everything else (the share of each,
the hooks that carry hidden states over, the actor) is what it would be.
"""

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, modeling_utils

from pipeline.evaluate import Responder, _packed, _responses_file
from pipeline.store import Store
from stages.errors import StageFailed
from stages.evaluate.base import Request
from stages.evaluate.shards import plan_shards, responses_from_table
from stages.evaluate.techniques import DoLa
from stages.models.classifier import register
from stages.models.load import spread
from stages.models.tiny import tiny_model, tiny_tokenizer

REQUESTS = [
    Request("choice", "Which?", (" one", " another")),
    Request("text", "Once upon", max_new_tokens=5),
    Request("window", "A text of some length.", window=8),
    Request("dola", "Which?", (" one", " another"),
            technique=DoLa(kind="dola", candidate_layers=(1,)).model_dump_json()),
]
HEAD = [Request("head", "Is it so?", head=True)]


def accelerators(monkeypatch, *bytes_each):
    """Let this process see accelerators that hold so much, and the CPU beside them."""
    seen = dict(enumerate(bytes_each)) | {"cpu": 1 << 40}
    monkeypatch.setattr("transformers.integrations.accelerate.accelerate_max_memory",
                        lambda limits: dict(seen) if limits is None else dict(limits))
    share = modeling_utils._get_device_map

    def named(*arguments):
        return {module: f"cpu:{place}" if isinstance(place, int) else place
                for module, place in share(*arguments).items()}

    monkeypatch.setattr(modeling_utils, "_get_device_map", named)
    # Tensors forget a number of the CPU's, and would be moved again.
    monkeypatch.setattr("accelerate.utils.modeling.check_device_same",
                        lambda one, other: one.type == other.type)


@pytest.fixture(params=["mixtral", "llama", "head"])
def stored(request, tmp_path):
    """A store with a checkpoint and the requests that it can answer; its size in bytes."""
    store, tokenizer = Store(str(tmp_path / "store")), tiny_tokenizer()
    model = tiny_model("mixtral" if request.param == "head" else request.param, tokenizer, 0)
    if request.param == "head":
        register("mixtral")
        torch.manual_seed(0)
        model.config.num_labels = 3
        model = AutoModelForSequenceClassification.from_config(model.config)
    else:
        # Weights in two places are copied for each device, which a number of the CPU's confuses.
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with store.attempt("model/m@1") as (attempt, output):
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    store.commit("model/m@1", {"attempt": attempt})
    shards = plan_shards(HEAD if request.param == "head" else REQUESTS, 2)
    store.write_bytes("evaluate/e@1/requests.parquet", _packed([s.table for s in shards],
                                                               shards[0].table.schema))
    return store, shards, (store.fetch("model/m@1") / "model.safetensors").stat().st_size


def actor(store, gpus):
    return Responder(store.uri, [("evaluate/e@1/requests.parquet", "evaluate/e@1")], "model/m@1",
                     "float32", 1, gpus, {}, {})


def answers(store, shards, actor):
    actor({"file": [0] * len(shards), "group": range(len(shards))})
    found = []
    for shard in shards:
        with store.open(_responses_file("evaluate/e@1", shard.id)) as stream:
            found += responses_from_table(pq.read_table(stream))
    return found


def test_an_actor_with_two_accelerators_spreads_the_model_and_answers_the_same(
    stored, monkeypatch
):
    store, shards, size = stored
    whole = answers(store, shards, actor(store, gpus=0))
    accelerators(monkeypatch, int(0.75 * size), int(0.75 * size))
    two = actor(store, gpus=2)
    model = two.engine.head.model if two.engine.head else two.engine.model
    homes = model.hf_device_map
    layers = [homes[f"model.layers.{n}"] for n in range(model.config.num_hidden_layers)]
    # Whole layers, in their order, first on the one and then on the other; nothing elsewhere.
    assert set(homes.values()) == {"cpu:0", "cpu:1"} and spread(model)
    assert layers == sorted(layers) and set(layers) == {"cpu:0", "cpu:1"}
    for name, home in homes.items():
        assert model.get_submodule(name)._hf_hook.execution_device == home
    assert answers(store, shards, two) == whole


def test_what_its_accelerators_cannot_hold_is_refused(stored, monkeypatch):
    store, shards, size = stored
    accelerators(monkeypatch, int(0.3 * size), int(0.3 * size))
    with pytest.raises(StageFailed, match="would hold a part of it.; take more of them, `gpus`"):
        answers(store, shards, actor(store, gpus=2))
