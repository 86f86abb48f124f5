"""Who sees whom, from one or two integers a slot, in the form each attention kernel wants it.

`visible_until[b, k]` is the slot (exclusive) up to which later slots of row b may attend to slot k, and
`visible_from[b, k]` the first slot that may: query q sees key k iff `visible_from[k] <= q < visible_until[k]`. Without
`visible_from` it is k itself, which is causal attention. The two say isolated documents, hidden tokens, padding, trees
of documents and prompts that see themselves both ways, in O(T). A sliding window also asks
`positions[q] - positions[k] < window`: distances are those along a token's own path, whatever slots it was packed into.

What a kernel needs is derived once per forward pass and kind of layer:

- `dense`: the T x T boolean mask. The reference every other kernel is tested against.
- `sdpa`: the visible pairs as rectangles and triangles of slots, most without any mask; see `attention_plan`.
- `flex`: a FlexAttention block mask from per-block minima and maxima, in O((T / 128)^2), never through T x T.
- `varlen`: the lengths of the documents, where rows are nothing but documents side by side; `flex` where they are not.

Legend: B rows, T slots, S slots of keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchmask.modules.attention_flex import block_mask
from torchmask.modules.attention_parts import AttentionParts
from torchmask.modules.attention_plan import plan_parts
from torchmask.modules.attention_varlen import DocumentLengths, document_lengths
from torchmask.modules.visibility import Visibility


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """One kind of layer's mask in one forward pass; at most one of the first five is set, none for plain causal rows.

    Attributes:
        reference: [B, 1, T, T] bool, True = may attend; for the dense reference.
        visible: [B, 1, T, S] bool, the same for queries of T new slots and keys of S cached ones.
        parts: rectangles and triangles that cover the visible pairs.
        blocks: a `BlockMask` of `torch.nn.attention.flex_attention`.
        documents: the documents' lengths, for the varlen kernel.
        positions: [B, S] int64, for ALiBi; the queries are the last T. None = slot numbers.
        alibi_slopes: [H] fp32, carried along for all layers; None = no ALiBi.
    """

    reference: Tensor | None = None
    visible: Tensor | None = None
    parts: AttentionParts | None = None
    blocks: Any = None
    documents: DocumentLengths | None = None
    positions: Tensor | None = None
    alibi_slopes: Tensor | None = None


def build_attention_mask(
    visible_until: Tensor | None,
    tokens: Tensor,
    *,
    backend: str,
    visible_from: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
    biased: bool = False,
) -> AttentionMask:
    """The mask for one kind of layer in one forward pass.

    Args:
        visible_until: [B, T] int64, each above its slot; None = visible to all that follow in the row.
        tokens: [B, T], for its shape and device.
        backend: `dense`, `sdpa`, `flex` or `varlen`.
        visible_from: [B, T] int64, each at most its slot; None = the slot itself.
        positions: [B, T] or [1, T] int64, for windows and ALiBi; None = slot numbers.
        window: slot q sees slot k only if `positions[q] - positions[k] < window`.
        biased: scores will be capped or biased, so that plain causal rows have no kernel of their own either.
    """
    if visible_until is None and visible_from is None and window is None and not biased and backend != "dense":
        return AttentionMask()
    num_rows, num_slots = tokens.shape
    if positions is None:
        positions = torch.arange(num_slots, device=tokens.device)[None]
    positions = positions.expand(num_rows, num_slots)
    if visible_until is None:
        visible_until = torch.full((num_rows, num_slots), num_slots, device=tokens.device)
    visibility = Visibility(visible_until, visible_from, None if window is None else positions, window)
    if backend == "dense":
        return AttentionMask(reference=visibility.table()[:, None], positions=positions)
    if backend == "varlen":
        documents = None if biased else document_lengths(visibility, positions)
        if documents is not None:
            return AttentionMask(documents=documents, positions=positions)
        backend = "flex" if tokens.device.type == "cuda" else "sdpa"
    if backend == "flex":
        return AttentionMask(blocks=block_mask(visibility), positions=positions)
    parts = plan_parts(visible_until, since=visible_from, positions=positions, window=window)
    if parts.is_plain_causal and not biased:
        return AttentionMask()
    return AttentionMask(parts=parts, positions=positions)


def may_attend(visible_until: Tensor, visible_from: Tensor | None = None) -> Tensor:
    """[B, T, T] bool: the definition itself, without a window.

    >>> may_attend(torch.tensor([[2, 2, 4, 4]]))[0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    >>> may_attend(torch.tensor([[3, 3, 3]]), torch.tensor([[0, 0, 2]]))[0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    return Visibility(visible_until, visible_from).table()
