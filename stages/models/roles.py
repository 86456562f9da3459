"""The role of each parameter of a model, by what its family's entry says.

Light to import: torch and transformers are there already where there is a model.
"""

from typing import TYPE_CHECKING

from stages.errors import BadInput
from stages.models.families import family
from stages.models.family import Role

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def head_of(model: "PreTrainedModel") -> "nn.Module | None":
    """What turns the last hidden states into outputs: logits of the vocabulary, or of labels."""
    head = model.get_output_embeddings()
    return getattr(model, "score", None) if head is None else head


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
    head = None if entry.head else head_of(model)
    if head is not None:
        modules[_path(model, head)] = "head"
    # Last, because a tied head's weight is listed under the embedding's name.
    if not entry.embedding:
        modules[_path(model, model.get_input_embeddings())] = "embedding"
    for role in ("head", "embedding"):
        if getattr(entry, role):
            modules |= dict.fromkeys(entry.modules(model, role), role)

    def role(parameter: str) -> Role:
        path = parameter
        while path := path.rpartition(".")[0]:
            if path in modules:
                return modules[path]
        return "backbone"

    return {name: role(name) for name, _ in model.named_parameters()}


def _path(model: "PreTrainedModel", wanted: "nn.Module") -> str:
    return next(path for path, module in model.named_modules() if module is wanted)
