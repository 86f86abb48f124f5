"""The dense reference itself: the formula over grouped heads, without a copy of keys and values for each head."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchmask.modules.attention import alibi_slopes, attend, attend_dense
from torchmask.modules.attention_mask import AttentionMask
from torchmask.modules.attention_scores import ScoreRule


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"alibi_slopes": alibi_slopes(6)}], ids=["plain", "cap", "alibi"]
)
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_reference_is_the_formula_over_heads_repeated_in_groups(options, kv_heads, has_sinks):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 3, 8, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(2, kv_heads, 9, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    sinks = torch.linspace(-1, 2, 6, dtype=torch.float64) if has_sinks else None
    out = attend_dense(q, k, v, None, rule=ScoreRule(**options), sinks=sinks)
    every = [x.repeat_interleave(6 // kv_heads, dim=1) for x in (k, v)]
    torch.testing.assert_close(
        out, attend_dense(q, *every, None, rule=ScoreRule(**options), sinks=sinks), rtol=0, atol=1e-14
    )
    head, query = 4, 1  # one of them from scratch
    scores = every[0][1, head, : 9 - 3 + query + 1] @ q[1, head, query] / 8**0.5
    if "softcap" in options:
        scores = 2.0 * torch.tanh(scores / 2.0)
    if "alibi_slopes" in options:
        scores = scores - options["alibi_slopes"][head].double() * torch.arange(len(scores)).flip(0)
    whole = scores.exp().sum() + (0 if sinks is None else sinks[head].exp())
    expected = (scores.exp() / whole) @ every[1][1, head, : len(scores)]
    torch.testing.assert_close(out[1, head, query], expected, rtol=0, atol=1e-12)


class MadeTensors(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns in memory of its own."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            if out.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"alibi_slopes": alibi_slopes(8)}, {}], ids=["cap", "alibi", "sinks"]
)
def test_keys_and_values_are_not_copied_for_each_head_that_reads_them(options):
    q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 500, 64), torch.randn(1, 2, 500, 64)
    mask = AttentionMask(visible=torch.ones(1, 1, 1, 500, dtype=torch.bool))
    sinks = None if options else torch.zeros(8)
    with torch.no_grad(), MadeTensors() as made:
        attend(q, k, v, mask, ScoreRule(**options), sinks=sinks)
    assert 8 * 500 <= made.largest < k.numel()  # the scores, and nothing larger
