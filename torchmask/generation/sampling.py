"""One token from each row's logits, by the inverse of the cumulative distribution.

A token is found from a uniform number that the caller brings, one a row, so a row's draw depends on nothing but its own
logits and its own number. `torch.multinomial` with a generator a row would cost a call a row and step.

Legend: B rows, V vocab_size.
"""

import numpy as np
import torch
from torch import Tensor


def sample(
    logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """[B] int64: the tokens at `uniforms` of the cumulative distributions.

    The order is transformers': temperature, then top-k, then top-p of what top-k has left. Softmax is in at least fp32,
    the cumulative sum in fp64: over 128,256 tokens in fp32 its end misses 1 by more than most tokens' probability
    (4e-6 against 8e-8 for normal logits).

    Args:
        logits: [B, V].
        uniforms: [B] float64 in [0, 1).
        temperature: above 0, however small; divides the logits.
        top_k: only this many of the most probable tokens can be chosen.
        top_p: only the most probable tokens whose mass reaches this (Holtzman et al. 2019, arXiv 1904.09751), at least
            one; in (0, 1].

    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> [sample(logits, torch.tensor([u], dtype=torch.float64)).item() for u in (0.0, 0.49, 0.51, 0.99)]
    [0, 0, 1, 2]
    >>> [sample(logits, torch.tensor([u], dtype=torch.float64), top_p=0.6).item() for u in (0.0, 0.6, 0.99)]
    [0, 0, 1]
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    limits = torch.finfo(logits.dtype)  # beyond them the temperature would be 0 or infinite in this dtype
    # Of differences, which are 0 at the most, none becomes infinite but those whose probability is 0.
    scaled = (logits - logits.amax(-1, keepdim=True)) / min(max(temperature, limits.tiny), limits.max)
    ranked: Tensor | None = None
    if top_k is not None:
        scaled, ranked = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1)
    elif top_p is not None:
        scaled, ranked = scaled.sort(dim=-1, descending=True)
    probabilities = scaled.softmax(-1).double()
    cumulative = probabilities.cumsum(-1)
    if top_p is not None:
        before = cumulative - probabilities
        in_nucleus = before < top_p * cumulative[:, -1:]  # rounding: the whole is not exactly 1
        cumulative = torch.where(in_nucleus, probabilities, 0.0).cumsum(-1)
    # u * total < total in fp64 for every u < 1, and a token of probability 0 never is the first to pass it.
    target = uniforms[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True)  # [B, 1]
    chosen.clamp_(max=cumulative.shape[-1] - 1)  # logits that are NaN: the caller will tell, `gather` would die on CUDA
    return (chosen if ranked is None else ranked.gather(-1, chosen))[:, 0]


def uniforms_of(seed: int, index: int, num_draws: int) -> Tensor:
    """[num_draws] float64 in [0, 1): the random numbers of prompt `index`, the same whatever is generated beside it.

    NumPy mixes the two integers into one state; seeds of torch's own generators would have to be mixed by hand.
    """
    return torch.from_numpy(np.random.default_rng([seed, index]).random(num_draws))
