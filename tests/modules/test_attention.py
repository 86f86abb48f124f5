"""Every attention kernel gives what the dense definition gives, forward and backward."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from torchmask.modules.attention import attend, attend_dense
from torchmask.modules.attention_mask import (
    BLOCK,
    SegmentKind,
    block_tables,
    build_attention_mask,
    may_attend,
    segments_of,
)


@st.composite
def interval_masks(draw, max_slots=40):
    """A row's visible_until made as packs make it: documents, some hidden tokens, a tail of padding."""
    until = []
    for length in draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)):
        stop = len(until) + length
        hidden = draw(st.lists(st.booleans(), min_size=length, max_size=length)) if draw(st.booleans()) else None
        for i in range(length):
            slot = len(until)
            until.append(slot + 1 if hidden and hidden[i] else stop)
    padding = draw(st.integers(0, 5))
    until += [len(until) + 1 + i for i in range(padding)]
    return until[:max_slots]


def _rows(rows):
    width = max(map(len, rows))
    return torch.tensor([row + list(range(len(row) + 1, width + 1)) for row in rows])


def _qkv(num_rows, num_slots, dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(0)

    def make(heads):
        x = torch.randn(num_rows, heads, num_slots, 8, dtype=dtype, generator=generator)
        return x.requires_grad_(requires_grad)

    return make(4), make(2), make(2)


@settings(max_examples=60, deadline=None)
@given(st.lists(interval_masks(), min_size=1, max_size=3))
def test_segments_agree_with_the_dense_reference_forward_and_backward(rows):
    until = _rows(rows)
    results = []
    for backend in ("dense", "sdpa"):
        q, k, v = _qkv(*until.shape, requires_grad=True)
        out = attend(q, k, v, build_attention_mask(until, until, backend=backend))
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for dense, sdpa in zip(*results):
        torch.testing.assert_close(sdpa, dense, rtol=1e-10, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.lists(interval_masks(), min_size=1, max_size=2))
def test_flex_agrees_with_the_dense_reference(rows):
    until = _rows(rows)
    q, k, v = _qkv(*until.shape, dtype=torch.float32)
    dense, flex = (
        attend(q, k, v, build_attention_mask(until, until, backend=backend)) for backend in ("dense", "flex")
    )
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(interval_masks())
def test_segments_partition_the_row_and_hide_nothing_visible(until):
    visible = may_attend(torch.tensor([until]))[0]
    segments = segments_of(0, torch.tensor(until).numpy())
    assert [s.start for s in segments] == [0, *(s.stop for s in segments[:-1])]
    assert segments[-1].stop == len(until)
    for s in segments:
        inside = visible[s.start : s.stop, s.start : s.stop]
        assert not visible[s.stop :, : s.stop].any(), "a later slot sees into the segment"
        if s.kind is SegmentKind.CAUSAL:
            assert inside.equal(torch.ones_like(inside).tril())
        if s.kind is SegmentKind.SELF:
            assert inside.equal(torch.eye(s.stop - s.start, dtype=torch.bool))


@pytest.mark.parametrize("num_slots", [BLOCK, 3 * BLOCK, 5 * BLOCK - 37])
def test_block_tables_cover_what_is_visible_and_claim_wholeness_only_where_true(num_slots):
    generator = torch.Generator().manual_seed(num_slots)
    ends = torch.randint(1, 200, (num_slots,), generator=generator).cumsum(0)
    slots = torch.arange(num_slots)
    document_end = ends[torch.searchsorted(ends, slots, right=True)].clamp(max=num_slots)
    hidden = torch.rand(num_slots, generator=generator) < 0.1
    until = torch.stack([document_end, torch.where(hidden, slots + 1, document_end)])
    some, whole = block_tables(until)
    num_blocks = some.shape[1]
    visible = torch.zeros(2, num_blocks * BLOCK, num_blocks * BLOCK, dtype=torch.bool)
    visible[:, :num_slots, :num_slots] = may_attend(until)
    tiles = visible.view(2, num_blocks, BLOCK, num_blocks, BLOCK).transpose(2, 3)
    assert not (tiles.any(-1).any(-1) & ~(some | whole)).any(), "a visible key lies in a block that is skipped"
    assert not (some & whole).any()
    real = tiles[:, :, :, : num_slots - (num_blocks - 1) * BLOCK] if num_blocks > 1 else tiles
    assert real[whole].all(), "a block is read without a mask though a key in it is hidden"


def test_block_mask_equals_the_one_torch_makes_by_materialising():
    num_slots = 4 * BLOCK
    until = torch.tensor([[200] * 200 + [390] * 190 + [512] * 122])
    ours = build_attention_mask(until, until, backend="flex").blocks
    theirs = create_block_mask(
        lambda b, h, q, k: (k <= q) & (q < until[b, k]), 1, None, num_slots, num_slots, device="cpu"
    )
    assert ours.to_dense().equal(theirs.to_dense())


def test_padding_costs_no_kernel_call():
    segments = segments_of(0, torch.tensor([3, 3, 3, 4, 5, 6, 7]).numpy())
    assert [(s.start, s.stop, s.kind) for s in segments] == [(0, 3, SegmentKind.CAUSAL), (3, 7, SegmentKind.SELF)]


def test_changing_one_document_changes_no_bit_of_another():
    until = torch.tensor([[5] * 5 + [12] * 7])
    q, k, v = _qkv(1, 12)
    before = attend_dense(q, k, v, may_attend(until)[:, None])[:, :, 5:]
    for t in (q, k, v):
        t[:, :, :5] = 1e3
    assert attend_dense(q, k, v, may_attend(until)[:, None])[:, :, 5:].equal(before)


@pytest.mark.slow  # compiles
def test_compiled_flex_reads_the_block_tables_and_agrees_with_the_dense_reference():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    kernel = torch.compile(flex_attention)
    generator = torch.Generator().manual_seed(0)
    for num_slots in (384, 500):
        until = (torch.randint(1, 150, (2, num_slots), generator=generator).cumsum(1) // 60 * 60 + 60).clamp(
            max=num_slots
        )
        until = torch.maximum(until, torch.arange(1, num_slots + 1))
        q, k, v = (torch.randn(2, heads, num_slots, 16, generator=generator) for heads in (4, 2, 2))
        mask = build_attention_mask(until, until, backend="flex").blocks
        with torch.no_grad():
            flex = kernel(q, k, v, block_mask=mask, enable_gqa=True)
        torch.testing.assert_close(flex, attend_dense(q, k, v, may_attend(until)[:, None]), rtol=1e-4, atol=1e-5)
