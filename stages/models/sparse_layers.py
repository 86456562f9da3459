"""Which layers of an architecture are sparse, from the content of its ``config.json``."""

from collections.abc import Callable, Mapping


def every_layer(config: Mapping) -> tuple[int, ...]:
    """All layers."""
    return tuple(range(config["num_hidden_layers"]))


def after(field: str, default: int) -> Callable[[Mapping], tuple[int, ...]]:
    """All layers but the first ones, whose number is a field of the configuration."""
    return lambda config: tuple(range(config.get(field, default), config["num_hidden_layers"]))


def listed(dense: int, field: str = "", step: str = "") -> Callable[[Mapping], tuple[int, ...]]:
    """The layers that ``mlp_layer_types`` calls sparse; without it, all but the first ones, whose
    number is a field of the configuration that the architecture reads, or else ``dense``. Of these
    only multiples of the field ``step``, where the architecture reads one."""

    def layers(config: Mapping) -> tuple[int, ...]:
        kinds = config.get("mlp_layer_types")
        if kinds is None:
            return tuple(i for i in after(field, dense)(config) if i % config.get(step, 1) == 0)
        return tuple(i for i in range(config["num_hidden_layers"]) if kinds[i] == "sparse")

    return layers


def qwen2_moe_layers(config: Mapping) -> tuple[int, ...]:
    """Every ``decoder_sparse_step``-th layer that ``mlp_only_layers`` does not name."""
    dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    return tuple(
        i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0
    )


def flint_layers(config: Mapping) -> tuple[int, ...]:
    """As ``qwen2_moe_layers``; where ``mlp_only_layers`` is not told, the first two are dense."""
    dense = config.get("mlp_only_layers")
    return qwen2_moe_layers({**config, "mlp_only_layers": (0, 1) if dense is None else dense})


def jamba_layers(config: Mapping) -> tuple[int, ...]:
    """Every ``expert_layer_period``-th layer from ``expert_layer_offset`` on."""
    period, offset = config.get("expert_layer_period", 2), config.get("expert_layer_offset", 1)
    return tuple(i for i in range(config["num_hidden_layers"]) if i % period == offset)


def ernie_layers(config: Mapping) -> tuple[int, ...]:
    """Every ``moe_layer_interval``-th layer from a first to a last one."""
    count, step = config["num_hidden_layers"], config.get("moe_layer_interval", 1)
    last = config.get("moe_layer_end_index", -1) % count
    first = config.get("moe_layer_start_index", 1)
    return tuple(i for i in range(first, last + 1) if (i + 1) % step == 0)


def switch_layers(config: Mapping) -> tuple[int, ...]:
    """Layers of encoder and decoder, counted through both, as Switch Transformers builds them."""
    found, first = [], 0
    for half, count in zip(("encoder", "decoder"), SWITCH_LAYERS, strict=True):
        layers, sparse = config[count], config.get(f"num_sparse_{half}_layers", 3)
        step = layers // sparse if sparse else layers
        found += [first + i for i in range(layers) if i % step == 1 or step == 1]
        first += layers
    return tuple(found)


def nllb_layers(config: Mapping) -> tuple[int, ...]:
    """Layers of encoder and decoder, counted through both, as NLLB-MoE builds them."""
    found, first = [], 0
    for half in ("encoder", "decoder"):
        layers, step = config[f"{half}_layers"], config.get(f"{half}_sparse_step", 4)
        found += [first + i for i in range(layers) if step and (i + 1) % step == 0]
        first += layers
    return tuple(found)


SWITCH_LAYERS = ("num_layers", "num_decoder_layers")
