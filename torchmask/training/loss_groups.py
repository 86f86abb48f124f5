"""The loss of a step told apart by what decided each target: end-of-turn tokens, an answer, the reasoning before it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchmask.training.run import Run

# What every row has; a name of the user's own says more.
_GENERAL = ("bos", "header", "strategy", "roles", "message", "part", "data", "prompt", "text")


class LossGroups:
    """Sums of negative log likelihoods by rule, over the micro-batches of a step.

    Args:
        names: the rules that `Batch.rules` counts from 0, `PackedDataset.rule_names`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._sums: Tensor | None = None

    def add(self, rules: Tensor, slots: Tensor, nll: Tensor) -> None:
        """Takes over some targets: an `observe` of `linear_cross_entropy`, once `rules` is bound.

        Args:
            rules: [B, T] uint8, of each slot's label.
            slots: [n] int64, places in the flattened rules.
            nll: [n].
        """
        chosen = rules.flatten()[slots].long()
        ones_and_nll = torch.stack([torch.ones_like(nll, dtype=torch.float64), nll.double()])
        sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=nll.device)
        sums.index_add_(1, chosen, ones_and_nll)
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, run: Run) -> dict[str, float]:
        """`{"loss/eos": mean, ...}`, unweighted means over all ranks, and a new beginning; every rank must call it.

        Rules that only say "an assistant's text" are reported where there is more than one of them to compare.
        """
        if len(self._names) < 2:
            return {}
        sums = torch.zeros(2, len(self._names)) if self._sums is None else self._sums.cpu()
        self._sums = None
        counts, totals = (run.agree(*row) for row in sums.tolist())
        means = {name: total / count for name, count, total in zip(self._names, counts, totals, strict=True) if count}
        if not set(means) - set(_GENERAL):
            return {}
        return {f"loss/{name}": mean for name, mean in means.items()}
