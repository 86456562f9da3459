"""What a decoder keeps of the tokens that it has read, and how little of it a step has to copy.

transformers' own cache makes a new tensor of all keys and values at each step, and its attention
under a mask repeats them for every query head of a group. A step of decoding does little else than
read them, so both copies cost more than the attention itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Shape letters: B rows, H heads of keys, G query heads per head of keys, T tokens, D of a head.


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room for the tokens to come; in use is a view of them."""

    def __init__(self, layer: DynamicLayer, room: int):
        """Copies what ``layer`` holds and leaves room for so many tokens more."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.whole = tuple(_roomy(held, room) for held in (layer.keys, layer.values))
        self._use(layer.keys.shape[-2])

    def _use(self, length: int) -> None:
        self.keys, self.values = (whole[:, :, :length] for whole in self.whole)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values (B, H, T, D) behind those in use and return all."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        for whole, new in zip(self.whole, (key_states, value_states), strict=True):
            whole[:, :, start:end] = new
        self._use(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows."""
        length = self.keys.shape[-2]
        self.whole = tuple(whole[indices] for whole in self.whole)
        self._use(length)


def _roomy(held: torch.Tensor, room: int) -> torch.Tensor:
    whole = held.new_empty(*held.shape[:2], held.shape[2] + room, held.shape[3])
    whole[:, :, : held.shape[2]] = held
    return whole


def make_room(cache: Cache, room: int) -> None:
    """Give those layers of a filled cache room for so many tokens that keep all they have read."""
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[place] = RoomyLayer(layer, room)


@contextmanager
def grouped_heads() -> Iterator[None]:
    """Inside, steps of one token read the keys of a group of query heads once.

    The query heads of a group are put as so many queries to their head of keys; the numbers are
    those of transformers' ``sdpa``, up to rounding.
    """
    whole = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module, query, key, value, attention_mask, scaling=None, **options):
        B, heads, tokens, D = query.shape
        H = key.shape[1]
        plain = not options.get("dropout") and options.get("position_bias") is None
        shared = attention_mask is None or attention_mask.shape[1:3] == (1, 1)
        if tokens > 1 or heads == H or not (plain and shared):
            return whole(module, query, key, value, attention_mask, scaling=scaling, **options)
        grouped = query.reshape(B, H, heads // H, D)
        found = scaled_dot_product_attention(
            grouped, key, value, attn_mask=attention_mask, scale=scaling
        )
        return found.reshape(B, 1, heads, -1), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
