import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.data import PackedDataset, Sample, Samples
from torchmask.data.fragments import Fragments, Targets
from torchmask.messages import MaskFlag


@st.composite
def stores(draw):
    """Documents, also empty ones, and pieces of them with every kind of edge."""
    weighted, samples, pieces = draw(st.booleans()), [], []
    for d in range(draw(st.integers(1, 6))):
        n = draw(st.integers(0, 8))
        mask = draw(st.lists(st.sampled_from([0, 0, 1, 1, 2, 3]), min_size=n, max_size=n))
        weights = draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=n, max_size=n)) if weighted else None
        samples.append(Sample(list(range(n)), mask, weights))
        for _ in range(draw(st.integers(0, 3)) if n else 0):
            start = draw(st.integers(0, n - 1))
            stop = draw(st.integers(start + 1, n))
            goes_on = stop < n and draw(st.booleans())
            pieces.append((d, start, stop, goes_on, start > 0 and draw(st.booleans()), draw(st.booleans())))
    columns = [list(column) for column in zip(*pieces)] or [[]] * 6
    numbers = [np.array(column, np.int64) for column in columns[:3]]
    return samples, Fragments(*numbers, *(np.array(column, bool) for column in columns[3:]))


def predicted(fragment, terminated_too):
    """The places that a fragment's slots predict, one after the other."""
    _, start, stop, goes_on, keeps_first, terminated = fragment
    places = list(range(start + 1 + keeps_first, stop + goes_on))
    return places if terminated_too or not terminated else [p for p in places if p < stop + goes_on - 1]


@given(stores(), st.booleans())
def test_targets_are_those_that_a_look_at_every_token_finds(store, terminated_too):
    samples, fragments = store
    targets = Targets(Samples.from_samples(samples), train_terminated=terminated_too)
    columns = (fragments.samples, fragments.starts, fragments.stops, fragments.continues, fragments.keeps_first)
    rows = list(zip(*(column.tolist() for column in (*columns, fragments.terminated))))
    found, weights, last_held = [], [], []
    for row in rows:
        sample = samples[row[0]]
        is_target = [i > 0 and not flag & MaskFlag.LOSS for i, flag in enumerate(sample.mask.tolist())]
        own = [p for p in predicted(row, terminated_too) if is_target[p]]
        found.append(own)
        weights.append(sum(1.0 if sample.weights is None else float(sample.weights[p]) for p in own))
        last_held.append(row[2] - 1 in own)
    assert targets.count(fragments).tolist() == [len(own) for own in found]
    assert targets.weight(fragments).tolist() == pytest.approx(weights)
    assert targets.holds(fragments, fragments.stops - 1).tolist() == last_held
    assert not targets.holds(fragments, np.full(len(fragments), -1)).any()
    some = np.array([bool(own) for own in found], bool)
    assert targets.first(fragments.select(some)).tolist() == [own[0] for own in found if own]
    assert targets.last(fragments.select(some)).tolist() == [own[-1] for own in found if own]


def test_whole_documents_need_no_list_of_all_targets():
    samples = [Sample([1, 5, 6, 2], [1, 1, 0, 0]), Sample([1, 7, 2], [1, 0, 0])]
    dataset = PackedDataset(samples, max_seq_len=8)
    assert "_places" not in vars(dataset._targets)
    assert dataset.report["trained"] == 4 and "_places" not in vars(dataset._targets)
