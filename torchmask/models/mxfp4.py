"""MXFP4, the format of GPT-OSS's experts: 4-bit floats in blocks of 32 that share a power of two.

Reference: Open Compute Project, Microscaling Formats (MX) specification 1.0, section 5.3; each byte holds two numbers,
the first in its low bits.
"""

import torch
from torch import Tensor

# By their 4 bits: sign, two of exponent, one of mantissa (E2M1).
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127
"""Of the shared exponent (E8M0)."""


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """The numbers, in bf16, which holds every one of them exactly.

    Args:
        blocks: [..., G, 16] uint8.
        scales: [..., G] uint8.

    Returns:
        [..., 32 G] bf16.

    >>> dequantise(torch.full((1, 16), 0x72, dtype=torch.uint8), torch.tensor([128], dtype=torch.uint8))[:4].tolist()
    [2.0, 12.0, 2.0, 12.0]
    """
    values = torch.tensor(_VALUES, dtype=torch.bfloat16, device=blocks.device)
    halves = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)  # [..., G, 32]
    exponents = (scales.to(torch.int32) - _BIAS)[..., None]
    return torch.ldexp(values[halves.int()], exponents).to(torch.bfloat16).flatten(-2)
