"""Rotary position embeddings in the rotate-half layout of the Hub's checkpoints (Su et al. 2021, arXiv 2104.09864).

Frequencies are never kept in a buffer: a buffer would be cast with the model (bf16 frequencies are wrong beyond a few
hundred positions) and lost on the meta device. They are a handful of numbers, made anew for each forward pass.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's scaling: long wavelengths are slowed by `factor`, short ones kept, those between interpolated.

    Reference: `_compute_llama3_parameters` in Hugging Face transformers, and Meta's `apply_scaling`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __call__(self, inv_freq: Tensor) -> Tensor:
        """Scaled frequencies, [C/2] fp32."""
        wavelength = 2 * math.pi / inv_freq
        low_wavelength = self.original_max_seq_len / self.low_freq_factor
        high_wavelength = self.original_max_seq_len / self.high_freq_factor
        smooth = (self.original_max_seq_len / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - smooth) * inv_freq / self.factor + smooth * inv_freq
        scaled = torch.where(wavelength > low_wavelength, inv_freq / self.factor, inv_freq)
        return torch.where((wavelength <= low_wavelength) & (wavelength >= high_wavelength), between, scaled)


@dataclass(frozen=True)
class LinearRopeScaling:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): all frequencies divided by `factor`."""

    factor: float

    def __call__(self, inv_freq: Tensor) -> Tensor:
        """Scaled frequencies, [C/2] fp32."""
        return inv_freq / self.factor


RopeScaling = Llama3RopeScaling | LinearRopeScaling


def rope_cos_sin(
    positions: Tensor, head_dim: int, *, base: float, scaling: RopeScaling | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every slot's angles.

    Angles are formed in fp32 (fp64 for an fp64 model), as in the reference the checkpoints were trained with.

    Args:
        positions: [B, T] int64.
        head_dim: C, even.
        dtype: of the result, normally that of the activations.

    Returns:
        two tensors [B, 1, T, C], each half of the last axis the same.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (base**exponents)
    if scaling is not None:
        inv_freq = scaling(inv_freq)
    at_least_fp32 = torch.promote_types(dtype, torch.float32)
    angles = positions[:, None, :, None].to(at_least_fp32) * inv_freq.to(at_least_fp32)  # [B, 1, T, C/2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x rotated by its slot's angles.

    Args:
        x: [B, H, T, C].
        cos, sin: [B, 1, T, C] as `rope_cos_sin` makes them.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
