"""Released models whose configuration is known here, so that a plan can estimate without a network.

Sizes are counted from the configuration by ``stages/models/size.py``, or, for architectures that
transformers lacks, worked out as the entry says. A model that is not here is of unknown size to the
planner. Light to import.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stages.models.card import forward_flops


@dataclass(frozen=True)
class Known:
    """Size of a model, as its configuration has it."""

    total: int
    """Parameters."""
    active: int
    """Parameters that one token uses."""
    flops_per_token: int
    """Operations of one token's forward pass (``ModelCard.flops_per_token``)."""
    bytes_per_parameter: int
    """Of the weights as published."""
    config: Mapping = field(default_factory=dict, repr=False)
    """Content of ``config.json`` that decides the size, defaults of transformers left out; empty
    where transformers has no such architecture."""
    tokens_per_image: int = 0
    """Patches of an image and the class token, of a vision model."""
    flops_per_expert: int = 0
    flops_per_read_token: int | None = None
    """As a card has them."""
    top_k: int = 0
    """Experts that one token passes."""

    @property
    def float32_head(self) -> int:
        """Bytes that a head in float32 adds to a language model in bfloat16: two for each of its
        weights, four where it shares them with the embedding; 0 where there is no configuration."""
        rows, tied = self.config.get("vocab_size", 0), self.config.get("tie_word_embeddings")
        width = self.config.get("hidden_size", self.config.get("d_model", 0))
        return rows * width * (4 if tied else 2)

    def flops(self, read: float, written: float) -> float:
        """Operations of a forward pass over so many tokens of prompts and of answers."""
        return forward_flops(self.flops_per_token, self.flops_per_read_token, read, written)


def _untied(**fields: object) -> dict:
    return {"tie_word_embeddings": False, **fields}


def _vit(total: int, flops_per_token: int, patch: int, **fields: int) -> Known:
    # Published at 384 pixels and with the thousand labels of ImageNet.
    config = {"model_type": "vit", "image_size": 384, "patch_size": patch, "num_labels": 1000}
    tokens = (384 // patch) ** 2 + 1
    return Known(total, total, flops_per_token, 4, config | fields, tokens)


VIT_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12}  # fmt: skip
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16}  # fmt: skip


def _moe(top_k: int, flops_per_expert: int, *size: object) -> Known:
    return Known(*size, top_k=top_k, flops_per_expert=flops_per_expert)


def _llama_moe(top_k: int, experts: int, total: int, active: int, flops_per_token: int) -> Known:
    # LLaMA-2-7B whose feed-forward blocks are cut into experts: counted in Mixtral's layout, whose
    # router is one matrix; theirs has some 30,000 parameters more in all.
    return _moe(top_k, 2 * 32 * 3 * 4096 * 11008 // experts, total, active, flops_per_token, 2)


KNOWN: dict[str, Known] = {
    "pack:smollm2": Known(
        134_515_008, 134_515_008, 268_959_744, 4,
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "hub:allenai/OLMoE-1B-7B-0924": _moe(
        8, 201_326_592, 6_919_161_856, 1_282_017_280, 2_357_723_136, 2,
        _untied(
            model_type="olmoe",
            vocab_size=50304,
            hidden_size=2048,
            intermediate_size=1024,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=16,
            num_experts=64,
            num_experts_per_tok=8,
        ),
    ),
    "hub:allenai/OLMo-1B-hf": Known(
        1_176_764_416, 1_176_764_416, 2_353_528_832, 4,
        {
            "model_type": "olmo",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "hub:Qwen/Qwen1.5-MoE-A2.7B": _moe(
        4, 415_236_096, 14_315_784_192, 2_689_173_504, 4_755_521_536, 2,
        _untied(
            model_type="qwen2_moe",
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=5632,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            num_experts=60,
            num_experts_per_tok=4,
        ),
    ),
    "hub:Qwen/Qwen1.5-1.8B": Known(
        1_836_828_672, 1_836_828_672, 3_050_831_872, 2,
        _untied(
            model_type="qwen2",
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=5504,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
        ),
    ),
    "hub:Qwen/Qwen3-30B-A3B-Base": _moe(
        8, 452_984_832, 30_532_122_624, 3_353_032_704, 6_083_313_664, 2,
        _untied(
            model_type="qwen3_moe",
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
        ),
    ),
    "hub:Qwen/Qwen3-4B-Base": Known(
        4_022_468_096, 4_022_468_096, 8_044_544_000, 2,
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
    "hub:mistralai/Mixtral-8x7B-v0.1": _moe(
        2, 11_274_289_152, 46_702_792_704, 12_879_925_248, 25_497_174_016, 2,
        _untied(
            model_type="mixtral",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
    ),
    "hub:mistralai/Mistral-7B-v0.1": Known(
        7_241_732_096, 7_241_732_096, 14_220_787_712, 2,
        _untied(
            model_type="mistral",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
    ),
    # 28 layers of plain attention (4 x 2048 x 2048), the first with 3 x 2048 x 10944, the others
    # with a router of 64 x 2048 and 64 routed (6 used) and 2 shared experts of 3 x 2048 x 1408;
    # embedding and head of 102400 x 2048 each; 57 norms of 2048.
    "hub:deepseek-ai/deepseek-moe-16b-base": _moe(
        6, 467_140_608, 16_375_728_128, 2_828_650_496, 5_237_637_120, 2
    ),
    "hub:deepseek-ai/DeepSeek-V2-Lite": _moe(
        6, 449_839_104, 15_706_484_224, 2_661_150_208, 4_902_617_088, 2,
        _untied(
            model_type="deepseek_v2",
            vocab_size=102400,
            hidden_size=2048,
            intermediate_size=10944,
            moe_intermediate_size=1408,
            num_hidden_layers=27,
            num_attention_heads=16,
            num_key_value_heads=16,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            first_k_dense_replace=1,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
        ),
    ),
    "hub:deepseek-ai/deepseek-llm-7b-base": Known(
        6_910_365_696, 6_910_365_696, 12_981_370_880, 2,
        _untied(
            model_type="llama",
            vocab_size=102400,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=30,
            num_attention_heads=32,
            num_key_value_heads=32,
        ),
    ),
    "hub:google/switch-base-32": Known(
        1_978_514_688, 223_198_464, 446_300_160, 4,
        {
            "model_type": "switch_transformers",
            "vocab_size": 32128,
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 3072,
            "num_layers": 12,
            "num_decoder_layers": 12,
            "num_heads": 12,
            "num_experts": 32,
            "num_sparse_encoder_layers": 6,
            "num_sparse_decoder_layers": 6,
            "tie_word_embeddings": True,
        },
        flops_per_read_token=198_475_776,
        flops_per_expert=113_246_208,
        top_k=1,
    ),
    "hub:google-t5/t5-base": Known(
        222_903_552, 222_903_552, 445_710_336, 4,
        {
            "model_type": "t5",
            "vocab_size": 32128,
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 3072,
            "num_layers": 12,
            "num_decoder_layers": 12,
            "num_heads": 12,
            "tie_word_embeddings": True,
        },
        flops_per_read_token=198_180_864,
    ),
    "hub:EleutherAI/pythia-410m": Known(
        405_334_016, 405_334_016, 707_002_368, 2,
        _untied(
            model_type="gpt_neox",
            vocab_size=50304,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
        ),
    ),
    "hub:EleutherAI/pythia-1.4b": Known(
        1_414_647_808, 1_414_647_808, 2_621_964_288, 2,
        _untied(
            model_type="gpt_neox",
            vocab_size=50304,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=16,
        ),
    ),
    "hub:llama-moe/LLaMA-MoE-v1-3_0B-2_16": _llama_moe(
        2, 16, 6_740_512_768, 2_953_056_256, 5_643_436_032
    ),
    "hub:llama-moe/LLaMA-MoE-v1-3_5B-4_16": _llama_moe(
        4, 16, 6_740_512_768, 3_494_121_472, 6_725_566_464
    ),
    "hub:llama-moe/LLaMA-MoE-v1-3_5B-2_8": _llama_moe(
        2, 8, 6_739_464_192, 3_493_072_896, 6_723_469_312
    ),
    **dict.fromkeys(
        ("hub:openlm-research/open_llama_3b", "hub:openlm-research/open_llama_3b_v2"),
        Known(
            3_426_473_600,
            3_426_473_600,
            6_647_808_000,
            2,
            _untied(
                model_type="llama",
                vocab_size=32000,
                hidden_size=3200,
                intermediate_size=8640,
                num_hidden_layers=26,
                num_attention_heads=32,
                num_key_value_heads=32,
            ),
        ),
    ),
    "hub:openlm-research/open_llama_7b": Known(
        6_738_415_616, 6_738_415_616, 13_214_154_752, 2,
        _untied(
            model_type="llama",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
        ),
    ),
    "hub:google/vit-base-patch32-384": _vit(88_297_192, 174_587_904, 32, **VIT_B),
    "hub:google/vit-base-patch16-384": _vit(86_859_496, 171_048_960, 16, **VIT_B),
    "hub:google/vit-large-patch32-384": _vit(306_632_680, 610_271_232, 32, **VIT_L),
}
"""Source without its revision to size."""

ARCHITECTURES: dict[str, str] = {
    **{source: "llama_moe" for source in KNOWN if source.startswith("hub:llama-moe/")},
    "hub:ibm/MoLM-350M-4B": "moduleformer",
    "hub:ibm/MoLM-700M-4B": "moduleformer",
}
"""Source without its revision to ``model_type``, of those whose configuration is not here."""

CANNOT_RUN: dict[str, str] = {
    "hub:deepseek-ai/deepseek-moe-16b-base": (
        "transformers has no 'deepseek', and a model's own code is never run"
    ),
    "hub:ibm/MoLM-700M-8B": "at commit 34d691a its weights are pickle files, which are never read",
}
"""Source without its revision to why nothing can be run of it."""

CONVERTED: dict[str, str] = {
    "hub:llama-moe/LLaMA-MoE-v1-3_0B-2_16@main": "refs/pr/2",
    "hub:llama-moe/LLaMA-MoE-v1-3_5B-4_16@main": "refs/pr/3",
    "hub:llama-moe/LLaMA-MoE-v1-3_5B-2_8@main": "refs/pr/2",
    # Not commit 0345cf1: its tokenizer is one that was taken back.
    "hub:openlm-research/open_llama_3b@main": "refs/pr/1",
    "hub:openlm-research/open_llama_7b@main": "refs/pr/8",
    "hub:deepseek-ai/deepseek-llm-7b-base@main": "refs/pr/3",
    "hub:safepaca/absolute-harmfulness-predictor-redteam@main": "refs/pr/1",
}
"""Source without safetensors to the revision with a conversion that was offered to its repository,
as copies of the hub's pages show."""


def cannot_run(source: str) -> str | None:
    """Why nothing can be run of a source, or None where nothing speaks against it."""
    if source in CONVERTED:
        return (
            f"its weights are pickle files, which are never read; name @{CONVERTED[source]}, a "
            "conversion"
        )
    return CANNOT_RUN.get(source.partition("@")[0])


def known(source: str) -> Known | None:
    """The entry of a source, whatever its revision."""
    return KNOWN.get(source.partition("@")[0])
