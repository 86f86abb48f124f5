"""Every attention kernel gives what the dense definition gives, forward and backward, whatever a row looks like."""

import shutil
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from torchmask.modules import attention_kernels, attention_plan
from torchmask.modules.attention import alibi_slopes, attend, attend_dense
from torchmask.modules.attention_mask import build_attention_mask, may_attend
from torchmask.modules.attention_scores import ScoreRule


@contextmanager
def small_scale():
    """Rows of 50 slots are planned as rows of thousands: many parts, no batch takes them whole."""
    with (
        patch.multiple(attention_plan, SMALL=4, BLOCK_QUERIES=5, PAIRS_PER_PART=0),
        patch.object(attention_kernels, "CUT_QUERIES", 3),
    ):
        yield


class Row:
    """A row that grows by documents: visible_until, visible_from and positions."""

    def __init__(self):
        self.until, self.since, self.positions = [], [], []

    def add(self, length, position, hidden=()):
        """A run whose end is not known yet; returns its slots."""
        slots = range(len(self.until), len(self.until) + length)
        for i, slot in enumerate(slots):
            self.until.append(slot + 1 if hidden and hidden[i] else None)
            self.since.append(slot)
            self.positions.append(position + i)
        return slots

    def close(self, slots):
        for slot in slots:
            self.until[slot] = self.until[slot] or len(self.until)


def _grow(draw, row, position, depth, hide, both_ways):
    length = draw(st.integers(1, 9))
    hidden = draw(st.lists(st.booleans(), min_size=length, max_size=length)) if hide else ()
    slots = row.add(length, position, hidden)
    if both_ways and draw(st.booleans()):
        for i, slot in enumerate(slots):
            row.since[slot] = slot if hidden and hidden[i] else slots.start
        if draw(st.booleans()):  # an answer after the prompt
            answer = row.add(draw(st.integers(1, 5)), position + length)
            row.close(answer)
    elif depth:
        for _ in range(draw(st.integers(1, 4))):
            _grow(draw, row, position + length, depth - 1, hide, both_ways)
    row.close(slots)


@st.composite
def rows(draw, depth=3, both_ways=True, anything=True):
    """visible_until, visible_from and positions of a row of documents, trees, hidden tokens, prompts and padding."""
    row = Row()
    for _ in range(draw(st.integers(1, 3))):
        _grow(draw, row, 0, draw(st.integers(0, depth)), draw(st.booleans()), both_ways)
    for _ in range(draw(st.integers(0, 4))):
        row.close(row.add(1, 0))
    if anything and draw(st.booleans()):  # limits of no pattern
        n, any_start = len(row.until), both_ways and draw(st.booleans())
        for k in draw(st.lists(st.integers(0, n - 1), max_size=6)):
            row.until[k] = draw(st.integers(k + 1, n))
            row.since[k] = draw(st.integers(0, k)) if any_start else k
    return row.until, row.since, row.positions


def batch_of(drawn):
    """[B, T] tensors of rows, padded."""
    width = max(len(until) for until, _, _ in drawn)
    tail = [list(range(len(until), width)) for until, _, _ in drawn]
    until = torch.tensor([row[0] + [s + 1 for s in pad] for row, pad in zip(drawn, tail)])
    since = torch.tensor([row[1] + pad for row, pad in zip(drawn, tail)])
    positions = torch.tensor([row[2] + [0] * len(pad) for row, pad in zip(drawn, tail)])
    return until, since, positions


OPTIONS = st.fixed_dictionaries(
    {"window": st.none() | st.integers(1, 12)},
    optional={
        "softcap": st.sampled_from([0.7, 5.0]),
        "alibi": st.booleans(),
        "scale": st.just(0.21),
        "sinks": st.booleans(),
    },
)


def _attend(backend, masks, options, dtype=torch.float64, backward=True):
    """The result of a backend, and the gradients of q, k and v, and of the sinks."""
    until, since, positions = masks
    options = dict(options)
    window, alibi = options.pop("window", None), options.pop("alibi", False)
    if alibi:
        options["alibi_slopes"] = alibi_slopes(4)
    generator = torch.Generator().manual_seed(0)

    def make(heads):
        x = torch.randn(until.shape[0], heads, until.shape[1], 8, dtype=dtype, generator=generator)
        return x.requires_grad_(backward)

    q, k, v = make(4), make(2), make(2)
    sinks = torch.linspace(-1, 2, 4, dtype=dtype).requires_grad_(backward) if options.pop("sinks", False) else None
    biased = alibi or sinks is not None
    mask = build_attention_mask(
        until, until, backend=backend, visible_from=since, positions=positions, window=window, biased=biased
    )
    out = attend(q, k, v, mask, ScoreRule(**options), sinks=sinks)
    if not backward:
        return (out,)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out, q.grad, k.grad, v.grad, *(() if sinks is None else (sinks.grad,))


@settings(max_examples=150, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=2), OPTIONS)
def test_parts_agree_with_the_dense_reference_forward_and_backward(drawn, options):
    masks = batch_of(drawn)
    dense = _attend("dense", masks, options)
    with small_scale():
        parts = _attend("sdpa", masks, options)
    batched = _attend("sdpa", masks, options)
    for a, b, truth in zip(parts, batched, dense):
        torch.testing.assert_close(a, truth, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(b, truth, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(rows(both_ways=False, anything=False), OPTIONS)
def test_without_visible_from_rows_are_causal_in_every_backend(drawn, options):
    until, since, positions = batch_of([drawn])
    explicit = _attend("dense", (until, since, positions), options)
    with small_scale():
        for backend in ("dense", "sdpa"):
            for a, b in zip(_attend(backend, (until, None, positions), options), explicit):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=2), OPTIONS)
def test_flex_agrees_with_the_dense_reference(drawn, options):
    masks = batch_of(drawn)
    for a, b in zip(*(_attend(name, masks, options, torch.float32, backward=False) for name in ("dense", "flex"))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(rows(anything=False), st.sampled_from([torch.float32, torch.bfloat16]))
def test_parts_are_as_close_to_fp64_as_dense_attention_of_the_same_dtype(drawn, dtype):
    masks = batch_of([drawn])
    truth = _attend("dense", masks, {})
    dense = _attend("dense", masks, {}, dtype)
    with small_scale():
        parts = _attend("sdpa", masks, {}, dtype)
    slack = torch.finfo(dtype).eps
    for a, b, exact in zip(parts, dense, truth):
        assert a.dtype is dtype
        assert (a.double() - exact).abs().max() <= 3 * (b.double() - exact).abs().max() + 8 * slack * exact.abs().max()


@pytest.mark.parametrize("options", [{"window": 5}, {"softcap": 2.0}, {"alibi": True}, {"window": 7, "alibi": True}])
def test_plain_rows_take_windows_caps_and_alibi_in_every_backend(options):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 20, 8, generator=generator) for heads in (4, 2, 2))
    biased = "softcap" in options or "alibi" in options
    rule = ScoreRule(softcap=options.get("softcap"), alibi_slopes=alibi_slopes(4) if "alibi" in options else None)
    window = options.get("window")
    tokens = torch.zeros(2, 20, dtype=torch.int64)
    outs = [
        attend(q, k, v, build_attention_mask(None, tokens, backend=name, window=window, biased=biased), rule)
        for name in ("dense", "sdpa", "flex", "varlen")
    ]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-6)
    plain = attend(q, k, v, build_attention_mask(None, tokens, backend="dense"))
    assert not torch.allclose(outs[0], plain, atol=1e-3)


def test_the_options_are_what_they_say():
    q, k, v = torch.tensor([[[[2.0], [3.0]]]]), torch.tensor([[[[1.0], [4.0]]]]), torch.tensor([[[[10.0], [20.0]]]])
    tokens, positions = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[0, 3]])
    mask = build_attention_mask(None, tokens, backend="dense", positions=positions)

    def second(first_score, second_score):
        return torch.tensor([first_score, second_score]).softmax(0) @ torch.tensor([10.0, 20.0])

    def result(**options):
        return attend(q, k, v, mask, ScoreRule(**options))[0, 0, 1, 0]

    torch.testing.assert_close(result(), second(3.0, 12.0))
    torch.testing.assert_close(result(scale=0.1), second(0.3, 1.2))
    capped = 5 * torch.tanh(torch.tensor([3.0, 12.0]) / 5)
    torch.testing.assert_close(result(softcap=5.0), second(*capped))
    torch.testing.assert_close(result(alibi_slopes=torch.tensor([2.0])), second(3.0 - 2.0 * 3, 12.0))
    near = build_attention_mask(None, tokens, backend="dense", positions=positions, window=3)
    assert attend(q, k, v, near)[0, 0, 1, 0] == 20.0


def test_changing_one_document_changes_no_bit_of_another():
    until = torch.tensor([[5] * 5 + [12] * 7])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    outs = {name: attend(q, k, v, build_attention_mask(until, until, backend=name)) for name in ("dense", "sdpa")}
    for t in (q, k, v):
        t[:, :, :5] = 1e3
    for name, before in outs.items():
        after = attend(q, k, v, build_attention_mask(until, until, backend=name))
        assert after[:, :, 5:].equal(before[:, :, 5:]), name


def test_changing_one_branch_of_a_tree_leaves_its_siblings_within_kernel_error():
    until = torch.tensor([[400] * 200 + [300] * 100 + [400] * 100])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 400, 8, generator=generator) for heads in (4, 2, 2))
    for name, error in (("dense", 0), ("sdpa", 1e-6)):
        mask = build_attention_mask(until, until, backend=name)
        before = attend(q, k, v, mask)
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, 200:300] = 1e3
        after = attend(*changed, mask)
        others = [*range(200), *range(300, 400)]
        torch.testing.assert_close(after[:, :, others], before[:, :, others], rtol=0, atol=error)


def test_a_batch_of_nothing_but_padding_has_gradients():
    until = torch.arange(1, 7)[None]
    for grad in _attend("sdpa", (until, None, torch.zeros_like(until)), {})[1:]:
        assert grad is not None and grad.isfinite().all()


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
        since = torch.arange(num_slots).repeat(2, 1)
        since[1, :200] = 0  # a prompt that sees itself both ways
        until[1, :200] = num_slots
        q, k, v = (torch.randn(2, heads, num_slots, 16, generator=generator) for heads in (4, 2, 2))
        mask = build_attention_mask(until, until, backend="flex", visible_from=since).blocks
        with torch.no_grad():
            flex = kernel(q, k, v, block_mask=mask, enable_gqa=True)
        torch.testing.assert_close(flex, attend_dense(q, k, v, may_attend(until, since)[:, None]), rtol=1e-4, atol=1e-5)
