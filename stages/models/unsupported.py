"""Architectures of transformers with routed experts that are not in the registry, and why.

Each reason is what its modelling code in transformers 5.22 does that no entry of ``families.py``
can say, or that it has not been compared with plain transformers (``make test-families``).
"""

_SEES = "it reads images or sounds too, and its configuration holds that of its language model"
_NO_CLASS = "AutoModelForCausalLM of transformers has no class for it"
_STREAMS = "its residual stream is several, mixed by learned weights in each layer"
_UNTESTED = "it has not been through the tests of the families"
_FACTOR = "its block scales the sum of its experts by a factor of its own"

NO_FAMILY: dict[str, str] = {
    "beam": f"{_FACTOR}, and its layers weigh what they add by depth",
    "dbrx": "its router returns raw scores alone, and its experts are rows of flat matrices",
    "deepseek_v4": f"some of its layers choose experts by a table of tokens, and {_STREAMS}",
    "doge": "its experts are single neurons in embeddings, found by product keys",
    "gemma4": _SEES,
    "gemma4_text": (
        "its router returns probabilities in the place of raw scores, and its experts stand beside "
        "a dense block, in some models only"
    ),
    "hy_v4": _STREAMS,
    "inkling_text": "its router weighs shared experts and chosen ones against each other",
    "kolibri1": "its bias of the choice is added to raw scores, and norms follow its blocks",
    "llama4": _SEES,
    "llama4_text": (
        "its experts are given every token once for each of them, times a weight that is 0 for "
        "those not chosen"
    ),
    "longcat_flash": "its router may choose experts that compute nothing",
    "minimax_m3_vl_text": f"{_FACTOR}; {_UNTESTED}",
    "nemotron_h": (
        "its experts may work between two projections of their own, and its layers are attention, "
        "Mamba or experts"
    ),
    "qwen3_5_moe": f"{_SEES}, which alone is known, as qwen3_5_moe_text",
    "qwen4_exp": _SEES,
    "qwen4_exp_text": _STREAMS,
    "zaya": "its routers pass a state from layer to layer and may choose no expert",
    **dict.fromkeys(
        (
            *("ernie4_5_vl_moe", "glm4v_moe", "glm5_next", "mistral_large4", "muse_spark"),
            *("qwen3_omni_moe", "qwen3_vl_moe", "step3p7"),
        ),
        _SEES,
    ),
    **dict.fromkeys(
        (
            *("ernie4_5_vl_moe_text", "glm4v_moe_text", "glm5_next_text", "mistral4"),
            *("mistral_large4_text", "muse_spark_text", "qwen3_vl_moe_text", "step3p5"),
        ),
        _NO_CLASS,
    ),
}
"""``model_type`` to why it is refused."""
