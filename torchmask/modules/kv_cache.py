"""Keys and values of the tokens a model has already read, so that generation reads each token once.

Memory for all slots is taken at the first append, in the dtype and on the device of what is appended: under FSDP2 or
mixed precision those are not the parameters'. Layers with a sliding window hold the window and an eighth of it more,
so that it need not move at every step; a ring would need nothing more, but slots out of order, and masks with them.

Legend: B rows, S slots of the cache, K kv heads, C head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchmask.modules.attention_mask import AttentionMask, build_attention_mask
from torchmask.modules.visibility import Visibility


class LayerCache:
    """One layer's keys and values, [B, K, S, C] each, filled from slot 0; of a windowed layer, those at the end.

    Args:
        window: slots that a query sees, itself included; None = all.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, num_slots: int, window: int | None = None) -> None:
        self.num_slots = num_slots
        self.num_kept = None if window is None or window > num_slots else window - 1
        self.length = 0
        self._filled = 0  # of a window's buffer

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that the added slots may see, after k and v ([B, K, T, C]) were added."""
        if self.num_kept is not None:
            return self._append_to_window(k, v, self.num_kept)
        if self.length == 0:
            shape = (*k.shape[:2], self.num_slots, k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        stop = self.length + k.shape[2]
        self.keys[:, :, self.length : stop] = k
        self.values[:, :, self.length : stop] = v
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def _append_to_window(self, k: Tensor, v: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
        """`append` to a buffer that is filled to its end before the slots in sight move to its beginning.

        They move once in `spare` steps of one slot, so that a step copies some 8 slots, whatever the window.
        """
        new, in_sight = k.shape[2], min(self.length, num_kept)
        if self.length == 0:
            spare = -(-num_kept // 8)
            shape = (*k.shape[:2], min(self.num_slots, num_kept + spare), k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        self.length += new
        buffers, first, size = (self.keys, self.values), self._filled - in_sight, self.keys.shape[2]
        if in_sight + new > size:  # a long text: only its end goes into the buffer
            if in_sight > 0:
                k, v = (torch.cat((x[:, :, first : self._filled], n), dim=2) for x, n in zip(buffers, (k, v)))
            for buffer, x in zip(buffers, (k, v)):
                buffer[:, :, :num_kept] = x[:, :, x.shape[2] - num_kept :]
            self._filled = num_kept
            return k, v
        if self._filled + new > size:
            for buffer in buffers:  # from and to may overlap
                buffer[:, :, :in_sight] = buffer[:, :, first : self._filled].clone()
            first, self._filled = 0, in_sight
        stop = self._filled + new
        for buffer, x in zip(buffers, (k, v)):
            buffer[:, :, self._filled : stop] = x
        self._filled = stop
        return self.keys[:, :, first:stop], self.values[:, :, first:stop]


class KVCache:
    """All layers' keys and values, and what the mask needs to know of every slot.

    Args:
        num_rows: B.
        num_slots: S, the longest prompt plus the tokens to be generated.
        windows: the sliding window of each layer, None = none. Slots after the first call's must then have positions
            that grow by one a slot, as those of generated tokens do.
        device: of the model.

    Attributes:
        visible_until, positions: [B, S] int64; of slots that are not filled yet, those of a plain row.
    """

    def __init__(self, num_rows: int, num_slots: int, *, windows: Sequence[int | None], device: torch.device) -> None:
        self.layers = [LayerCache(num_slots, window) for window in windows]
        self.visible_until = torch.full((num_rows, num_slots), num_slots, device=device)
        self.positions = torch.arange(num_slots, device=device).repeat(num_rows, 1)
        self.num_slots = num_slots

    @property
    def length(self) -> int:
        """Slots filled so far."""
        return self.layers[0].length

    def mask(
        self,
        num_new: int,
        visible_until: Tensor | None,
        *,
        visible_from: Tensor | None = None,
        positions: Tensor | None = None,
        window: int | None = None,
        biased: bool = False,
    ) -> AttentionMask:
        """One kind of layer's mask for `num_new` slots that are about to be appended.

        Args:
            visible_until: [B, num_new] int64 in slots of the cache; None = visible to all that follow.
            visible_from: [B, num_new] int64 in slots of the cache; None = the slot itself. Slots that are read already
                do not see new ones, whatever it says.
            positions, window, biased: as of `build_attention_mask`; positions may be [1, num_new].
        """
        start, stop = self.length, self.length + num_new
        assert stop <= self.num_slots, f"{stop} slots do not fit into a cache of {self.num_slots}"
        if visible_until is not None:
            self.visible_until[:, start:stop] = visible_until
        if positions is not None:
            self.positions[:, start:stop] = positions
        known = self.positions[:, :stop]
        if start == 0:  # a prompt: the same as without a cache, and so never a T x T mask
            until = None if visible_until is None else self.visible_until[:, :stop]
            return build_attention_mask(
                until, known, backend="sdpa", visible_from=visible_from, positions=known, window=window, biased=biased
            )
        first = 0 if window is None else max(0, start - (window - 1))  # the first slot that a windowed layer holds
        since = None
        if visible_from is not None:  # of slots before these all new ones are late enough
            slots = torch.arange(first, start, device=known.device).expand(len(known), -1)
            since = torch.cat((slots, visible_from), dim=1) - first
        visibility = Visibility(self.visible_until[:, first:stop] - first, since, known[:, first:], window)
        return AttentionMask(visible=visibility.table(start - first)[:, None], positions=known[:, first:])

    def keep_rows(self, rows: Tensor) -> None:
        """Drops all rows but these ([B'] int64, in this order), so that finished sequences cost nothing more."""
        self.visible_until, self.positions = self.visible_until[rows], self.positions[rows]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
