"""Feed-forward blocks."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "tanh"]


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x) (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """The square of ReLU (So et al. 2021, arXiv 2109.08668, section 4)."""
    return relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": relu,
    "relu2": relu2,
    "tanh": torch.tanh,
}


class GatedMLP(nn.Module):
    """SwiGLU and its relatives (Shazeer 2020, arXiv 2002.05202, eq. 6): down(act(gate(x)) * up(x))."""

    def __init__(self, embed_dim: int, intermediate_dim: int, *, bias: bool, activation: Activation = "silu") -> None:
        super().__init__()
        self.gate_proj = nn.Linear(embed_dim, intermediate_dim, bias=bias)
        self.up_proj = nn.Linear(embed_dim, intermediate_dim, bias=bias)
        self.down_proj = nn.Linear(intermediate_dim, embed_dim, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    """The original block (Vaswani et al. 2017, arXiv 1706.03762, eq. 2): down(act(up(x)))."""

    def __init__(self, embed_dim: int, intermediate_dim: int, *, bias: bool, activation: Activation) -> None:
        super().__init__()
        self.up_proj = nn.Linear(embed_dim, intermediate_dim, bias=bias)
        self.down_proj = nn.Linear(intermediate_dim, embed_dim, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(self.activation(self.up_proj(x)))


def clamped_gate(gate: Tensor, up: Tensor, limit: float, slope: float) -> Tensor:
    """GPT-OSS's gate (arXiv 2508.10925, section 2.2): both clamped, x * sigmoid(slope x) times one more than `up`."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(slope * gate) * (up + 1)
