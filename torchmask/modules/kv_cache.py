"""Keys and values of the tokens a model has already read, so that generation reads each token once.

Legend: B rows, S slots of the cache, K kv heads, C head_dim.
"""

import torch
from torch import Tensor

from torchmask.modules.attention_mask import AttentionMask


class LayerCache:
    """One layer's keys and values, [B, K, S, C] each, filled from slot 0."""

    def __init__(self, num_rows: int, num_kv_heads: int, num_slots: int, head_dim: int, like: Tensor) -> None:
        shape = (num_rows, num_kv_heads, num_slots, head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, after k and v ([B, K, T, C]) were added."""
        stop = self.length + k.shape[2]
        self.keys[:, :, self.length : stop] = k
        self.values[:, :, self.length : stop] = v
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class KVCache:
    """All layers' keys and values, and how far each slot stays visible.

    Args:
        num_rows: B.
        num_slots: S, the longest prompt plus the tokens to be generated.
        num_layers, num_kv_heads, head_dim: of the model.
        like: a tensor of the dtype and device wanted, such as an embedding's weight.
    """

    def __init__(
        self, num_rows: int, num_slots: int, *, num_layers: int, num_kv_heads: int, head_dim: int, like: Tensor
    ) -> None:
        self.layers = [LayerCache(num_rows, num_kv_heads, num_slots, head_dim, like) for _ in range(num_layers)]
        self.visible_until = torch.full((num_rows, num_slots), num_slots, device=like.device)
        self.num_slots = num_slots

    @property
    def length(self) -> int:
        """Slots filled so far."""
        return self.layers[0].length

    def mask(self, num_new: int, visible_until: Tensor | None) -> AttentionMask:
        """The mask for `num_new` slots that are about to be appended.

        Args:
            visible_until: [B, num_new] int64 in slots of the cache; None = visible to all that follow.
        """
        start, stop = self.length, self.length + num_new
        assert stop <= self.num_slots, f"{stop} slots do not fit into a cache of {self.num_slots}"
        if visible_until is not None:
            self.visible_until[:, start:stop] = visible_until
        keys = torch.arange(stop, device=self.visible_until.device)
        queries = keys[start:, None]
        visible = (keys <= queries) & (queries < self.visible_until[:, None, :stop])  # [B, T, S]
        return AttentionMask(visible=visible[:, None])
