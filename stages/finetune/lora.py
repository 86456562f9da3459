"""Low-rank adapters by PEFT, put into the model in place and merged into its weights at the end."""

from functools import partial

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.utils import transformers_weight_conversion as weight_conversion
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.errors import StageFailed
from stages.finetune.evidence import Evidence
from stages.finetune.parameters import trained_roles
from stages.finetune.recipe import Lora
from stages.models.families import family
from stages.models.routing import replaced

ADAPTER = "default"


def adapt(model: PreTrainedModel, recipe: Lora, evidence: Evidence) -> LoraModel:
    """Give every matrix of the roles that a gradient reaches an adapter; the modules keep their
    paths.

    The adapters are drawn from PyTorch's random state and start without effect. Fused experts and
    routers without a linear layer are adapted as parameters, one adapter per expert.
    """
    if model.config.tie_word_embeddings and {"head", "embedding"} & set(recipe.roles):
        raise StageFailed(
            f"lora.roles: the head of this {model.config.model_type} is tied to its embedding, "
            "so an adapter of one would also change the other; remove head and embedding"
        )
    entry, role_of = family(model), trained_roles(model)
    modules, parameters = [], []
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            role = role_of.get(f"{path}.{name}")  # none for a tied head
            if role not in recipe.roles or entry.has_no_gradient(f"{path}.{name}"):
                continue
            if isinstance(module, nn.Linear):
                modules.append(path)
            elif isinstance(module, nn.Embedding):
                # OPT's positions are looked up by a mask, which an adapter would take for rows.
                if role == "embedding" or type(module).forward is nn.Embedding.forward:
                    modules.append(path)
            elif role in ("expert", "router") or isinstance(module, Conv1D):  # no state of a mixer
                if weight.ndim == (3 if role == "expert" else 2):  # not a bias
                    parameters.append(f"{path}.{name}")
    if parameters and recipe.dropout:
        raise StageFailed(
            f"lora.dropout: cannot act on {parameters[0]}, which is no linear layer; set it to 0"
        )
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=sorted(set(modules)),
        target_parameters=parameters or None,
    )
    # PEFT would read the names as those of an older layout of the experts, and move adapters from a
    # dense layer's matrices to the routed experts.
    with replaced(weight_conversion, "convert_peft_config_for_transformers", _as_they_are):
        tuner = LoraModel(model, config, ADAPTER)
    model.train(model.training)  # the adapters' dropout begins in training
    # PEFT freezes all but its adapters, also what the recipe trains in full.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted.get(name, "lora_" in name))
    dropouts = [m for path, m in model.named_modules() if path.endswith(f"lora_dropout.{ADAPTER}")]
    for module in dropouts if recipe.dropout else ():
        module.register_forward_hook(partial(_watch, evidence))
    return tuner


def _watch(
    evidence: Evidence, module: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor
) -> None:
    if module.training:
        dropped = out[args[0] != 0] == 0
        evidence.mean("lora", "share_of_inputs_dropped", dropped)


def _as_they_are(config: LoraConfig, **_: object) -> None:
    """The targets name modules and parameters of the model that is here."""


@torch.no_grad()
def merge(tuner: LoraModel) -> PreTrainedModel:
    """Add the adapters to the weights and take them out: the plain model again."""
    return tuner.merge_and_unload()
