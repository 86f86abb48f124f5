"""What adapters a model gets, as configurations say it; what they are is in `torchmask.modules.lora`."""

import math
from dataclasses import dataclass, field

from torchmask.errors import ConfigError


@dataclass(frozen=True)
class LoRA:
    """Which layers get low-rank adapters, and of what size: the section `lora` of a recipe's configuration.

    Reference: Hu et al. 2021, arXiv 2106.09685, section 4.1; `rank_stabilized`: Kalajdzievski 2023, arXiv 2312.03732,
    section 3.

    Raises:
        ConfigError: C09, a value that makes no adapter.
    """

    rank: int = 16  # columns of the thin matrices
    alpha: float = 32.0  # their product is scaled by alpha / rank
    rank_stabilized: bool = False  # by alpha / sqrt(rank) instead
    dropout: float = 0.0  # share of an adapter's inputs that are left out in training
    targets: list[str] | None = None  # linear layers by name, such as q_proj; null = all of them
    also_train: list[str] = field(default_factory=list)  # trained whole: embed_tokens, lm_head, norm and other norms

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
