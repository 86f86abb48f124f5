"""Ways to stretch rotary positions beyond the length a model was first trained on, one class each.

A scaling is called with the unscaled frequencies and returns the scaled ones; `attention_factor` multiplies cosines and
sines. Two depend on the length of the document a token is in, not of the row or the batch, so that what a document is
packed with changes nothing.

Legend: B rows, T slots, C channels that are rotated.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearRopeScaling:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): all frequencies divided by `factor`."""

    factor: float
    attention_factor = 1.0

    def __call__(self, inv_freq: Tensor, base: float) -> Tensor:
        """Scaled frequencies, [C/2] fp32."""
        return inv_freq / self.factor


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's scaling: long wavelengths are slowed by `factor`, short ones kept, those between interpolated.

    Reference: `_compute_llama3_parameters` in Hugging Face transformers, and Meta's `apply_scaling`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int
    attention_factor = 1.0

    def __call__(self, inv_freq: Tensor, base: float) -> Tensor:
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
class YarnRopeScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): interpolates by a ramp over the channels, and sharpens attention.

    Attributes:
        beta_fast, beta_slow: rotations over the original length at which the ramp begins and ends.
        attention_factor: 0.1 ln(factor) + 1 in the paper.
        truncate: the ramp begins and ends at whole channels.
    """

    factor: float
    original_max_seq_len: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __call__(self, inv_freq: Tensor, base: float) -> Tensor:
        """Scaled frequencies, [C/2] fp32."""
        num = len(inv_freq)

        def channel(rotations: float) -> float:
            turns = self.original_max_seq_len / (rotations * 2 * math.pi)
            return 2 * num * math.log(turns) / (2 * math.log(base))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * num - 1)
        span = high - low if high > low else 0.001
        ramp = ((torch.arange(num, device=inv_freq.device, dtype=torch.float32) - low) / span).clamp(0, 1)
        return inv_freq / self.factor * ramp + inv_freq * (1 - ramp)


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a factor for each frequency, others in documents beyond a length.

    Attributes:
        short_factors, long_factors: [C/2] each, in documents of up to `original_max_seq_len` tokens and in longer ones.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_seq_len: int
    attention_factor: float

    def of_lengths(self, inv_freq: Tensor, base: float, lengths: Tensor, *, dim: int) -> Tensor:
        """Frequencies of every slot, [B, T, C/2] fp32.

        Args:
            lengths: [B, T] int64, tokens of each slot's document.
            dim: the number of channels that frequencies are counted by; one more rotates where it is odd.
        """
        short, long = (inv_freq.new_tensor(factors) for factors in (self.short_factors, self.long_factors))
        is_long = (lengths > self.original_max_seq_len)[..., None]
        return torch.where(is_long, inv_freq / long, inv_freq / short)


@dataclass(frozen=True)
class DynamicRopeScaling:
    """Dynamic NTK: the base grows with the document, once it is longer than the model was trained on.

    Reference: `_compute_dynamic_ntk_parameters` in Hugging Face transformers.
    """

    factor: float
    original_max_seq_len: int
    attention_factor = 1.0

    def of_lengths(self, inv_freq: Tensor, base: float, lengths: Tensor, *, dim: int) -> Tensor:
        """Frequencies of every slot, [B, T, C/2] fp32; arguments as of `LongRopeScaling`."""
        lengths = lengths.clamp(min=self.original_max_seq_len).to(torch.float32)
        growth = self.factor * lengths / self.original_max_seq_len - (self.factor - 1)
        bases = base * growth ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=inv_freq.device, dtype=torch.float32) / dim
        return 1.0 / bases[..., None] ** exponents


RopeScaling = LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling | LongRopeScaling | DynamicRopeScaling
BY_LENGTH = (LongRopeScaling, DynamicRopeScaling)
