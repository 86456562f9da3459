"""One engine answers choices and generations of one list, in its order."""

import pytest
import torch

from stages.errors import StageFailed
from stages.evaluate.base import Request
from stages.evaluate.engine import Engine
from stages.evaluate.generate import generate
from stages.evaluate.scorer import score
from stages.models.tiny import tiny_model, tiny_tokenizer

REQUESTS = [
    Request("g0", "Hello", max_new_tokens=6, chat=True),
    Request("c0", "The sky is", (" blue", " green")),
    Request("c1", "A", (" b",)),
    Request("g1", "Once upon", max_new_tokens=3),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_model("mixtral", tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_responses_come_in_the_order_of_the_requests(folder):
    engine = Engine(folder)
    responses = engine.respond(REQUESTS)
    choices, generations = REQUESTS[1:3], [REQUESTS[0], REQUESTS[3]]
    model, tokenizer = engine.model, engine.tokenizer
    assert [responses[1], responses[2]] == score(model, tokenizer, choices)
    assert [responses[0], responses[3]] == generate(model, tokenizer, generations)
    assert Engine(folder).respond(REQUESTS) == responses
    assert engine.respond([]) == []


def test_precision_and_threads_are_those_asked_for(folder):
    before = torch.get_num_threads()
    engine = Engine(folder, dtype="bfloat16", threads=before + 1)
    assert engine.model.dtype == torch.bfloat16
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_a_folder_without_a_model_is_one_clear_failure(tmp_path):
    with pytest.raises(StageFailed, match=str(tmp_path)):
        Engine(tmp_path)
