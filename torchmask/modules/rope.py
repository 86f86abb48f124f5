"""Rotary position embeddings in the rotate-half layout of the Hub's checkpoints (Su et al. 2021, arXiv 2104.09864).

Frequencies are never kept in a buffer: a buffer would be cast with the model (bf16 frequencies are wrong beyond a few
hundred positions) and lost on the meta device. They are a handful of numbers, made anew for each forward pass.

Legend: B rows, T slots, H heads, C head_dim, R channels that are rotated.
"""

import torch
from torch import Tensor

from torchmask.modules.rope_scaling import BY_LENGTH, RopeScaling


def rope_cos_sin(
    positions: Tensor,
    dim: int,
    *,
    base: float,
    scaling: RopeScaling | None,
    dtype: torch.dtype,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every slot's angles.

    Angles are formed in fp32 (fp64 for an fp64 model), as in the reference the checkpoints were trained with.

    Args:
        positions: [B, T] int64.
        dim: R, even.
        dtype: of the result, normally that of the activations.
        lengths: [B, T] int64, tokens of each slot's document, for scalings that ask; None = the row's positions.

    Returns:
        two tensors [B, 1, T, R], each half of the last axis the same.
    """
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    inv_freq = 1.0 / (base**exponents)
    if isinstance(scaling, BY_LENGTH):
        if lengths is None:
            lengths = (positions.amax(-1, keepdim=True) + 1).expand_as(positions)
        inv_freq = scaling.of_lengths(inv_freq, base, lengths, dim=dim)[:, None]  # [B, 1, T, R/2]
    elif scaling is not None:
        inv_freq = scaling(inv_freq, base)
    at_least_fp32 = torch.promote_types(dtype, torch.float32)
    angles = positions[:, None, :, None].to(at_least_fp32) * inv_freq.to(at_least_fp32)  # [B, 1, T, R/2]
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.attention_factor != 1:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos.to(dtype), sin.to(dtype)


def document_lengths_of_slots(positions: Tensor, visible_until: Tensor | None) -> Tensor:
    """[B, T] int64: tokens of the document that each slot is in.

    A document is a stretch of slots that no later slot sees; of a tree of documents, it is the longest path.

    Args:
        positions, visible_until: [B, T] int64, see `Decoder.forward`.

    >>> positions, until = torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[3, 3, 3, 5, 5]])
    >>> document_lengths_of_slots(positions, until).tolist()
    [[3, 3, 3, 2, 2]]
    """
    if visible_until is None:
        return (positions.amax(-1, keepdim=True) + 1).expand_as(positions)
    positions = positions.expand_as(visible_until)
    slots = torch.arange(visible_until.shape[1], device=positions.device)
    closes = visible_until.cummax(-1).values <= slots + 1
    document = closes.cumsum(-1) - closes.long()
    longest = torch.zeros_like(positions).scatter_reduce(-1, document, positions, "amax")
    return longest.gather(-1, document) + 1


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with its first R channels rotated by its slot's angles.

    Args:
        x: [B, H, T, C].
        cos, sin: [B, 1, T, R] as `rope_cos_sin` makes them, R at most C.
    """
    dim = cos.shape[-1]
    rotated = x if dim == x.shape[-1] else x[..., :dim]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated if dim == x.shape[-1] else torch.cat((rotated, x[..., dim:]), dim=-1)
