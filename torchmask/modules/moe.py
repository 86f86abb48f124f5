"""Mixtures of experts: every token goes through the few feed-forward blocks that a router chooses for it.

Tokens are sorted by expert, so that each expert's are one slice, and all experts' products are one grouped matrix
product where torch has a kernel for it; the loop over experts is the reference, and what runs in fp64. No token is
dropped, whatever the load, so a token's result does not depend on what else is in its batch.

Legend: N tokens, D embed_dim, E experts, F expert_dim, k experts a token.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear

from torchmask.modules.mlp import ACTIVATIONS, Activation, clamped_gate
from torchmask.modules.spec import MoESpec

LOOP_TOKENS = 256
"""Tokens an expert from which the loop is up to twice as fast in bf16 and fp16 (training, one thread of a Xeon)."""


class MoE(nn.Module):
    """Router and experts (Shazeer et al. 2017, arXiv 1701.06538; Jiang et al. 2024, arXiv 2401.04088, section 2.1)."""

    def __init__(self, embed_dim: int, spec: MoESpec, *, activation: Activation) -> None:
        super().__init__()
        self.experts_per_token, self.normalize = spec.experts_per_token, spec.normalize
        self.router = nn.Linear(embed_dim, spec.num_experts, bias=spec.bias)
        self.experts = Experts(embed_dim, spec, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        return self.experts(tokens, chosen, weights.to(x.dtype)).view_as(x)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts each token goes through, and how much of each.

        Args:
            tokens: [N, D].

        Returns:
            weights [N, k] in at least fp32, and experts [N, k] int64, the likeliest first.
        """
        logits = self.router(tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.normalize:
            best, chosen = logits.topk(self.experts_per_token, dim=-1)
            return best.softmax(-1), chosen  # the same as the softmax over all, divided by the sum of the chosen
        weights, chosen = logits.softmax(-1).topk(self.experts_per_token, dim=-1)
        return weights, chosen


class Experts(nn.Module):
    """E gated feed-forward blocks; their matrices are three parameters.

    Attributes:
        gate_proj, up_proj: [E, F, D]; down_proj: [E, D, F]; with `_bias`, [E, F] and [E, D], where the spec has them.
    """

    gate_proj_bias: Tensor | None
    up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None

    def __init__(self, embed_dim: int, spec: MoESpec, *, activation: Activation) -> None:
        super().__init__()
        num, width = spec.num_experts, spec.expert_dim
        self.gate_proj = nn.Parameter(torch.empty(num, width, embed_dim))
        self.up_proj = nn.Parameter(torch.empty(num, width, embed_dim))
        self.down_proj = nn.Parameter(torch.empty(num, embed_dim, width))
        for name, size in (("gate_proj", width), ("up_proj", width), ("down_proj", embed_dim)):
            bias = nn.Parameter(torch.zeros(num, size)) if spec.bias else None
            self.register_parameter(f"{name}_bias", bias)
        self.activation, self.gate_limit, self.gate_slope = ACTIVATIONS[activation], spec.gate_limit, spec.gate_slope

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The chosen experts' results, weighted and added up.

        Args:
            tokens: [N, D].
            chosen: [N, k] int64.
            weights: [N, k].

        Returns:
            [N, D].
        """
        num_tokens, per_token = chosen.shape
        expert, order = chosen.flatten().sort(stable=True)  # pairs of token and expert, by expert
        sizes = expert.new_zeros(len(self.gate_proj)).scatter_add(0, expert, torch.ones_like(expert))
        inputs = tokens[order // per_token]
        up = self._product(inputs, self.up_proj, self.up_proj_bias, expert, sizes)
        gate = self._product(inputs, self.gate_proj, self.gate_proj_bias, expert, sizes)
        if self.gate_limit is None:
            inside = self.activation(gate) * up
        else:
            inside = clamped_gate(gate, up, self.gate_limit, self.gate_slope)
        out = self._product(inside, self.down_proj, self.down_proj_bias, expert, sizes)
        weighted = torch.empty_like(out).index_copy(0, order, out).view(num_tokens, per_token, -1)
        return (weighted * weights[..., None]).sum(1)

    @staticmethod
    def _product(x: Tensor, matrices: Tensor, bias: Tensor | None, expert: Tensor, sizes: Tensor) -> Tensor:
        """Rows of x, sorted by expert, each times its expert's matrix: [N k, in] to [N k, out]."""
        multiply = grouped_product if can_group(x, matrices) else looped_product
        out = multiply(x, matrices, sizes)
        return out if bias is None else out + bias[expert]


def can_group(x: Tensor, matrices: Tensor) -> bool:
    """Whether torch's grouped kernel takes them and is no slower: rows of whole 16 bytes, and not in fp64.

    Compiled only in bf16. On a CPU in 16 bits, not where every expert has many tokens.
    """
    if x.dtype == torch.float64:
        return False
    if torch.compiler.is_compiling():
        if x.dtype != torch.bfloat16:
            return False  # torch 2.13's rule for the shape of its result, which the compiler asks, knows bf16 alone
    elif x.device.type == "cpu" and x.element_size() == 2 and len(x) >= LOOP_TOKENS * len(matrices):
        return False
    width = 16 // x.element_size()
    return all(size % width == 0 for size in matrices.shape[1:])


def grouped_product(x: Tensor, matrices: Tensor, sizes: Tensor) -> Tensor:
    """`looped_product` by one kernel, without the host knowing the sizes."""
    return grouped_mm(x, matrices.mT, offs=sizes.cumsum(0, dtype=torch.int32))


def looped_product(x: Tensor, matrices: Tensor, sizes: Tensor) -> Tensor:
    """The reference: consecutive slices of x, of these sizes, each times its matrix.

    Args:
        x: [N k, in].
        matrices: [E, out, in].
        sizes: [E] int64.

    Returns:
        [N k, out].
    """
    slices = x.split(sizes.tolist())
    return torch.cat([linear(rows, matrix) for rows, matrix in zip(slices, matrices)])
