from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.data import plan_packs
from torchmask.data.plan import cut_stream
from torchmask.errors import ConfigError, DataError

WHOLE = ("best_fit", "first_fit", "in_order", "none")


@st.composite
def lengths_and_capacity(draw):
    """Lengths of few kinds, so that many documents are interchangeable, or of any."""
    capacity = draw(st.integers(1, 40))
    kinds = draw(st.lists(st.integers(0, capacity), min_size=1, max_size=6))
    length = draw(st.sampled_from([st.sampled_from(kinds), st.integers(0, capacity)]))
    return draw(st.lists(length, max_size=60)), capacity


def rows(plan):
    return [row.tolist() for row in plan]


@pytest.mark.parametrize("strategy", WHOLE)
@given(case=lengths_and_capacity())
def test_every_document_is_in_one_row_and_no_row_is_too_full(strategy, case):
    lengths, capacity = case
    plan = plan_packs(lengths, capacity, strategy)
    assert sorted(i for row in plan for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in plan)
    assert all(len(row) for row in plan)


@pytest.mark.parametrize("strategy", WHOLE)
@given(case=lengths_and_capacity())
def test_a_plan_depends_on_nothing_but_its_input(strategy, case):
    lengths, capacity = case
    array = np.array(lengths, np.int32)
    assert rows(plan_packs(lengths, capacity, strategy)) == rows(plan_packs(array, capacity, strategy))
    assert array.tolist() == lengths


def best_fit_decreasing(lengths, capacity):
    """How full the rows are, by the textbook: one document at a time into the fullest row with room."""
    room = []
    for length in sorted((n for n in lengths if n), reverse=True):
        able = [i for i in range(len(room)) if room[i] >= length]
        if able:
            room[min(able, key=lambda i: room[i])] -= length
        else:
            room.append(capacity - length)
    return sorted(room)


def first_fit_decreasing(lengths, capacity):
    room = []
    for length in sorted((n for n in lengths if n), reverse=True):
        i = next((i for i in range(len(room)) if room[i] >= length), None)
        if i is None:
            room.append(capacity - length)
        else:
            room[i] -= length
    return sorted(room)


def test_rows_that_are_left_over_keep_their_room():
    # Three rows have room for 4 left; two of them take a 4 each, the third must still take the 3 and the 1.
    assert rows(plan_packs([6, 6, 6, 3, 4, 4, 1], 10)) == [[0, 4], [1, 5], [2, 3, 6]]


@pytest.mark.parametrize(
    ("strategy", "reference"), [("best_fit", best_fit_decreasing), ("first_fit", first_fit_decreasing)]
)
@given(case=lengths_and_capacity())
def test_fits_fill_rows_as_the_textbook_does(strategy, reference, case):
    lengths, capacity = [n for n in case[0] if n], case[1]
    room = [capacity - sum(lengths[i] for i in row) for row in plan_packs(lengths, capacity, strategy)]
    assert sorted(room) == reference(lengths, capacity)


@given(case=lengths_and_capacity())
def test_in_order_keeps_the_order_and_opens_a_row_only_when_it_must(case):
    lengths, capacity = case
    plan = plan_packs(lengths, capacity, "in_order")
    assert [i for row in plan for i in row] == list(range(len(lengths)))
    for row, following in pairwise(plan):
        assert sum(lengths[i] for i in row) + lengths[following[0]] > capacity


@given(case=lengths_and_capacity())
def test_split_fills_every_row_but_the_last(case):
    lengths, capacity = case
    documents, starts, stops = cut_stream(np.array(lengths, np.int64), capacity)
    stream = [(d, t) for d, a, b in zip(documents, starts, stops) for t in range(a, b)]
    assert stream == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
    plan = plan_packs(lengths, capacity, "split")
    assert len(plan) == -(-sum(lengths) // capacity)
    sizes, at = [], 0
    for row in plan:
        sizes.append(sum(stops[at : at + len(row)] - starts[at : at + len(row)]))
        assert row.tolist() == documents[at : at + len(row)].tolist()
        at += len(row)
    assert all(size == capacity for size in sizes[:-1])


@pytest.mark.parametrize("strategy", ("best_fit", "first_fit", "in_order", "split", "none"))
def test_rows_are_numbered_by_their_first_document(strategy):
    lengths = np.random.default_rng(0).integers(1, 64, 500)
    plan = plan_packs(lengths, 64, strategy)
    firsts = [row[0] for row in plan]
    assert firsts == sorted(firsts)
    assert all((np.diff(row) > 0).all() for row in plan)


@pytest.mark.parametrize("strategy", ("best_fit", "first_fit"))
def test_lognormal_lengths_fill_995_in_1000_slots(strategy):
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 50_000), 8, 4096).astype(int)
    plan = plan_packs(lengths, 4096, strategy)
    assert lengths.sum() / (len(plan) * 4096) >= 0.995


def test_capacities_beyond_16_bits_work():
    lengths = np.random.default_rng(0).integers(1, 100_000, 300)
    plan = plan_packs(lengths, 100_000)
    assert sorted(plan.order) == list(range(300))
    assert np.add.reduceat(lengths[plan.order], plan.offsets[:-1]).max() <= 100_000


def test_a_plan_is_a_sequence_of_views():
    plan = plan_packs([3, 6, 2, 5], 8)
    assert len(plan) == 2 and plan[-1].tolist() == [1, 2] and rows(plan[:1]) == [[0, 3]]
    assert np.shares_memory(plan[0], plan.order)
    with pytest.raises(IndexError):
        plan[2]


def test_an_unknown_strategy_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"best_fit, first_fit, in_order, split, none") as error:
        plan_packs([1], 4, "bestfit")
    assert error.value.fix == "did you mean best_fit?"


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(DataError, match="document 1 has 5 tokens, max_seq_len is 4"):
        plan_packs([1, 5], 4)
