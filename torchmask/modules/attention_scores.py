"""What attention makes of the products of queries and keys before the softmax.

Legend: H heads, K kv heads, L queries, S keys, C head_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ScoreRule:
    """What becomes of q k^T before the softmax: times `scale`, then capped, then biased.

    Attributes:
        scale: None = 1 / sqrt(C).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118, section 2).
        alibi_slopes: [H]; the score falls by slope * |positions[q] - positions[k]| (Press et al. 2022, 2108.12409).
        alibi_scale: of this fall.
        alibi_rounded: slopes, positions and their products are bf16 numbers, as `DecoderSpec.alibi_rounded` says.
    """

    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    alibi_scale: float = 1.0
    alibi_rounded: bool = False

    @property
    def is_plain(self) -> bool:
        """Scores are only scaled."""
        return self.softcap is None and self.alibi_slopes is None

    def scale_for(self, head_dim: int) -> float:
        """The scale for heads of this size."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def scores(self, q: Tensor, k: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
        """[.., H, L, S] in at least fp32.

        Args:
            q: [.., H, L, C].
            k: [.., K, S, C], K divides H.
            positions: [.., L] int64 of queries and [.., S] of keys, where there are slopes.
        """
        scores = self.capped_scores(q, k)
        if self.alibi_slopes is not None:
            assert positions is not None
            self.subtract_falls(scores, *positions)
        return scores

    def capped_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[.., H, L, S]: `scores` without ALiBi's bias."""
        products, scale = matmul_by_group(q, k.mT), self.scale_for(q.shape[-1])
        products = products.to(torch.promote_types(q.dtype, torch.float32))
        if not torch.is_grad_enabled():  # as in the kernels, whose time goes into making new tensors of this size
            products.mul_(scale if self.softcap is None else scale / self.softcap)
            return products if self.softcap is None else products.tanh_().mul_(self.softcap)
        if self.softcap is None:
            return products * scale
        return self.softcap * torch.tanh(products * (scale / self.softcap))

    def subtract_falls(self, scores: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Lets scores [.., H, L, S] fall with the distance between [.., L] and [.., S] positions, in place."""
        assert self.alibi_slopes is not None
        if self.alibi_rounded:
            of_queries, of_keys = (self._rounded_heights(positions, scores.dtype) for positions in (queries, keys))
            falls = (of_queries[..., :, None] - of_keys[..., None, :]).abs_()
            scores.sub_(falls, alpha=self.alibi_scale)
        else:  # distances are the same for all heads
            distances = (queries[..., :, None] - keys[..., None, :]).abs().to(scores.dtype)[..., None, :, :]
            slopes = (self.alibi_slopes.to(scores.dtype) * self.alibi_scale)[:, None, None]
            scores.addcmul_(slopes, distances, value=-1)

    def heights(self, positions: Tensor, origin: Tensor, dtype: torch.dtype) -> Tensor:
        """[.., H, S]: how far scores fall from the origin to each position; below 0 for those before it.

        The fall from one position to a later one is the difference of their heights, with any origin; the nearer it is
        to both, the less is rounded off.

        Args:
            positions: [.., S] int64.
            origin: [..] int64, a position.
        """
        assert self.alibi_slopes is not None
        if self.alibi_rounded:
            heights = self._rounded_heights(positions, dtype) - self._rounded_heights(origin[..., None], dtype)
            return heights * self.alibi_scale
        steps = (positions - origin[..., None]).to(dtype)[..., None, :]
        return (self.alibi_slopes.to(dtype) * self.alibi_scale)[:, None] * steps

    def _rounded_heights(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.alibi_slopes is not None
        return self.rounded_heights(self.alibi_slopes, positions).to(dtype)

    @staticmethod
    def rounded_heights(slopes: Tensor, positions: Tensor) -> Tensor:
        """[.., H, S] bf16, what scores have fallen by since position 0, from [.., S] positions."""
        return slopes.to(torch.bfloat16)[:, None] * positions.to(torch.bfloat16)[..., None, :]


def matmul_by_group(x: Tensor, y: Tensor) -> Tensor:
    """[.., H, M, P]: products of [.., H, M, N] and [.., K, N, P], where H / K heads in a row share one of the K.

    The rows of such heads are the rows of one product, so that nothing is repeated.

    >>> x, y = torch.tensor([[[1.0]], [[2.0]], [[3.0]], [[4.0]]]), torch.tensor([[[10.0]], [[100.0]]])
    >>> matmul_by_group(x, y).flatten().tolist()
    [10.0, 20.0, 300.0, 400.0]
    """
    groups = x.shape[-3] // y.shape[-3]
    if groups == 1:
        return x @ y
    rows = x.unflatten(-3, (-1, groups)).flatten(-3, -2)  # [.., K, H / K * M, N]
    return (rows @ y).unflatten(-2, (groups, -1)).flatten(-4, -3)
