"""The variable-length kernel: rows of nothing but documents side by side, told by their lengths alone.

The fastest there is for flat packs on CUDA, in half precision. Trees, hidden tokens, prompts that see both ways, capped
and biased scores are beyond it; they go to FlexAttention.

Legend: B rows, T slots, H heads, K kv heads, C head_dim.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from torchmask.modules.visibility import Visibility


@dataclass(frozen=True, eq=False)
class DocumentLengths:
    """Documents in the order of their slots, all rows one after another.

    Attributes:
        starts: [documents + 1] int32, first slots of the documents in the B * T slots, and B * T.
        longest: slots of the longest document.
        window: how far back a query sees, itself included; None = everything.
    """

    starts: Tensor
    longest: int
    window: int | None


def document_lengths(visibility: Visibility, positions: Tensor) -> DocumentLengths | None:
    """The documents of rows that are nothing else; None where some row is more, or the kernel cannot run here.

    The host waits for the device once, to learn how many documents there are.

    Args:
        positions: [B, T] int64, which a window must be able to read as slot numbers of the document.
    """
    until, window = visibility.until, visibility.window
    num_rows, num_slots = until.shape
    if not can_run(until.device.type) or (window is not None and not takes_windows()):
        return None
    slots = torch.arange(num_slots, device=until.device)
    until = until.clamp(max=num_slots)
    starts = torch.ones_like(until, dtype=torch.bool)
    starts[:, 1:] = until[:, :-1] == slots[1:]  # the slot before is seen up to here and no further
    same_document = until[:, 1:] == until[:, :-1]
    is_flat = (starts[:, 1:] | same_document).all() & (until[:, -1] == num_slots).all()
    if visibility.since is not None:
        is_flat &= (visibility.since == slots).all()
    if window is not None:
        is_flat &= (starts[:, 1:] | (positions[:, 1:] == positions[:, :-1] + 1)).all()
    edges = starts.flatten().nonzero()[:, 0]
    edges = torch.cat([edges, edges.new_tensor([num_rows * num_slots])])
    longest, flat = torch.stack([edges.diff().max(), is_flat.to(edges.dtype)]).tolist()
    return DocumentLengths(edges.to(torch.int32), longest, window) if flat else None


def can_run(device_type: str) -> bool:
    """Whether this torch has the kernel for the device."""
    return device_type == "cuda" and _kernel() is not None


def heads_fit(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel takes such heads: half precision, at most 256 wide, in eights."""
    return dtype in (torch.float16, torch.bfloat16) and head_dim <= 256 and head_dim % 8 == 0


def takes_windows() -> bool:
    """Whether the kernel takes windows (torch 2.12 and later)."""
    return "window_size" in _parameters()


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, documents: DocumentLengths, scale: float | None) -> Tensor:
    """Causal attention inside each document.

    Args:
        q: [B, H, T, C] in half precision.
        k, v: [B, K, T, C].

    Returns:
        [B, H, T, C].
    """
    options: dict[str, Any] = {}
    if takes_windows():
        options["window_size"] = (-1 if documents.window is None else documents.window - 1, 0)
    else:
        options["is_causal"] = True
    if scale is not None and "scale" in _parameters():
        options["scale"] = scale
    elif scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _parameters():
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * T, H, C]
    starts, longest = documents.starts, documents.longest
    out: Tensor = _kernel()(query, key, value, starts, starts, longest, longest, **options)
    return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


@cache
def _kernel() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    return varlen_attn


@cache
def _parameters() -> frozenset[str]:
    """Its parameters, which changed between 2.10 and 2.12."""
    kernel = _kernel()
    return frozenset() if kernel is None else frozenset(inspect.signature(kernel).parameters)
