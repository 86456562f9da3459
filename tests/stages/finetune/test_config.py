"""The DeepSpeed files: chosen by situation, filled in from the recipe, never against it."""

import json

import pytest

from stages.errors import BadInput
from stages.finetune import config
from stages.finetune.config import config_name, deepspeed_config, micro_batch_size
from stages.finetune.spec import FinetuneSpec, TrainSet


def spec(**fields):
    values = {
        "data": (TrainSet(dataset="d"),), "steps": 3, "batch_size": 24, "learning_rate": 2e-5,
        "weight_decay": 0.01, "gradient_clipping": 0.7, "workers": 2, "micro_batch": 5,
    }  # fmt: skip
    return FinetuneSpec(**values | fields)


@pytest.mark.parametrize(
    ("fields", "accelerator", "name"),
    [
        ({}, False, "cpu_dense.json"),
        ({"expert_parallel": 2}, False, "cpu_moe_expert_parallel.json"),
        ({"precision": "bf16"}, False, "cpu_dense_zero2.json"),
        ({"expert_parallel": 2, "precision": "bf16"}, False, "cpu_moe_expert_parallel_zero2.json"),
        ({}, True, "gpu_dense_zero2.json"),
        ({"expert_parallel": 2}, True, "gpu_moe_expert_parallel_zero2.json"),
    ],
)
def test_every_situation_has_its_file(fields, accelerator, name):
    assert config_name(spec(**fields), accelerator) == name
    filled = deepspeed_config(spec(**fields), accelerator)
    assert "auto" not in json.dumps(filled).replace("autoep", "")
    assert filled["train_batch_size"] == 24
    # 12 sequences per worker in micro-batches of at most 5
    assert filled["train_micro_batch_size_per_gpu"] == 4
    assert filled["gradient_accumulation_steps"] == 3
    assert filled["optimizer"]["params"]["lr"] == 2e-5
    stage = filled["zero_optimization"]["stage"]
    assert filled["gradient_clipping"] == (0.7 if stage else 0.0)  # the loop clips at stage 0
    assert filled.get("expert_parallel", {}).get("autoep_size", 1) == spec(**fields).expert_parallel


def test_adagrad_is_refused_where_deepspeed_puts_its_own_in_its_place():
    adagrad = {"optimizer": {"kind": "adagrad"}}
    assert deepspeed_config(spec(**adagrad), False)["optimizer"]["type"] == "Adagrad"
    for fields, accelerator in (({}, True), ({"precision": "bf16"}, False)):
        with pytest.raises(BadInput, match="zero2.json: at ZeRO stage 2 DeepSpeed puts an Adagrad"):
            deepspeed_config(spec(**adagrad, **fields), accelerator)


def test_results_are_known_by_the_micro_batch_that_is_used():
    """Of 24 sequences one worker takes 8 at a time, two take 6 each."""
    noisy = {"router": {"noise": 0.1}, "micro_batch": 8}
    found = [spec(**noisy, workers=workers) for workers in (1, 2, 3, 4)]
    assert [micro_batch_size(each) for each in found] == [8, 6, 8, 6]
    assert [each.identity()["micro_batch"] for each in found] == [8, 6, 8, 6]
    short = found[0].model_copy(update={"micro_batch": 4, "out_of_memory_at": (8,)})
    assert short.identity() == found[0].identity()


def test_a_share_that_is_not_whole_is_refused():
    assert micro_batch_size(spec(batch_size=14, micro_batch=6)) == 1
    assert micro_batch_size(spec(batch_size=14, micro_batch=7)) == 7
    with pytest.raises(BadInput, match="batch_size: 15 .* 2 workers"):
        micro_batch_size(spec(batch_size=15))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_batch_size": 8}, "train_batch_size is 8 but the recipe says 24"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping is 1\.0 but the recipe says 0\.0"),
        ({"zero_optimization": {"stage": 3}}, "memory_efficient_linear hides .* set it to false"),
        ({"expert_parallel": {"autoep_size": 2}}, "autoep_size is 2 but the recipe says 1"),
        ({"bf16": {}}, "bf16.enabled is missing"),
    ],
)
def test_a_file_against_the_recipe_is_refused(change, message, tmp_path, monkeypatch):
    content = json.loads((config.FOLDER / "cpu_dense.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps(content | change))
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    with pytest.raises(BadInput, match=f"own.json: .*{message}"):
        deepspeed_config(spec(deepspeed_config="own.json"), accelerator=False)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"comm_backend": "deepep"}, "expert_parallel.comm_backend has no effect"),
        ({"score_func": "sigmoid"}, "expert_parallel.score_func has no effect"),
        ({"enabled": False}, "enabled is False but the recipe spreads the experts"),
        ({"use_grouped_mm": None}, "use_grouped_mm is missing"),
    ],
)
def test_a_setting_of_expert_parallelism_acts_or_is_refused(
    section, message, tmp_path, monkeypatch
):
    content = json.loads((config.FOLDER / "cpu_moe_expert_parallel.json").read_text())
    content["expert_parallel"] |= section
    (tmp_path / "own.json").write_text(json.dumps(content))
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    with pytest.raises(BadInput, match=f"own.json: .*{message}"):
        deepspeed_config(spec(deepspeed_config="own.json", expert_parallel=2), accelerator=False)


@pytest.mark.parametrize(
    ("optimizer", "kind", "params"),
    [
        ({"kind": "adamw", "betas": (0.9, 0.95)}, "AdamW",
         {"betas": [0.9, 0.95], "eps": 1e-8, "torch_adam": True, "fused": True}),
        ({"kind": "adam"}, "Adam",
         {"betas": [0.9, 0.999], "eps": 1e-8, "torch_adam": True, "fused": True,
          "adam_w_mode": False}),
        ({"kind": "sgd", "momentum": 0.5}, "SGD", {"momentum": 0.5}),
        ({"kind": "adagrad"}, "Adagrad", {"eps": 1e-10}),
    ],
)  # fmt: skip
def test_the_optimiser_is_the_recipes(optimizer, kind, params):
    given = FinetuneSpec.model_validate(spec().model_dump() | {"optimizer": optimizer})
    section = deepspeed_config(given, accelerator=False)["optimizer"]
    assert section == {"type": kind, "params": params | {"lr": 2e-5, "weight_decay": 0.01}}


def test_betas_of_a_file_against_the_recipe_are_refused(tmp_path, monkeypatch):
    content = json.loads((config.FOLDER / "cpu_dense.json").read_text())
    content["optimizer"]["params"]["betas"] = [0.9, 0.95]
    (tmp_path / "own.json").write_text(json.dumps(content))
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    with pytest.raises(BadInput, match=r"betas is \[0.9, 0.95\] but the recipe says"):
        deepspeed_config(spec(deepspeed_config="own.json"), accelerator=False)


def test_frozen_experts_that_are_spread_are_refused_beyond_stage_0():
    given = {"freeze": ("expert",), "expert_parallel": 2}
    assert deepspeed_config(spec(**given), accelerator=False)
    with pytest.raises(BadInput, match="zero2.json: ZeRO stage 2 cannot .* expert_parallel to 1"):
        deepspeed_config(spec(**given), accelerator=True)


def test_bf16_is_refused_where_nothing_keeps_master_weights():
    with pytest.raises(BadInput, match="cpu_dense.json: bf16 needs ZeRO stage 1 or 2 for its fp32"):
        deepspeed_config(spec(precision="bf16", deepspeed_config="cpu_dense.json"), False)


FILES = sorted(file.name for file in config.FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_filled_in_and_explained(name):
    given = spec(deepspeed_config=name, expert_parallel=2 if "expert" in name else 1)
    assert name in (config.FOLDER / "README.md").read_text()
    filled = json.dumps(deepspeed_config(given, accelerator=True))
    assert "auto" not in filled.replace("autoep", "")


def test_adapters_are_refused_where_their_merging_would_need_whole_weights():
    lora = {"roles": ("backbone",)}
    given = FinetuneSpec.model_validate(
        spec(deepspeed_config="gpu_moe_expert_parallel_zero3.json").model_dump() | {"lora": lora}
    )
    with pytest.raises(BadInput, match="zero3.json: ZeRO stage 3 cannot merge .* remove lora"):
        deepspeed_config(given, accelerator=True)


def test_a_dense_model_may_share_the_file_of_its_twin():
    shared = spec(deepspeed_config="cpu_moe_expert_parallel.json")
    assert "expert_parallel" not in deepspeed_config(shared, accelerator=False)


def test_an_unknown_file_is_refused_with_the_known_ones():
    with pytest.raises(BadInput, match="no file zero9.json .* cpu_dense.json"):
        deepspeed_config(spec(deepspeed_config="zero9.json"), accelerator=False)
