"""Keys and values of the tokens a model has already read, so that generation reads each token once.

Memory for all slots is taken at the first append, in the dtype and on the device of what is appended: under FSDP2 or
mixed precision those are not the parameters'.

Legend: B rows, S slots of the cache, K kv heads, C head_dim.
"""

import torch
from torch import Tensor

from torchmask.modules.attention_mask import AttentionMask, build_attention_mask


class LayerCache:
    """One layer's keys and values, [B, K, S, C] each, filled from slot 0."""

    keys: Tensor
    values: Tensor

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, after k and v ([B, K, T, C]) were added."""
        if self.length == 0:
            shape = (*k.shape[:2], self.num_slots, k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
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
        num_layers: of the model.
        device: of the model.
    """

    def __init__(self, num_rows: int, num_slots: int, *, num_layers: int, device: torch.device) -> None:
        self.layers = [LayerCache(num_slots) for _ in range(num_layers)]
        self.visible_until = torch.full((num_rows, num_slots), num_slots, device=device)
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
        if start == 0:  # a prompt: the same as without a cache, and so never a T x T mask
            if visible_until is None:
                return AttentionMask()
            until = self.visible_until[:, :stop]
            return build_attention_mask(until, until, backend="sdpa")
        keys = torch.arange(stop, device=self.visible_until.device)
        queries = keys[start:, None]
        visible = (keys <= queries) & (queries < self.visible_until[:, None, :stop])  # [B, T, S]
        return AttentionMask(visible=visible[:, None])

    def keep_rows(self, rows: Tensor) -> None:
        """Drops all rows but these ([B'] int64, in this order), so that finished sequences cost nothing more."""
        self.visible_until = self.visible_until[rows]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
