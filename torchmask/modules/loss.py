"""The loss: cross entropy from hidden states, for supervised slots only, without ever holding all logits.

Logits are made chunk by chunk, reduced at once, and made again in the backward pass, so the largest tensor is one
chunk's logits whatever the sequence length. Chosen over computing gradients in the forward pass (as Liger's kernel
does): it works for any head (tied, sharded, with softcaps) with plain autograd, for the price of one more matrix
product with the head.

Legend: B rows, T slots, D embed_dim, V vocab_size, N supervised slots.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from torchmask.constants import IGNORE_INDEX

CHUNK_LOGITS = 2**25
"""Logits held at a time (128 MiB in fp32)."""


def linear_cross_entropy(
    hidden: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    observe: Callable[[Tensor, Tensor], None] | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """The weighted sum (not mean) of the negative log likelihoods, in nats.

    Divide by the number of targets of the whole optimizer step, over all micro-batches and ranks, before `backward`.

    Args:
        hidden: [B, T, D].
        lm_head: [n, D] to [n, V] logits.
        labels: [B, T] int64, aligned with `hidden` (already shifted); `IGNORE_INDEX` = no target.
        weights: [B, T] of each target; None = 1.
        observe: called for each chunk with its slots ([n] int64, places in the flattened labels) and their negative log
            likelihoods ([n], unweighted, detached), for losses by document, by rule or by token.
        chunk_logits: how many logits to hold at a time.

    Returns:
        a scalar, fp32 (fp64 for fp64 logits). Without any target it is 0, and its gradients exist and are 0.
    """
    supervised = (labels != IGNORE_INDEX).flatten().nonzero()[:, 0]  # [N]
    hidden = hidden.flatten(0, -2)[supervised]
    labels = labels.flatten()[supervised]
    weights = None if weights is None else weights.flatten()[supervised]

    if len(supervised) == 0:
        return lm_head(hidden).sum(dtype=torch.promote_types(hidden.dtype, torch.float32))

    vocab_size = _vocab_size(lm_head, hidden)
    size = max(1, chunk_logits // vocab_size)
    total: Tensor | None = None
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        loss, nll = checkpoint(
            _chunk_loss,
            hidden[part],
            lm_head,
            labels[part],
            None if weights is None else weights[part],
            use_reentrant=False,
            preserve_rng_state=False,  # a head has no dropout
        )
        total = loss if total is None else total + loss
        if observe is not None:
            observe(supervised[part], nll.detach())
    assert total is not None
    return total


def _chunk_loss(
    hidden: Tensor, lm_head: Callable[[Tensor], Tensor], labels: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weighted sum and the [n] negative log likelihoods."""
    logits = lm_head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = cross_entropy(logits, labels, reduction="none")
    return (nll.sum() if weights is None else (nll * weights).sum()), nll


def _vocab_size(lm_head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    known = getattr(lm_head, "out_features", None)
    return known if known is not None else lm_head(hidden[:1].detach()).shape[-1]
