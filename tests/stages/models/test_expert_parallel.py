"""The conversion in one process, whose group of ranks is itself: what it keeps and refuses.

What several ranks compute is compared family by family in tests/families.
"""

from dataclasses import replace

import pytest
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from stages.errors import StageFailed
from stages.finetune.loop import start_distributed
from stages.models.expert_parallel import convert
from stages.models.families import FAMILIES
from stages.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def model(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    start_distributed()
    return tiny_model("mixtral", tiny_tokenizer(), seed=0)


def test_modules_and_parameters_stay_the_same_objects(model):
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    convert(model, 1, grouped_mm=True)
    assert {name: id(m) for name, m in model.named_modules()} == {
        name: id(m) for name, m in modules.items()
    }
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
    assert isinstance(model.get_submodule("model.layers.2.mlp.experts"), MixtralExperts)


@pytest.mark.parametrize("grouped_mm", [True, False])
def test_grouped_products_are_used_when_asked_for(model, grouped_mm):
    convert(model, 1, grouped_mm=grouped_mm)
    assert model.config._experts_implementation == ("grouped_mm" if grouped_mm else "eager")


def test_a_size_that_does_not_divide_the_experts_is_refused(model):
    with pytest.raises(StageFailed, match="expert_parallel: 3 does not divide the model's 4"):
        convert(model, 3, grouped_mm=True)


def test_a_refused_family_is_told_with_the_reason(model, monkeypatch):
    refused = replace(FAMILIES["mixtral"], no_expert_parallel="it is not exact")
    monkeypatch.setitem(FAMILIES, "mixtral", refused)
    with pytest.raises(StageFailed, match="refused for mixtral: it is not exact; set expert_par"):
        convert(model, 2, grouped_mm=True)
