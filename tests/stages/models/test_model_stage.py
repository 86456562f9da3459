import json
import shutil
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from stages.data import packs
from stages.errors import BadInput, StageFailed
from stages.models.card import ModelCard
from stages.models.load import load, load_tokenizer
from stages.models.sources import PACK_MODELS
from stages.models.spec import SourceSpec
from stages.models.stage import run
from stages.models.tiny import CHAT_TEMPLATE, tiny_tokenizer
from tests.stages.models.tiny_folders import llama_folder, logits, plain


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("dense"))


def taken(source: str, output: Path, **fields) -> Path:
    output.mkdir()
    run(SourceSpec(source=source, **fields), {}, output)
    return output


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe"])
def test_a_tiny_model_loads_as_any_other(tmp_path, name):
    folder = taken(f"tiny:{name}", tmp_path / "model", seed=3)
    assert plain(folder).config.model_type == name
    assert ModelCard.read(folder).origin == f"tiny:{name}"
    assert logits(folder).std() > 0.1
    again = taken(f"tiny:{name}", tmp_path / "again", seed=3) / "model.safetensors"
    assert again.read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_local_folder_is_copied_without_code_and_foreign_files(dense, tmp_path):
    source = shutil.copytree(dense, tmp_path / "source")
    for name in ("modeling.py", "pytorch_model.bin", "optimizer.pt"):
        (source / name).write_text("raise SystemExit('executed')")
    folder = taken(f"file:{source}", tmp_path / "copy")
    assert torch.equal(logits(folder), logits(dense))
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATE
    assert not {"modeling.py", "pytorch_model.bin", "optimizer.pt"} & {
        path.name for path in folder.iterdir()
    }
    card = ModelCard.read(folder)
    assert card.origin == f"file:{source}"  # and not the card that lay in the folder
    assert card.notes == {"pad_token": "<|im_end|>", "chat_template": "yes"}


def test_the_hub_is_asked_for_the_pinned_revision_and_safetensors_only(
    dense, tmp_path, monkeypatch
):
    asked = {}

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return dense

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    folder = taken("hub:owner/name@abc123", tmp_path / "model")
    assert (asked["repository"], asked["revision"]) == ("owner/name", "abc123")
    assert "*.safetensors" in asked["patterns"]
    assert not {"*.bin", "*.py", "*.pt"} & set(asked["patterns"])
    assert torch.equal(logits(folder), logits(dense))
    # A branch stands for a commit, which names the folder of the hub's cache.
    assert ModelCard.read(folder).notes["commit"] == dense.name


def test_a_hub_that_cannot_be_reached_is_one_clear_line(tmp_path, monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection\nand nothing in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(StageFailed, match="hub:owner/name@main cannot be downloaded") as error:
        taken("hub:owner/name@main", tmp_path / "model")
    assert "\n" not in str(error.value)


def test_a_source_without_safetensors_is_refused(dense, tmp_path):
    source = shutil.copytree(dense, tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(StageFailed, match=r"holds no \*\.safetensors"):
        taken(f"file:{source}", tmp_path / "copy")


def test_an_unknown_architecture_from_the_hub_is_refused(dense, tmp_path, monkeypatch):
    snapshot = shutil.copytree(dense, tmp_path / "snapshot")
    config = json.loads((snapshot / "config.json").read_text()) | {"model_type": "lama9"}
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: snapshot)
    with pytest.raises(BadInput, match="model_type 'lama9' is not a known architecture"):
        taken("hub:owner/name@main", tmp_path / "model")


def test_missing_weights_are_refused_and_not_drawn_at_random(dense, tmp_path):
    source = shutil.copytree(dense, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageFailed, match=r"1 weights of llama .* first model\.layers\.2\.mlp\.up"):
        load(source)


def test_a_truncated_file_is_refused_in_one_line(dense, tmp_path):
    source = shutil.copytree(dense, tmp_path / "source")
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(StageFailed, match="cannot be loaded as a model") as error:
        load(source)
    assert "\n" not in str(error.value)


def test_a_loaded_model_is_exact_in_the_asked_precision_and_can_train(dense):
    model = load(dense)
    assert not model.training
    reference = plain(dense).state_dict()
    assert all(torch.equal(t, reference[name]) for name, t in model.state_dict().items())
    half = load(dense, dtype="bfloat16").state_dict()
    assert all(torch.equal(t, reference[name].bfloat16()) for name, t in half.items())
    tokens = torch.arange(3, 43)[None]
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_tokenizer_without_padding_pads_with_its_end_of_text(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    assert load_tokenizer(tmp_path).pad_token_id == 2
    with pytest.raises(StageFailed, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path / "nothing")


def write_gguf(folder: Path, file: Path) -> None:
    """The model of a folder as GGUF: rotary halves interleaved, tokens and chat template inside."""
    model, tokenizer = plain(folder), AutoTokenizer.from_pretrained(folder)
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    vocabulary = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get), "ÀÁ"]
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 3, *([1] * (len(vocabulary) - 3))])
    # A merge is required, and its result in the vocabulary; UTF-8 never has these side by side.
    writer.add_token_merges(["À Á"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name.startswith("model.layers."):
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                n = heads if "q_proj" in part else kv_heads
                weight = weight.view(n, 2, -1, config.hidden_size).transpose(1, 2)
                weight = weight.reshape(parameter.shape)
            new = f"blk.{layer}.{names[part]}.weight"
        else:
            new = {"model.embed_tokens.weight": "token_embd.weight"}.get(name, "output_norm.weight")
        writer.add_tensor(new, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_pack_becomes_an_ordinary_folder_with_the_same_logits(tmp_path, monkeypatch):
    dense = llama_folder(tmp_path / "dense", vocab_size=260, rms_norm_eps=1e-3)
    write_gguf(dense, tmp_path / "model.gguf")
    archive = tmp_path / packs.PACKS["smollm2"].archive
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.write(tmp_path / "model.gguf", PACK_MODELS["smollm2"])
    monkeypatch.setattr(packs, "fetch", lambda name: archive)
    folder = taken("pack:smollm2", tmp_path / "model")
    assert torch.equal(logits(folder), logits(dense))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (
        tokenizer("naïve 🙂<|im_end|>")["input_ids"]
        == tiny_tokenizer()("naïve 🙂<|im_end|>")["input_ids"]
    )
    assert ModelCard.read(folder).origin == "pack:smollm2"
