"""Whether packing changes what is learned: losses and gradients of the same documents in different rows, and leaks.

Everything is measured in fp64, where a difference of 1e-12 is rounding and anything larger a mistake, with a small
random model: packing cannot tell one model from another, and a random one has no zeros to hide behind.

Legend: T slots of one row, N targets, D embed_dim, V vocab_size.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 2**23
"""Logits held at a time (64 MiB in fp64)."""

Integers = npt.NDArray[np.int64]


class Row(Protocol):
    """What is measured of a row; `torchmask.data.Batch` of one row is one. Every tensor is [1, T]."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    visible_until: Tensor
    visible_from: Tensor | None
    weights: Tensor | None


@dataclass(frozen=True, eq=False)
class Measured:
    """Losses and gradients of all documents in one kind of rows.

    Attributes:
        keys: [N] int64, which target of which document, ascending.
        nll: [N] float64, negative log likelihoods in their order.
        gradients: of the weighted sum of the losses over the number of targets, by parameter.
    """

    keys: Integers
    nll: npt.NDArray[np.float64]
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """How far two measurements of the same documents are apart.

    Attributes:
        nll: the largest difference of one target's loss.
        gradient: the largest difference of a gradient's entry, relative to the largest entry.
        num_missing: targets that only one of the two has.
    """

    nll: float
    gradient: float
    num_missing: int


def measure(model: Any, rows: Iterable[tuple[Row, Integers]]) -> Measured:
    """Runs the rows, one at a time, forward and backward.

    Args:
        model: a decoder in fp64; its gradients are replaced.
        rows: each with [T] int64 keys that say which target its labels are; -1 = not compared and not trained.
    """
    model.zero_grad(set_to_none=True)
    all_keys, losses, num_targets = [], [], 0
    for row, keys in rows:
        chosen = torch.from_numpy(np.flatnonzero((keys >= 0) & (row.labels[0].numpy() >= 0)))
        if not len(chosen):
            continue
        nll = _losses(model, _hidden(model, row)[0, chosen], row.labels[0, chosen])
        weights = nll.new_ones(len(chosen)) if row.weights is None else row.weights[0, chosen].to(nll)
        (nll * weights).sum().backward()
        all_keys.append(keys[chosen.numpy()])
        losses.append(nll.detach().numpy())
        num_targets += len(chosen)
    gradients = {name: p.grad / max(num_targets, 1) for name, p in model.named_parameters() if p.grad is not None}
    found = np.concatenate(all_keys) if all_keys else np.empty(0, np.int64)
    order = np.argsort(found, kind="stable")
    values = np.concatenate(losses) if losses else np.empty(0)
    return Measured(found[order], values[order], gradients)


def compare(one: Measured, other: Measured) -> Difference:
    """How far apart they are; infinitely where they have no target in common."""
    common, at, other_at = np.intersect1d(one.keys, other.keys, return_indices=True)
    num_missing = len(one.keys) + len(other.keys) - 2 * len(common)
    if not len(common) or one.gradients.keys() != other.gradients.keys():
        return Difference(float("inf"), float("inf"), num_missing)
    largest = max(float(g.abs().max()) for g in one.gradients.values())
    apart = max(float((g - other.gradients[name]).abs().max()) for name, g in one.gradients.items())
    nll = float(np.abs(one.nll[at] - other.nll[other_at]).max())
    return Difference(nll, apart / max(largest, 1e-300), num_missing)


def count_leaks(
    model: Any, row: Row, documents: Sequence[tuple[Integers, Integers]], *, vocab_size: int, seed: int = 0
) -> int:
    """How many documents change another document's outputs when their own tokens change.

    Every bit of the hidden states after the final norm counts, and so of the logits, which are made of one slot's
    hidden state each.

    Args:
        documents: for each, the slots to change and the slots that must not notice.
        vocab_size: tokens are replaced by random ones below this.
    """
    generator = torch.Generator().manual_seed(seed)
    leaks = 0
    with torch.no_grad():
        before = _hidden(model, row)
        for changed, watched in documents:
            tokens = row.tokens.clone()
            slots = torch.from_numpy(changed)
            shift = torch.randint(1, max(vocab_size, 2), (len(slots),), generator=generator)
            tokens[0, slots] = (tokens[0, slots] + shift) % vocab_size
            after = _hidden(model, row, tokens)
            leaks += not torch.equal(before[0, torch.from_numpy(watched)], after[0, torch.from_numpy(watched)])
    return leaks


def _hidden(model: Any, row: Row, tokens: Tensor | None = None) -> Tensor:
    """[1, T, D] after the final norm."""
    seen = {} if row.visible_from is None else {"visible_from": row.visible_from}
    hidden: Tensor = model(row.tokens if tokens is None else tokens, row.positions, row.visible_until, **seen)
    return hidden


def _losses(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """[N] float64 from [N, D] hidden states, without ever holding the logits of all."""

    def chunk(part: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(model.lm_head(part), wanted, reduction="none")

    step = max(1, _CHUNK_LOGITS // model.spec.vocab_size)
    pairs = zip(hidden.split(step), labels.split(step))
    losses = [checkpoint(chunk, part, wanted, use_reentrant=False) for part, wanted in pairs]
    return torch.cat([loss for loss in losses if isinstance(loss, Tensor)])
