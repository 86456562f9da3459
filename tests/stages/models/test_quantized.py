"""Quantized weights of a source lie in the store as plain ones, and load in the type asked for."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.errors import StageFailed
from stages.models import load as loading
from stages.models.card import ModelCard
from stages.models.load import load
from stages.models.quantized import dequantize
from stages.models.sources import check
from stages.models.spec import SourceSpec
from stages.models.stage import run
from stages.models.tiny import tiny_model, tiny_tokenizer

# After the table of the OCP Microscaling specification, by the four bits of a number.
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def released(folder: Path, family: str, quantization: dict, quantize) -> dict[str, torch.Tensor]:
    """A tiny model in bfloat16 with quantized weights; what these stand for, by name. ``quantize``
    makes of a name and a tensor what is stored and what it stands for, or None."""
    folder.mkdir()
    tokenizer = tiny_tokenizer()
    tiny_model(family, tokenizer, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored, meant = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        found = quantize(name, tensor)
        parts, meant[name] = found or ({name: tensor.bfloat16()}, tensor.bfloat16())
        stored |= parts
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": quantization, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def mxfp4(name: str, tensor: torch.Tensor):
    """Random numbers of four bits, 32 of them under one power of two, as GPT-OSS is released."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return None
    experts, inputs, outputs = tensor.shape
    generator = torch.Generator().manual_seed(len(name))
    bits = torch.randint(16, (experts, outputs, inputs // 32, 16, 2), generator=generator)
    scales = torch.randint(118, 123, (experts, outputs, inputs // 32), generator=generator)
    blocks = (bits[..., 0] + 16 * bits[..., 1]).to(torch.uint8)
    meant = FP4[bits].flatten(-2) * 2.0 ** (scales[..., None] - 127)
    parts = {f"{name}_blocks": blocks, f"{name}_scales": scales.to(torch.uint8)}
    return parts, meant.flatten(-2).transpose(1, 2)


def fp8(name: str, tensor: torch.Tensor):
    """Blocks of 16 by 16 numbers under one factor, as DeepSeek-V3 is released, whose biases of the
    choice stay in float32."""
    if name.endswith("e_score_correction_bias"):
        return {name: tensor}, tensor
    rows, columns = tensor.shape if tensor.ndim == 2 else (1, 1)
    if not name.endswith("_proj.weight") or rows % 16 or columns % 16:
        return None
    blocks = tensor.reshape(rows // 16, 16, columns // 16, 16)
    scale = blocks.abs().amax((1, 3)) / 448
    small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = (small.float() * scale[:, None, :, None]).reshape(tensor.shape).bfloat16()
    return {name: small.reshape(tensor.shape), f"{name}_scale_inv": scale}, meant


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn",
         "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
       "weight_block_size": [16, 16]}  # fmt: skip
CASES = {
    "mxfp4": partial(released, family="gpt_oss", quantization=MXFP4, quantize=mxfp4),
    "fp8": partial(released, family="deepseek_v3", quantization=FP8, quantize=fp8),
}


@pytest.mark.parametrize("method", CASES)
def test_a_source_lies_in_the_store_as_the_numbers_that_it_stands_for(method, tmp_path):
    meant = CASES[method](tmp_path / "source")
    with pytest.raises(StageFailed, match=rf"weights are quantized \({method}\); name it as"):
        load(tmp_path / "source")
    spec, folder = SourceSpec(source=f"file:{tmp_path / 'source'}"), tmp_path / "model"
    assert check(spec, "m") is None
    folder.mkdir()
    run(spec, {}, folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert ModelCard.read(folder).notes["dequantized"] == f"{method} to bfloat16"
    found = load_file(folder / "model.safetensors")
    assert found.keys() == meant.keys()
    for name, tensor in meant.items():
        assert torch.equal(found[name].float(), tensor.float()), name
    for dtype in ("float32", "bfloat16"):
        model = load(folder, dtype=dtype)
        assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    model.save_pretrained(tmp_path / "exported")  # as plain weights
    load(tmp_path / "exported")


def test_other_quantized_weights_are_refused_when_the_sweep_is_planned(tmp_path):
    CASES["mxfp4"](tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    problem = check(SourceSpec(source=f"file:{tmp_path / 'source'}"), "m")
    reason = "quantization_config: weights of gptq cannot be made plain ones here"
    assert problem.startswith(f"m.source: folder {tmp_path / 'source'}: {reason}")
    assert problem.endswith("take the model's bf16 weights")
    with pytest.raises(StageFailed, match=f"^{reason}"):  # from a hub, when it is there
        dequantize(tmp_path / "source")


@pytest.fixture
def kept(tmp_path):
    """ERNIE's routers stay in float32, whatever type is asked for."""
    tiny_model("ernie4_5_moe", tiny_tokenizer(), seed=1).save_pretrained(tmp_path)
    return tmp_path


def test_weights_that_an_architecture_keeps_in_float32_may_be_so(kept):
    model = load(kept, dtype="bfloat16")
    whole = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert whole and all("mlp.gate." in name for name in whole)


def test_a_weight_of_another_type_than_asked_for_is_refused(kept, monkeypatch):
    own = loading.from_folder

    def mixed(folder, **options):
        model = own(folder, **options)
        model.model.layers[1].mlp.experts.bfloat16()
        return model

    monkeypatch.setattr(loading, "from_folder", mixed)
    with pytest.raises(StageFailed, match=r"layers\.1\.mlp\.experts.* is of torch\.bfloat16 where"):
        load(kept)
