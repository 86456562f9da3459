"""DeepSpeed's JSON files: which one a fine-tune uses, and the values that its spec fills in.

A file in ``deepspeed_configs/`` is complete; ``"auto"`` marks what comes from the spec. Light to
import, so that a planner can refuse a wrong file.
"""

import json
from pathlib import Path

from stages.errors import BadInput
from stages.finetune.spec import FinetuneSpec

FOLDER = Path(__file__).parents[2] / "deepspeed_configs"
OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "adagrad": "Adagrad"}
"""All treat each parameter element by element, so that ZeRO's partitions change nothing."""


def micro_batch_size(spec: FinetuneSpec) -> int:
    """The sequences of a forward pass. Raises BadInput where workers cannot share a batch."""
    if spec.batch_size % spec.workers:
        raise BadInput(
            f"batch_size: {spec.batch_size} sequences cannot be shared by {spec.workers} workers; "
            "take a multiple of workers"
        )
    return spec.used_micro_batch


def config_name(spec: FinetuneSpec, accelerator: bool) -> str:
    """File name of the DeepSpeed configuration that fits the spec and the device."""
    if spec.deepspeed_config is not None:
        return spec.deepspeed_config
    model = "moe_expert_parallel" if spec.expert_parallel > 1 else "dense"
    if accelerator:
        return f"gpu_{model}_zero2.json"
    return f"cpu_{model}.json" if spec.precision == "fp32" else f"cpu_{model}_zero2.json"


def deepspeed_config(spec: FinetuneSpec, accelerator: bool) -> dict:
    """The content of the file with every ``"auto"`` filled in.

    Raises ``BadInput`` when the file is missing or sets a value of the spec to something else.
    """
    path = FOLDER / config_name(spec, accelerator)
    if not path.is_file():
        known = ", ".join(sorted(file.name for file in FOLDER.glob("*.json")))
        raise BadInput(f"deepspeed_config: no file {path.name} in {FOLDER}; known: {known}")
    config = json.loads(path.read_text())
    stage = config["zero_optimization"]["stage"]
    micro = micro_batch_size(spec)
    values: dict[tuple[str, ...], object] = {
        ("train_batch_size",): spec.batch_size,
        ("train_micro_batch_size_per_gpu",): micro,
        ("gradient_accumulation_steps",): spec.batch_size // spec.workers // micro,
        # At stage 0 the loop clips: DeepSpeed averages the norms of the ranks there, which is
        # wrong for parameters that are not replicated (DeepSpeed#8475).
        ("gradient_clipping",): 0.0 if stage == 0 else spec.gradient_clipping or 0.0,
        ("optimizer", "type"): OPTIMIZERS[spec.optimizer.kind],
        ("optimizer", "params", "lr"): spec.learning_rate,
        ("optimizer", "params", "weight_decay"): spec.weight_decay,
        ("bf16", "enabled"): spec.precision == "bf16",
    }
    for name, value in spec.optimizer.model_dump(mode="json", exclude={"kind"}).items():
        config["optimizer"]["params"].setdefault(name, "auto")  # SGD's momentum
        values["optimizer", "params", name] = value
    if spec.expert_parallel > 1 or "expert_parallel" in config:
        values["expert_parallel", "autoep_size"] = spec.expert_parallel
    for keys, value in values.items():
        section = config
        for key in keys[:-1]:
            section = section.get(key, {})
        if keys[-1] not in section:
            raise BadInput(f'{path.name}: {".".join(keys)} is missing; write "auto"')
        if section[keys[-1]] not in ("auto", value):
            raise BadInput(
                f"{path.name}: {'.'.join(keys)} is {section[keys[-1]]!r} but the recipe says "
                f'{value!r}; write "auto"'
            )
        section[keys[-1]] = value
    _keep_own_parameters(config, spec)
    if stage > 0 and spec.expert_parallel > 1 and not spec.trains("expert"):
        raise BadInput(
            f"{path.name}: ZeRO stage {stage} cannot partition a model whose experts are spread "
            "and frozen; set expert_parallel to 1, or train in fp32 with a file of stage 0"
        )
    if stage == 3 and spec.lora is not None:
        raise BadInput(
            f"{path.name}: ZeRO stage 3 cannot merge adapters into the weights that it partitions; "
            "remove lora, or take a file of stage 2"
        )
    if stage == 3 and config["zero_optimization"].get("memory_efficient_linear", True):
        raise BadInput(
            f"{path.name}: zero_optimization.memory_efficient_linear hides the routers' logits; "
            "set it to false"
        )
    if stage > 0 and spec.optimizer.kind == "adagrad":
        raise BadInput(
            f"{path.name}: at ZeRO stage {stage} DeepSpeed puts an Adagrad of its own in the place "
            "of the recipe's, which no schedule reaches; take another optimizer, or train in fp32 "
            "with a file of stage 0"
        )
    if stage == 0 and spec.precision == "bf16":
        raise BadInput(f"{path.name}: bf16 needs ZeRO stage 1 or 2 for its fp32 master weights")
    if spec.expert_parallel == 1:
        config.pop("expert_parallel", None)  # a dense model, or whole experts on every rank
    else:
        _check_expert_parallel(path.name, config["expert_parallel"])
    return config


def in_order(section: dict) -> dict[str, str]:
    """Let ZeRO reduce gradients in the same order on every rank, for experts that are modules.

    Stage 2 does so as they arise, and they arise in another order where ranks call other experts:
    the sums are wrong then, without an error. Stage 1 does it at the end of a step. Returns what
    the run's evidence says where that is another stage than the file's.
    """
    asked = section["stage"]
    if asked in (1, 2):
        section |= {"stage": 1, "overlap_comm": False}
    if section["stage"] == asked:
        return {}
    return {"reason": "stage 2 sums gradients as they arise, which differs between workers that "
                      "call other experts; stage 1 sums them at the end of a step"}


def _check_expert_parallel(name: str, section: dict) -> None:
    """Refuse settings of DeepSpeed's expert parallelism that the conversion does not act on."""
    for key, value in section.items():
        if key not in ("enabled", "autoep_size", "use_grouped_mm"):
            raise BadInput(
                f"{name}: expert_parallel.{key} has no effect, since routing and experts stay the "
                "model's own; remove it"
            )
        if key == "enabled" and value is not True:
            raise BadInput(
                f"{name}: expert_parallel.enabled is {value!r} but the recipe spreads the experts; "
                "write true"
            )
    if not isinstance(section.get("use_grouped_mm"), bool):
        raise BadInput(f"{name}: expert_parallel.use_grouped_mm is missing; write true or false")


def _keep_own_parameters(config: dict, spec: FinetuneSpec) -> None:
    """Drop what a file has for Adam and the recipe's optimiser does not know."""
    params = config["optimizer"]["params"]
    for name, value in list(params.items()):
        if value == "auto":
            del params[name]
    if spec.optimizer.kind == "adam":
        params["adam_w_mode"] = False  # otherwise DeepSpeed takes Adam for AdamW
    elif spec.optimizer.kind != "adamw":
        for name in ("torch_adam", "fused"):
            params.pop(name, None)
        # Torch's SGD is not on DeepSpeed's list.
        config["zero_allow_untested_optimizer"] = True
