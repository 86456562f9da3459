"""A model whose layers do not all fit on one device answers as one that does."""

import json

import pytest

from stages.errors import StageFailed
from stages.evaluate.base import Request
from stages.evaluate.engine import Engine, device_of
from stages.evaluate.techniques import DoLa, ExpertCount
from stages.models.load import load, spread
from stages.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module", params=["mixtral", "llama"])
def folder(request, tmp_path_factory):
    tokenizer, folder = tiny_tokenizer(), tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def limit(folder, share=2):
    """Half of the weights' bytes in float32, or another share."""
    return {"cpu": (folder / "model.safetensors").stat().st_size // share}


def requests(moe):
    techniques = ["", DoLa(kind="dola", candidate_layers=(1, 2)).model_dump_json()]
    techniques += [ExpertCount(kind="expert_count", top_k=1).model_dump_json()] if moe else []
    return [
        request
        for number, technique in enumerate(techniques)
        for request in (
            Request(f"{number}/choice", "Which?", (" one", " another"), technique=technique),
            Request(f"{number}/text", "Once upon", max_new_tokens=5, technique=technique),
        )
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_under_a_memory_limit_are_the_same(folder, tmp_path, dtype):
    asked = requests(json.loads((folder / "config.json").read_text())["model_type"] == "mixtral")
    whole = Engine(folder, dtype=dtype).respond(asked)
    limited = limit(folder, 4 if dtype == "bfloat16" else 2)
    engine = Engine(folder, dtype=dtype, device="auto", max_memory=limited, offload=tmp_path)
    assert set(engine.model.hf_device_map.values()) == {"cpu", "disk"} and spread(engine.model)
    assert engine.respond(asked) == whole
    # The weights that are read at each pass were not kept after the last one.
    assert any(parameter.is_meta for parameter in engine.model.parameters())
    assert engine.respond(asked) == whole


def test_a_model_larger_than_its_accelerators_is_refused(folder):
    with pytest.raises(StageFailed, match="take more of them, `gpus`|cannot be loaded"):
        load(folder, device="auto", max_memory=limit(folder))
    assert not spread(load(folder))


def test_several_accelerators_share_a_model():
    assert [device_of(gpus) for gpus in (0, 0.5, 1, 2)] == ["cpu", "cuda", "cuda", "auto"]
