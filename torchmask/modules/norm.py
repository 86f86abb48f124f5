"""Norms: statistics and products in at least fp32, whatever the dtype."""

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from torchmask.modules.spec import DecoderSpec


class OffsetRMSNorm(nn.Module):
    """RMSNorm by `offset + weight` (Gemma, arXiv 2403.08295), a sum for which bf16 is too coarse."""

    def __init__(self, dim: int, *, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., dim]."""
        precise = torch.promote_types(x.dtype, torch.float32)
        weight = self.offset + self.weight.to(precise)
        return rms_norm(x.to(precise), weight.shape, weight, self.eps).to(x.dtype)


def build_norm(spec: DecoderSpec, dim: int) -> nn.Module:
    """The spec's norm over the last axis."""
    if spec.norm == "layer":
        return nn.LayerNorm(dim, eps=spec.norm_eps)
    if spec.norm_offset != 0:
        return OffsetRMSNorm(dim, eps=spec.norm_eps, offset=spec.norm_offset)
    return nn.RMSNorm(dim, eps=spec.norm_eps)
