"""Low-rank adapters: a frozen linear layer plus the trained product of two thin matrices.

Reference: Hu et al. 2021, arXiv 2106.09685, section 4.1.

Legend: N tokens, I in_features, O out_features, r rank.
"""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.functional import dropout, linear

_ADAPTER = (".lora_a", ".lora_b")


class LoRALinear(nn.Linear):
    """A linear layer with an adapter: W x + b + scale B A x.

    The weight and bias are the adapted layer's own parameters under their own names, so checkpoints fit as before.

    Args:
        layer: what is adapted.
        rank: r.
        scale: of the product.
        dropout: of the adapter's input, in training.

    Attributes:
        lora_a: [r, I], A; lora_b: [O, r], B. Unset until they are initialised (`torchmask.models.adapt`) or loaded.
    """

    def __init__(self, layer: nn.Linear, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.scale, self.dropout = scale, dropout
        self.lora_a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_empty(layer.out_features, rank))
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        low = linear(dropout(x, self.dropout, self.training), self.lora_a)
        return super().forward(x) + linear(low * self.scale, self.lora_b)

    def extra_repr(self) -> str:
        """The layer's sizes and the adapter's."""
        return f"{super().extra_repr()}, rank={self.lora_a.shape[0]}, scale={self.scale:g}"


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The layers that have an adapter, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, told by its name."""
    return name.endswith(_ADAPTER)
