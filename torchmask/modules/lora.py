"""Low-rank adapters: a frozen linear layer plus the trained product of two thin matrices.

Reference: Hu et al. 2021, arXiv 2106.09685, section 4.1; the scale of `rank_stabilized` is Kalajdzievski 2023, arXiv
2312.03732, section 3.

Legend: N tokens, I in_features, O out_features, r rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from torchmask.errors import ConfigError

_ADAPTER = (".lora_a", ".lora_b")


@dataclass(frozen=True)
class LoRA:
    """Which layers get adapters, and of what size: the section `lora` of a recipe's configuration.

    Raises:
        ConfigError: C09, a value that makes no adapter.
    """

    rank: int = 16  # columns of the thin matrices
    alpha: float = 32.0  # their product is scaled by alpha / rank
    rank_stabilized: bool = False  # by alpha / sqrt(rank) instead
    dropout: float = 0.0  # share of an adapter's inputs that are left out in training
    targets: list[str] | None = None  # linear layers by name, such as q_proj; null = all but the head and routers
    also_train: list[str] = field(default_factory=list)  # trained whole, by name: embed_tokens, lm_head, norm, ...

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(
                "C09", f"the rank is {self.rank}", where="lora.rank", fix="it is at least 1; usual are 8 to 64"
            )
        if not 0 < self.alpha < math.inf:
            raise ConfigError(
                "C09", f"alpha is {self.alpha}", where="lora.alpha", fix="above 0; usual is twice the rank"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError("C09", f"dropout is {self.dropout}", where="lora.dropout", fix="from 0 to below 1")
        if self.targets == []:
            raise ConfigError("C09", "no layer is named", where="lora.targets", fix="null means all linear layers")

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


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
