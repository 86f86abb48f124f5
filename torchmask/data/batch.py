"""Packs of different lengths as tensors of one shape.

Padding is invisible and teaches nothing by construction (no label, seen by no slot), so the id it carries never matters
and a tokenizer needs no pad token.

Legend: B rows, T slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from torchmask.constants import IGNORE_INDEX
from torchmask.data.packing import Pack


@dataclass(frozen=True, eq=False)
class Batch:
    """What a recipe feeds a model.

    Attributes:
        tokens: [B, T] int64.
        labels: [B, T] int64, `IGNORE_INDEX` where a slot predicts nothing.
        positions: [B, T] int64.
        visible_until: [B, T] int64, exclusive end of the slots that may attend to each slot; padding: its own slot.
        weights: [B, T] float32, or None: 1 for every label.
        num_targets: how many labels are trained (weight not 0); counted here so that no device is asked for it.
        num_tokens: slots that hold a token of the data, padding excluded.
        visible_from: [B, T] int64, the first slot that may attend to each slot; None: itself. Padding: its own slot.
        rules: [B, T] uint8, the rule that decided each slot's label (`PackedDataset.rule_names`), or None.
        normalizer: what the rows add to the number that the loss of their step is divided by.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    visible_until: torch.Tensor
    weights: torch.Tensor | None
    num_targets: int
    num_tokens: int
    visible_from: torch.Tensor | None = None
    rules: torch.Tensor | None = None
    normalizer: float = 0.0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU can overlap with work."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in values.items() if isinstance(v, torch.Tensor)})


def filler() -> Pack:
    """A row of one slot that trains nothing, for a rank or a step that would otherwise get no row."""
    token, label, position, visible_until = (np.array([value], np.int32) for value in (0, IGNORE_INDEX, 0, 1))
    return Pack(token, label, position, visible_until, normalizer=0.0)


def collate_rows(rows: Sequence[Pack], ids: Sequence[int], pad_to: int | None = None) -> Batch:
    """The rows of these numbers as a batch; a negative number stands for a row without targets (`filler`)."""
    return collate([rows[i] if i >= 0 else filler() for i in ids], pad_to)


def collate(packs: Sequence[Pack], pad_to: int | None = None, pad_id: int = 0, *, pad_to_multiple_of: int = 1) -> Batch:
    """Stacks rows, padded on the right.

    Args:
        packs: B rows. Where some have weights and others have none, none means 1 for every label.
        pad_to: slots of the batch; None = those of the longest row.
        pad_id: the id that padding carries; any one the model has an embedding for gives the same result.
        pad_to_multiple_of: rounds the number of slots up.

    Raises:
        ValueError: no rows, or a row longer than `pad_to`.

    >>> from torchmask.data.packing import PackedDataset
    >>> from torchmask.data.sample import Sample
    >>> batch = collate(PackedDataset([Sample([1, 5, 2], [1, 0, 0])], max_seq_len=8), pad_to=4)
    >>> batch.labels.tolist(), batch.visible_until.tolist(), batch.num_targets
    ([[5, 2, -100, -100]], [[3, 3, 3, 4]], 2)
    """
    rows = [packs[i] for i in range(len(packs))]
    if not rows:
        raise ValueError("collate needs at least one row; a rank without rows takes filler()")
    longest = max(len(row) for row in rows)
    if pad_to is not None and longest > pad_to:
        raise ValueError(f"a row of {longest} slots does not fit into pad_to={pad_to}")
    width = -(-(pad_to or longest) // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(rows), width)
    numbers = np.arange(width)
    tokens = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    positions = np.zeros(shape, np.int64)
    visible_until = np.tile(numbers + 1, (len(rows), 1))
    weighted = any(row.weights is not None for row in rows)
    weights = np.zeros(shape, np.float32) if weighted else None
    visible_from = np.tile(numbers, (len(rows), 1)) if any(row.visible_from is not None for row in rows) else None
    rules = np.zeros(shape, np.uint8) if any(row.rules is not None for row in rows) else None
    for i, row in enumerate(rows):
        n = len(row)
        tokens[i, :n], labels[i, :n] = row.tokens, row.labels
        positions[i, :n], visible_until[i, :n] = row.positions, row.visible_until
        positions[i, n:] = numbers[: width - n]
        if weights is not None:
            weights[i, :n] = (row.labels != IGNORE_INDEX) if row.weights is None else row.weights
        if visible_from is not None and row.visible_from is not None:
            visible_from[i, :n] = row.visible_from
        if rules is not None and row.rules is not None:
            rules[i, :n] = row.rules
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        visible_until=torch.from_numpy(visible_until),
        weights=None if weights is None else torch.from_numpy(weights),
        num_targets=_num_targets(labels, weights),
        num_tokens=sum(len(row) for row in rows),
        visible_from=None if visible_from is None else torch.from_numpy(visible_from),
        rules=None if rules is None else torch.from_numpy(rules),
        normalizer=sum(_normalizer(row) for row in rows),
    )


def _normalizer(row: Pack) -> float:
    return float(_num_targets(row.labels, row.weights)) if row.normalizer is None else row.normalizer


def _num_targets(labels: npt.NDArray[Any], weights: npt.NDArray[np.float32] | None) -> int:
    trained = labels != IGNORE_INDEX
    return int(np.count_nonzero(trained if weights is None else trained & (weights != 0)))
