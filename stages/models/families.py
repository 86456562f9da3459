"""What is what inside a model: the one place that knows it, per Hugging Face ``model_type``.

Everything that freezes, perturbs, records, forces or counts a part of a model asks here. A part is
named by the path of its module, compared component by component with ``*`` standing for one
component (``model.layers.*.mlp.gate`` is a router and ``model.layers.*.mlp.gate_proj`` is not). A
new architecture is one entry of ``FAMILIES``.

Light to import: neither torch nor transformers is needed to describe a configuration.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stages.errors import BadInput

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

Role = Literal[
    "router", "expert", "shared_expert", "shared_expert_gate", "embedding", "head", "backbone"
]
"""``expert`` is a routed expert. A head tied to the embedding has no parameters of its own.
``backbone`` is everything else: attention, norms, dense feed-forward blocks."""


@dataclass(frozen=True)
class Family:
    """One architecture. The path fields are empty for a dense one."""

    model_type: str
    router: str = ""
    """Module whose parameters score the experts."""
    experts: str = ""
    """Module that holds all routed experts of a layer; the first axis of its fused parameters, or
    the index of its children, is the expert."""
    shared_expert: str = ""
    """Feed-forward block that every token of a sparse layer passes."""
    shared_expert_gate: str = ""
    """Module that scales the shared expert's output per token."""
    num_experts: str = "num_experts"
    """Configuration attribute: routed experts of a sparse layer."""
    top_k: str = "num_experts_per_tok"
    """Configuration attribute: experts that one token passes."""
    sparse_layers: Callable[[Mapping], tuple[int, ...]] = lambda config: ()
    """Indices of the sparse layers, from the content of ``config.json``."""
    auxiliary_loss: bool = False
    """``forward(output_router_logits=True)`` returns the load-balancing loss as ``aux_loss``,
    unweighted, and adds it to ``loss`` times ``config.router_aux_loss_coef``."""
    capacity: bool = False
    """Experts drop tokens beyond a capacity, so that a token's output depends on the tokens that
    share its batch: sequences must not be packed together."""

    @property
    def is_moe(self) -> bool:
        """Whether the architecture has routed experts."""
        return bool(self.router)

    def modules(self, model: "PreTrainedModel", role: Role) -> dict[str, "nn.Module"]:
        """The modules of a role by their path, in the order of the layers."""
        path = getattr(self, "experts" if role == "expert" else role)
        pattern = re.compile(re.escape(path).replace(r"\*", r"[^.]+"))
        # The root module's path is empty, like the path of a part that the family lacks.
        return {name: m for name, m in model.named_modules() if name and pattern.fullmatch(name)}


def _every_layer(config: Mapping) -> tuple[int, ...]:
    return tuple(range(config["num_hidden_layers"]))


def _qwen2_moe_layers(config: Mapping) -> tuple[int, ...]:
    dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    return tuple(
        i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0
    )


_MOE = (
    Family(
        "mixtral",
        router="model.layers.*.mlp.gate",
        experts="model.layers.*.mlp.experts",
        num_experts="num_local_experts",
        sparse_layers=_every_layer,
        auxiliary_loss=True,
    ),
    Family(
        "qwen2_moe",
        router="model.layers.*.mlp.gate",
        experts="model.layers.*.mlp.experts",
        shared_expert="model.layers.*.mlp.shared_expert",
        shared_expert_gate="model.layers.*.mlp.shared_expert_gate",
        sparse_layers=_qwen2_moe_layers,
        auxiliary_loss=True,
    ),
    Family(
        "olmoe",
        router="model.layers.*.mlp.gate",
        experts="model.layers.*.mlp.experts",
        sparse_layers=_every_layer,
        auxiliary_loss=True,
    ),
)
_DENSE = (
    *("cohere", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite"),
    *("llama", "mistral", "olmo", "olmo2", "olmo3", "opt", "phi", "phi3"),
    *("qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
)
FAMILIES: dict[str, Family] = {
    entry.model_type: entry for entry in (*_MOE, *(Family(name) for name in _DENSE))
}


def family(model: "PreTrainedModel | PretrainedConfig | Mapping") -> Family:
    """The family of a model, its configuration, or the content of its ``config.json``.

    Raises BadInput for a ``model_type`` that has no entry, with the nearest one that has.
    """
    config = getattr(model, "config", model)
    name = config.get("model_type") if isinstance(config, Mapping) else config.model_type
    if name not in FAMILIES:
        near = difflib.get_close_matches(str(name), FAMILIES, n=1, cutoff=0)[0]
        raise BadInput(
            f"model_type {name!r} is not a known architecture (nearest: {near}); "
            "add an entry to stages/models/families.py"
        )
    return FAMILIES[name]


def roles(model: "PreTrainedModel") -> dict[str, Role]:
    """The role of each parameter of a model, by its name in ``named_parameters``.

    Raises BadInput when the configuration promises experts and no router is found, which means
    that this version of transformers lays the architecture out in another way.
    """
    entry = family(model)
    modules: dict[str, Role] = {}
    if entry.is_moe:
        for role in ("router", "expert", "shared_expert", "shared_expert_gate"):
            modules |= dict.fromkeys(entry.modules(model, role), role)
        if entry.sparse_layers(model.config.to_dict()) and "router" not in modules.values():
            raise BadInput(
                f"{entry.model_type}: no module {entry.router}; mend the entry in "
                "stages/models/families.py for the installed transformers"
            )
    head = model.get_output_embeddings()
    if head is not None:
        modules[_path(model, head)] = "head"
    # Last, because a tied head's weight is listed under the embedding's name.
    modules[_path(model, model.get_input_embeddings())] = "embedding"

    def role(parameter: str) -> Role:
        path = parameter
        while path := path.rpartition(".")[0]:
            if path in modules:
                return modules[path]
        return "backbone"

    return {name: role(name) for name, _ in model.named_parameters()}


def _path(model: "PreTrainedModel", wanted: "nn.Module") -> str:
    return next(path for path, module in model.named_modules() if module is wanted)
