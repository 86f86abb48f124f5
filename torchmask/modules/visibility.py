"""The definition of a mask by one or two integers a slot; every kernel's form of it is tested against this.

Legend: B rows, S slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """The definition: which query slots see which key slots.

    Attributes:
        until: [B, S] int64, above the slot itself.
        since: [B, S] int64, at most the slot itself; None = the slot itself.
        positions: [B, S] int64; needed where there is a window.
        window: how far back a query sees, itself included, in positions; None = everything.
    """

    until: Tensor
    since: Tensor | None = None
    positions: Tensor | None = None
    window: int | None = None

    def sees(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Bool, whether slot q of row b sees slot k, for index tensors that broadcast against each other."""
        seen = q < self.until[b, k]
        seen = seen & (k <= q if self.since is None else self.since[b, k] <= q)
        if self.window is not None:
            assert self.positions is not None
            seen = seen & (self.positions[b, q] - self.positions[b, k] < self.window)
        return seen

    def table(self, first_query: int = 0) -> Tensor:
        """[B, S - first_query, S] bool: `sees` for all keys and the queries from `first_query` on."""
        slots = torch.arange(self.until.shape[1], device=self.until.device)
        rows = torch.arange(self.until.shape[0], device=self.until.device)
        return self.sees(rows[:, None, None], slots[first_query:, None], slots)
