"""The properties of masking.md section 6 that concern flat packs, against a reference that handles one document at a
time with plain lists."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from torchmask.data import PackedDataset, Sample, SamplesBuilder, collate
from torchmask.errors import DataError

IGN = -100
STRATEGIES = ("best_fit", "first_fit", "in_order", "none", "split")


@st.composite
def documents(draw, *, min_count=1, max_length=12, always_targets=False):
    """Documents with random flags and weights; tokens are unique, so that a label says where it came from."""
    count = draw(st.integers(min_count, 12))
    weighted = draw(st.booleans())
    samples = []
    for d in range(count):
        n = draw(st.integers(2 if always_targets else 0, max_length))
        mask = draw(st.lists(st.sampled_from([0, 0, 1, 1, 2, 3]), min_size=n, max_size=n))
        weights = None
        if weighted:
            weights = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=n, max_size=n))
        if always_targets:
            mask[-1] = 0
            weights = weights and [*weights[:-1], 1.0]
        samples.append(Sample(list(range(100 * d, 100 * d + n)), mask, weights))
    return samples


def unpacked(sample):
    """(y, om) of one document alone, by the definition."""
    w = [1.0] * len(sample) if sample.weights is None else sample.weights.tolist()
    y, om = [], []
    for i in range(len(sample)):
        has = i + 1 < len(sample) and not sample.mask[i + 1] & 1 and w[i + 1] != 0
        y.append(int(sample.tokens[i + 1]) if has else IGN)
        om.append(w[i + 1] if has else 0.0)
    return y, om


def weights_of(pack):
    return (pack.labels != IGN).astype(np.float64) if pack.weights is None else pack.weights.astype(np.float64)


def placed(dataset):
    """(row, placement, labels, om) of every document in every row."""
    for r in range(len(dataset)):
        pack, om = dataset[r], weights_of(dataset[r])
        for p in dataset.documents(r):
            cut = slice(p.slot, p.slot + p.stop - p.start)
            yield pack, p, pack.labels[cut].tolist(), om[cut].tolist()


def pack_or_none(samples, **options):
    try:
        return PackedDataset(samples, **{"max_truncated_away": 1.0, **options})
    except DataError as error:
        assert error.id in ("D09", "D11")  # nothing to train is said, not packed
        return None


options = st.fixed_dictionaries(
    {
        "max_seq_len": st.integers(1, 16),
        "strategy": st.sampled_from(STRATEGIES),
        "over_length": st.sampled_from(["truncate", "split", "drop"]),
        "truncate_side": st.sampled_from(["right", "left"]),
        "no_targets": st.sampled_from(["drop", "keep"]),
        "trim_tail": st.booleans(),
    }
)


@given(samples=documents(), choice=options)
def test_p1_the_weights_in_packs_are_those_of_the_documents_less_the_dropped(samples, choice):
    dataset = pack_or_none(samples, **choice)
    if dataset is None:
        return
    report = dataset.report
    before = sum(sum(unpacked(s)[1]) for s in samples)
    after = sum(weights_of(pack).sum() for pack in dataset)
    assert report["weights"]["before"] == before and report["weights"]["after"] == after
    assert np.isclose(before, after + sum(report["weights"]["dropped"].values()))
    assert report["trained"] == sum(int((pack.labels != IGN).sum()) for pack in dataset)
    assert report["tokens_in"] == sum(len(s) for s in samples)
    assert report["trained"] + report["masked"] == sum(len(pack) for pack in dataset)


@given(samples=documents(), choice=options)
def test_rows_hold_what_the_placements_say_and_fit(samples, choice):
    dataset = pack_or_none(samples, **choice)
    if dataset is None:
        return
    for r in range(len(dataset)):
        pack, at = dataset[r], 0
        assert 0 < len(pack) <= choice["max_seq_len"]
        for p in dataset.documents(r):
            assert p.slot == at
            n = p.stop - p.start
            tokens = samples[p.sample].tokens[p.start : p.stop].tolist()
            if p.keeps_first:
                tokens[0] = int(samples[p.sample].tokens[0])
            hidden = (samples[p.sample].mask[p.start : p.stop] & 2 != 0).tolist()
            if p.keeps_first:
                hidden[0] = bool(samples[p.sample].mask[0] & 2)
            assert pack.tokens[at : at + n].tolist() == tokens
            assert pack.positions[at : at + n].tolist() == list(range(n))
            expected = [at + k + 1 if hidden[k] else at + n for k in range(n)]
            assert pack.visible_until[at : at + n].tolist() == expected
            at += n
        assert at == len(pack)


@given(samples=documents(), choice=options)
def test_no_label_is_other_than_the_next_token_of_its_document(samples, choice):
    dataset = pack_or_none(samples, **choice)
    if dataset is None:
        return
    labels = [int(label) for pack in dataset for label in pack.labels if label != IGN]
    assert len(labels) == len(set(labels))  # each target is trained once
    for _, p, y, om in placed(dataset):
        whole_y, whole_om = unpacked(samples[p.sample])
        for k in range(p.stop - p.start):
            if y[k] != IGN:
                assert (y[k], om[k]) == (whole_y[p.start + k], whole_om[p.start + k])
            else:
                assert om[k] == 0


@given(samples=documents(), strategy=st.sampled_from(STRATEGIES[:4]), capacity=st.integers(12, 30))
def test_p2_labels_and_weights_in_a_pack_equal_the_unpacked_ones(samples, strategy, capacity):
    dataset = pack_or_none(samples, max_seq_len=capacity, strategy=strategy, no_targets="keep")
    if dataset is None:
        return
    seen = [p.sample for _, p, y, om in placed(dataset) if (y, om) == unpacked(samples[p.sample])]
    assert sorted(seen) == [d for d, s in enumerate(samples) if len(s)]


@given(samples=documents(), data=st.data(), capacity=st.integers(2, 16), strategy=st.sampled_from(STRATEGIES))
def test_p5_trained_stops_are_the_documents_whose_stop_is_trained(samples, data, capacity, strategy):
    builder, stops = SamplesBuilder(), []
    for s in samples:
        stops.append(data.draw(st.integers(-1, len(s) - 1)))
        builder.append(s.tokens, s.mask, s.weights, stop=stops[-1])
    dataset = pack_or_none(builder.finish(), max_seq_len=capacity, strategy=strategy, over_length="truncate")
    if dataset is None:
        return
    labels = {int(label) for pack in dataset for label in pack.labels}
    trained = sum(stop >= 0 and int(samples[d].tokens[stop]) in labels for d, stop in enumerate(stops))
    assert dataset.report["eos"]["trained_stops"] == trained


@given(samples=documents(), pads=st.tuples(st.integers(0, 1200), st.integers(0, 1200)))
def test_p7_the_pad_id_changes_nothing_but_padding(samples, pads):
    dataset = pack_or_none(samples, max_seq_len=16, no_targets="keep")
    if dataset is None:
        return
    a, b = (collate(list(dataset), pad_to=20, pad_id=pad) for pad in pads)
    for name in ("labels", "positions", "visible_until"):
        assert (getattr(a, name) == getattr(b, name)).all()
    assert a.num_targets == b.num_targets
    for r, pack in enumerate(dataset):
        assert (a.tokens[r, : len(pack)] == b.tokens[r, : len(pack)]).all()
        assert (a.labels[r, len(pack) :] == IGN).all()
        # No real slot sees padding and padding is seen by nobody else.
        assert (a.visible_until[r, len(pack) :].numpy() == np.arange(len(pack), 20) + 1).all()
        assert (a.visible_until[r, : len(pack)] <= len(pack)).all()


@given(samples=documents(), capacities=st.tuples(st.integers(12, 40), st.integers(12, 40)))
def test_p8_the_limit_changes_no_document_when_nothing_is_cut(samples, capacities):
    results = []
    for capacity in capacities:
        dataset = pack_or_none(samples, max_seq_len=capacity)
        results.append(dataset and sorted((p.sample, y, om) for _, p, y, om in placed(dataset)))
    assert results[0] == results[1]


@given(samples=documents(always_targets=True), data=st.data())
def test_p9_the_order_of_documents_changes_only_the_layout(samples, data):
    order = data.draw(st.permutations(range(len(samples))))
    a = PackedDataset(samples, max_seq_len=16)
    b = PackedDataset([samples[i] for i in order], max_seq_len=16)
    assert len(a) == len(b)
    contents_a = sorted((p.sample, y, om) for _, p, y, om in placed(a))
    contents_b = sorted((order[p.sample], y, om) for _, p, y, om in placed(b))
    assert contents_a == contents_b


@given(samples=documents(max_length=30), capacity=st.integers(1, 16), over_length=st.booleans())
def test_p10_fragments_concatenate_to_the_original_labels(samples, capacity, over_length):
    strategy = {"over_length": "split"} if over_length else {"strategy": "split"}
    dataset = pack_or_none(samples, max_seq_len=capacity, **strategy)
    if dataset is None:
        return
    found = {}
    for _, p, y, om in sorted(placed(dataset), key=lambda entry: entry[1]):
        labels, weights = found.setdefault(p.sample, ([], []))
        labels += y
        weights += om
    for d, (y, om) in found.items():
        assert (y, om) == unpacked(samples[d])
    missing = [d for d in range(len(samples)) if d not in found]
    assert all(set(unpacked(samples[d])[0]) <= {IGN} for d in missing)


@given(samples=documents(max_length=30), capacity=st.integers(1, 16), over_length=st.booleans())
def test_trimmed_fragments_are_the_original_labels_but_for_stretches_without_any(samples, capacity, over_length):
    strategy = {"over_length": "split"} if over_length else {"strategy": "split"}
    dataset = pack_or_none(samples, max_seq_len=capacity, trim_tail=True, **strategy)
    if dataset is None:
        return
    found, left_out = {}, 0
    for _, p, y, _ in sorted(placed(dataset), key=lambda entry: entry[1]):
        labels = found.setdefault(p.sample, [])
        left_out += p.start - len(labels)
        labels += [IGN] * (p.start - len(labels)) + y
    for d, y in found.items():
        missing = len(samples[d]) - len(y)
        left_out += missing
        assert y + [IGN] * missing == unpacked(samples[d])[0]
    assert left_out == dataset.report["dropped"].get("trimmed", 0)


@given(samples=documents(always_targets=True), capacity=st.integers(2, 16))
def test_trimming_keeps_every_target(samples, capacity):
    whole, trimmed = (
        PackedDataset(samples, max_seq_len=capacity, over_length="split", trim_tail=trim) for trim in (False, True)
    )
    count = [Counter(int(label) for p in d for label in p.labels if label != IGN) for d in (whole, trimmed)]
    assert count[0] == count[1]
    assert trimmed.row_lengths.sum() <= whole.row_lengths.sum()
