"""Feed-forward blocks."""

from torch import Tensor, nn
from torch.nn.functional import silu


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6): down(silu(gate(x)) * up(x))."""

    def __init__(self, embed_dim: int, intermediate_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(embed_dim, intermediate_dim, bias=bias)
        self.up_proj = nn.Linear(embed_dim, intermediate_dim, bias=bias)
        self.down_proj = nn.Linear(intermediate_dim, embed_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
