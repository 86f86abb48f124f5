"""The forms of a mask: parts that cover the visible pairs once, and block tables that are exact."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from torchmask.modules import attention_varlen
from torchmask.modules.attention import attend
from torchmask.modules.attention_flex import BLOCK, block_tables
from torchmask.modules.attention_mask import build_attention_mask, may_attend
from torchmask.modules.attention_plan import plan_parts
from torchmask.modules.attention_scores import ScoreRule
from torchmask.modules.attention_varlen import document_lengths
from torchmask.modules.visibility import Visibility


def layout(num_slots, seed, *, hidden=0.0, trees=False, both_ways=False):
    """visible_until, visible_from and positions ([1, T]) of a long random row."""
    rng = np.random.default_rng(seed)
    slots = np.arange(num_slots)
    until, since, positions = slots + 1, slots.copy(), np.zeros(num_slots, np.int64)

    def grow(start, end, position, depth):
        while start < end:
            stop = min(end, start + int(rng.integers(1, 300)))
            shared = min(stop, start + int(rng.integers(1, 120))) if depth else stop
            until[start:shared] = stop
            positions[start:shared] = position + slots[: shared - start]
            if both_ways and rng.random() < 0.5:
                since[start:shared] = start
            if depth:
                grow(shared, stop, position + shared - start, depth - 1)
            start = stop

    grow(0, num_slots - num_slots // 20, 0, 2 if trees else 0)
    hide = rng.random(num_slots) < hidden
    until[hide], since[hide] = slots[hide] + 1, slots[hide]
    return [torch.from_numpy(x)[None] for x in (until, since, positions)]


KINDS = {
    "flat": {},
    "hidden": {"hidden": 0.1},
    "trees": {"trees": True},
    "trees, hidden": {"trees": True, "hidden": 0.05},
    "both ways": {"both_ways": True, "hidden": 0.02},
    "trees, both ways": {"trees": True, "both_ways": True},
}


def covered(parts, num_slots):
    """[T, T] int: how many parts give each pair of a query and a key."""
    counts = torch.zeros(num_slots, num_slots, dtype=torch.int64)
    for part in (*parts.own, *parts.across):
        q, k = part.indexes(part.queries), part.indexes(part.keys)
        seen = torch.ones(1, 1, q.shape[1], k.shape[1], dtype=torch.bool) if part.visible is None else part.visible
        seen = seen.expand(q.shape[0], 1, -1, -1)[:, 0]
        if part.valid is not None:
            seen = seen & part.valid[:, :, None]
        for n in range(q.shape[0]):
            rows = torch.zeros(q.shape[1], num_slots, dtype=torch.int64).index_add_(1, k[n], seen[n].long())
            counts.index_add_(0, q[n], rows)
    for stretch in parts.alone:
        counts[stretch, stretch] += torch.eye(stretch.stop - stretch.start, dtype=torch.int64)
    return counts


@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_cover_every_visible_pair_once_and_no_other(kind, window):
    until, since, positions = layout(1500, 3, **KINDS[kind])
    parts = plan_parts(until, since=since, positions=positions, window=window)
    visible = Visibility(until, since, positions, window).table()[0]
    assert covered(parts, 1500).equal(visible.long())


def test_every_slot_is_a_query_of_one_own_part_or_alone():
    until, since, positions = layout(1500, 5, trees=True, hidden=0.05)
    parts = plan_parts(until, since=since, positions=positions)
    queries = [p.targets[0] if isinstance(p.queries, torch.Tensor) else p.indexes(p.queries)[0] for p in parts.own]
    queries += [torch.arange(s.start, s.stop) for s in parts.alone]
    assert torch.cat(queries).sort().values.equal(torch.arange(1500))


def test_the_work_for_a_tree_is_its_visible_pairs_and_no_mask():
    until = torch.tensor(
        [[2000] * 300 + [900] * 300 + [600 + 100 * (i // 100 + 1) for i in range(300)] + [2000] * 1100]
    )
    parts = plan_parts(until)
    assert not any(part.masked for part in (*parts.own, *parts.across))
    pairs = 0
    for part in (*parts.own, *parts.across):
        (n, num_queries), num_keys = part.indexes(part.queries).shape, part.indexes(part.keys).shape[1]
        pairs += n * (num_queries * (num_queries + 1) // 2 if part.causal else num_queries * num_keys)
    assert pairs == may_attend(until).sum()


def test_padding_costs_no_part():
    until = torch.tensor([[3, 3, 3, 4, 5, 6, 7], [7] * 7])
    parts = plan_parts(until)
    assert parts.alone == (slice(3, 7),)
    assert sum(part.indexes(part.queries).shape[0] for part in parts.own) == 2


def test_plain_causal_rows_need_nothing():
    until = torch.full((2, 9), 9)
    mask = build_attention_mask(until, until, backend="sdpa")
    assert mask.parts is None and mask.visible is None


@pytest.mark.parametrize("num_slots", [BLOCK, 3 * BLOCK, 5 * BLOCK - 37])
@pytest.mark.parametrize("kind", KINDS)
def test_block_tables_are_exact(kind, num_slots):
    until, since, _ = layout(num_slots, num_slots, **KINDS[kind])
    for from_slot in (since, None) if kind in ("flat", "hidden", "trees", "trees, hidden") else (since,):
        some, whole = block_tables(Visibility(until, from_slot))
        num_blocks = some.shape[1]
        visible = torch.zeros(num_blocks * BLOCK, num_blocks * BLOCK, dtype=torch.bool)
        visible[:num_slots, :num_slots] = may_attend(until, from_slot)[0]
        tiles = visible.view(num_blocks, BLOCK, num_blocks, BLOCK).transpose(1, 2)
        queries = num_slots - (num_blocks - 1) * BLOCK  # of the last block
        every = tiles.all(-1).all(-1)
        every[-1, :-1] = tiles[-1, :-1, :queries].all(-1).all(-1)
        assert (some | whole)[0].equal(tiles.any(-1).any(-1))
        assert whole[0].equal(every & ~torch.eye(num_blocks, dtype=torch.bool) if from_slot is None else every)


@pytest.mark.parametrize("window", [1, 100, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_block_tables_of_windows_skip_nothing_visible_and_call_nothing_whole_that_is_not(kind, window):
    until, since, positions = layout(5 * BLOCK, 7, **KINDS[kind])
    visibility = Visibility(until, since, positions, window)
    some, whole = block_tables(visibility)
    tiles = visibility.table()[0].view(5, BLOCK, 5, BLOCK).transpose(1, 2)
    assert not (tiles.any(-1).any(-1) & ~(some | whole)[0]).any()
    assert tiles[whole[0]].all()
    if kind == "flat" and window == 100:
        unlimited = block_tables(Visibility(until, since, positions))
        assert (some | whole).sum() <= (unlimited[0] | unlimited[1]).sum()


def test_block_mask_equals_the_one_torch_makes_by_materialising():
    num_slots = 4 * BLOCK
    until = torch.tensor([[200] * 200 + [390] * 190 + [512] * 122])
    since = torch.tensor([[0] * 190 + list(range(190, 512))])
    ours = build_attention_mask(until, until, backend="flex", visible_from=since).blocks
    theirs = create_block_mask(
        lambda b, h, q, k: (since[b, k] <= q) & (q < until[b, k]), 1, None, num_slots, num_slots, device="cpu"
    )
    assert ours.to_dense().equal(theirs.to_dense())


@pytest.fixture
def varlen_on_the_cpu(monkeypatch):
    """The variable-length kernel's signature over the plain computation, since it has no CPU kernel."""
    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                    enable_gqa=False):  # fmt: skip
        calls.append((cu_seq_q.tolist(), max_q, window_size, enable_gqa))
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        outs = []
        for a, b in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist()):
            assert b - a <= max_q
            slots = torch.arange(b - a)
            seen = slots <= slots[:, None]
            if window_size[0] >= 0:
                seen &= slots[:, None] - slots <= window_size[0]
            q, k, v = (x[a:b].transpose(0, 1) for x in (query, key, value))
            scores = (q @ k.mT) * (scale or q.shape[-1] ** -0.5)
            outs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(outs)

    for cached in (attention_varlen._kernel, attention_varlen._parameters):
        cached.cache_clear()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(attention_varlen, "can_run", lambda device_type: True)
    yield calls
    for cached in (attention_varlen._kernel, attention_varlen._parameters):
        cached.cache_clear()


@pytest.mark.parametrize("window", [None, 4])
def test_varlen_gets_the_documents_of_flat_rows(varlen_on_the_cpu, window):
    until = torch.tensor([[5] * 5 + [8] * 3, [6] * 6 + [7, 8]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 8, 8, generator=generator) for heads in (4, 2, 2))
    outs = []
    for backend in ("varlen", "dense"):
        mask = build_attention_mask(until, until, backend=backend, positions=positions, window=window)
        outs.append(attend(q, k, v, mask, ScoreRule(scale=0.3)))
    torch.testing.assert_close(*outs)
    size = (-1, 0) if window is None else (3, 0)
    assert varlen_on_the_cpu == [([0, 5, 8, 14, 15, 16], 6, size, True)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_rows_are_flat_only_if_they_are_documents_side_by_side(seed):
    rng = np.random.default_rng(seed)
    until, since, positions = layout(int(rng.integers(2, 400)), seed, hidden=0.01 * (seed % 3), trees=seed % 2 == 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_varlen, "can_run", lambda device_type: True)
        lengths = document_lengths(Visibility(until, since, positions), positions)
    num_slots = until.shape[1]
    edges = [0, *(i + 1 for i in range(num_slots) if (until[0, : i + 1] <= i + 1).all())]
    blocks = torch.zeros(num_slots, num_slots, dtype=torch.bool)
    for a, b in pairwise(edges):
        blocks[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool).tril()
    is_flat = may_attend(until)[0].equal(blocks)
    assert (lengths is not None) == is_flat
    if lengths is not None:
        assert lengths.starts.tolist() == edges
        assert lengths.longest == max(np.diff(edges))


def test_varlen_leaves_trees_prompts_and_jumping_positions_to_others(varlen_on_the_cpu):
    until = torch.tensor([[8] * 4 + [6] * 2 + [8] * 2])
    flat, positions = torch.full((1, 8), 8), torch.arange(8)[None]

    def documents(until, since=None, positions=positions, window=None):
        return document_lengths(Visibility(until, since, positions, window), positions)

    assert documents(until) is None
    assert documents(flat, torch.tensor([[0, 0, 0, 3, 4, 5, 6, 7]])) is None
    assert documents(flat, positions=2 * positions, window=3) is None
    assert documents(flat, positions=2 * positions) is not None
