"""Muon for the hidden matrices, AdamW for all else, as one torch optimizer.

Muon replaces a matrix's momentum by the nearest orthogonal matrix, so that every direction of it moves equally
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). It is meant for the matrices inside the layers;
embeddings, the output head, norms and biases are AdamW's, and so are the experts of a mixture, which are one parameter
of three dimensions: torch's Muon takes two. Both are torch's own; this only deals the parameters out.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

HIDDEN = "hidden"
"""The `role` of a parameter group whose matrices map hidden states to hidden states (`build_optimizer` sets it)."""


class MuonAdamW(torch.optim.Optimizer):
    """Muon on groups with `role: hidden`, AdamW on the others.

    Updates of a matrix are scaled to the size that AdamW's would have (Moonshot's rule, arXiv:2502.16982), so one
    learning rate serves both.

    Args:
        params: parameter groups as `build_optimizer` makes them.
        lr: of both.
        weight_decay: of both, on matrices.
        momentum: of Muon.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        groups = list(params)
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        hidden = [group for group in groups if group.get("role") == HIDDEN]
        others = [group for group in groups if group.get("role") != HIDDEN]
        self.parts: list[torch.optim.Optimizer] = []
        if hidden:
            self.parts.append(torch.optim.Muon(hidden, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr, (betas[0], betas[1]), eps, weight_decay))
        # The parts share these groups and this state: whoever sets a rate or saves a moment sees one optimizer.
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
