import numpy as np
import pytest

from torchmask.data import Sample, Samples, SamplesBuilder
from torchmask.messages import MaskFlag


def make(count, *, weights=False):
    builder = SamplesBuilder()
    for i in range(count):
        w = np.full(i + 1, 0.5, np.float32) if weights and i % 2 else None
        builder.append(np.arange(i + 1), [True] * i + [False], w, source="train.jsonl", row=10 + i)
    return builder.finish()


def test_a_sample_takes_lists_and_bool_masks_and_has_its_own_dtypes():
    sample = Sample([1, 5, 2], [True, False, True], [1, 0.5, 2])
    assert (sample.tokens.dtype, sample.mask.dtype, sample.weights.dtype) == (np.int32, np.uint8, np.float32)
    assert sample.mask.tolist() == [1, 0, 1]
    assert sample.trained.tolist() == [False, True, False]
    assert len(sample) == 3


def test_a_sample_of_right_dtypes_is_not_copied():
    tokens, mask = np.array([1, 2], np.int32), np.array([0, 1], np.uint8)
    sample = Sample(tokens, mask)
    assert sample.tokens is tokens and sample.mask is mask


def test_a_weight_of_zero_masks():
    sample = Sample([1, 5, 2], [0, 0, MaskFlag.ATTENTION], [1, 0, 0])
    assert sample.mask.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("tokens", "mask", "weights", "says"),
    [
        ([1, 2], [0], None, "2 tokens and 1 flags"),
        ([1, -2], [0, 0], None, "found -2"),
        ([1, 2**31], [0, 0], None, f"found {2**31}"),
        ([1.0, 2.0], [0, 0], None, "integers, got float64"),
        ([[1, 2]], [0, 0], None, "one-dimensional"),
        ([1, 2], [0, 4], None, "found 4"),
        ([1, 2], [0, -1], None, "found -1"),
        ([1, 2], [0, 0], [1.0], "one length"),
        ([1, 2], [0, 0], [1.0, float("nan")], "finite"),
    ],
)
def test_a_malformed_sample_is_refused_with_the_value_found(tokens, mask, weights, says):
    with pytest.raises(ValueError, match=says.replace("*", r"\*")):
        Sample(tokens, mask, weights)


def test_samples_give_back_what_was_appended():
    samples = make(5)
    assert [s.tokens.tolist() for s in samples] == [list(range(i + 1)) for i in range(5)]
    assert [s.mask.tolist() for s in samples] == [[1] * i + [0] for i in range(5)]
    assert samples[-1].tokens.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        samples[5]


def test_items_and_slices_are_views():
    samples = make(6)
    assert np.shares_memory(samples[3].tokens, samples.tokens)
    assert np.shares_memory(samples[2:5].tokens, samples.tokens)


def test_slices_see_the_slice_only():
    part = make(30)[10:20]
    assert len(part) == 10 and len(part.tokens) == sum(range(11, 21))
    assert part[0].tokens.tolist() == list(range(11)) and part.where(0) == "train.jsonl:20"
    assert part[2:4][1].tokens.tolist() == list(range(14))
    assert len(make(3)[3:]) == 0 and len(make(3)[2:1]) == 0


def test_a_slice_with_a_step_and_a_selection_keep_their_order():
    samples = make(6, weights=True)
    assert [len(s) for s in samples[::-2]] == [6, 4, 2]
    chosen = samples.select([4, 0, 5])
    assert [s.tokens.tolist() for s in chosen] == [list(range(5)), [0], list(range(6))]
    assert [chosen.where(i) for i in range(3)] == ["train.jsonl:14", "train.jsonl:10", "train.jsonl:15"]
    assert chosen[2].weights.tolist() == [0.5] * 6


def test_samples_without_weights_among_weighted_ones_get_ones():
    samples = make(3, weights=True)
    assert [s.weights.tolist() for s in samples] == [[1], [0.5, 0.5], [1, 1, 1]]
    assert make(3).weights is None


def test_the_builder_grows_beyond_its_first_block():
    builder = SamplesBuilder()
    for i in range(300):
        builder.append(np.full(37, i), np.zeros(37, bool))
    samples = builder.finish()
    assert len(samples.tokens) == 300 * 37
    assert all((s.tokens == i).all() and len(s) == 37 for i, s in enumerate(samples))


def test_places_are_named_with_file_and_row():
    builder = SamplesBuilder()
    builder.append([1], [0], source="d/a.jsonl", row=17)
    builder.append([1], [0], source="b.txt")
    builder.append([1], [0])
    samples = builder.finish()
    assert [samples.where(i) for i in range(3)] == ["d/a.jsonl:17", "b.txt, sample 1", "sample 2"]
    assert samples.row_name(0) == "row 17 of a.jsonl"


def test_skipped_rows_are_counted_by_cause_with_the_first_places():
    builder = SamplesBuilder()
    builder.append([1], [0], num_straddlers=2)
    for row in range(12):
        builder.skip("malformed", f"a.jsonl:{row}")
    report = builder.finish().report
    assert (report["rows_read"], report["samples"], report["straddlers"]) == (13, 1, 2)
    assert report["skipped"]["malformed"]["count"] == 12
    assert report["skipped"]["malformed"]["places"] == [f"a.jsonl:{row}" for row in range(10)]


def test_concatenation_keeps_samples_places_and_reports():
    other = SamplesBuilder()
    other.append([7, 8], [0, 0], source="b.jsonl", row=1)
    other.skip("empty", "b.jsonl:2")
    both = Samples.concatenate([make(2, weights=True), other.finish()])
    assert [s.tokens.tolist() for s in both] == [[0], [0, 1], [7, 8]]
    assert both[2].weights.tolist() == [1, 1]
    assert [both.where(i) for i in range(3)] == ["train.jsonl:10", "train.jsonl:11", "b.jsonl:1"]
    assert both.report["rows_read"] == 4 and both.report["skipped"]["empty"]["count"] == 1


def test_any_sequence_is_taken_by_its_own_length():
    class View:
        """A view as wrappers write it: a length of its own, items from the whole."""

        def __init__(self, base):
            self.base = base

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return self.base[i]

    base = [Sample([i, i], [0, 0]) for i in range(5)]
    assert len(Samples.from_samples(View(base))) == 2
    assert len(Samples.from_samples(iter(base))) == 5
    store = Samples.from_samples(base)
    assert Samples.from_samples(store) is store
