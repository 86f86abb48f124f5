import json
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from torchmask.data import PackedDataset, PackedStream, StreamPart, instruct_dataset, open_source
from torchmask.data.streaming import _given_before
from torchmask.errors import ConfigError, DataError

ROWS = [{"input": f"q{i}", "output": "a" * (i * 7 % 23 + 1)} for i in range(100)]


@pytest.fixture
def builder(char_tokenizer):
    tokenizer = char_tokenizer()
    return partial(instruct_dataset, tokenizer)


def stream_of(builder, rows=ROWS, **options):
    return PackedStream([StreamPart(builder, rows)], **{"max_seq_len": 64, "window": 16, **options})


def shown(packs):
    return [(p.tokens.tolist(), p.labels.tolist(), p.positions.tolist(), p.visible_until.tolist()) for p in packs]


def documents(packs):
    """All documents in the packs, by their tokens."""
    found = []
    for pack in packs:
        starts = np.append(np.flatnonzero(pack.positions == 0), len(pack))
        found += [tuple(pack.tokens[a:b].tolist()) for a, b in pairwise(starts)]
    return sorted(found)


def test_every_row_is_packed_once_and_as_in_memory(builder):
    stream = stream_of(builder)
    packs = list(stream)
    whole = builder(source=ROWS)
    assert documents(packs) == sorted(tuple(sample.tokens.tolist()) for sample in whole)
    assert stream.report["samples"] == 100
    one_window = shown(stream_of(builder, window=1000))
    assert sorted(one_window) == sorted(shown(PackedDataset(whole, max_seq_len=64)))


@pytest.mark.parametrize("options", [{}, {"world_size": 2, "rank": 1}, {"packing": {"trim_tail": True}}])
def test_a_stream_resumed_anywhere_gives_the_packs_it_would_have_given(builder, options):
    whole = shown(stream_of(builder, **options))
    for taken in range(len(whole) + 1):
        first = stream_of(builder, **options)
        before = [next(first) for _ in range(taken)]
        state = json.loads(json.dumps(first.state_dict()))
        assert len(json.dumps(state)) < 200
        second = stream_of(builder, **options)
        second.load_state_dict(state)
        assert shown(before) + shown(second) == whole
        # An object that was in use goes to that place too.
        first.load_state_dict(state)
        assert shown(first) == whole[taken:]


def test_what_lies_before_the_place_is_not_tokenised_again(char_tokenizer):
    tokenizer = char_tokenizer()
    stream = stream_of(partial(instruct_dataset, tokenizer))
    for _ in range(12):
        next(stream)
    state, encoded = stream.state_dict(), tokenizer.num_encoded
    again = stream_of(partial(instruct_dataset, tokenizer))
    again.load_state_dict(state)
    next(again)
    assert state["window"] >= 2 and tokenizer.num_encoded - encoded <= 2 * 16


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_packs_of_one_process_among_them(builder, world_size):
    alone = sorted(shown(stream_of(builder)))
    ranks = [shown(stream_of(builder, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sorted(pack for packs in ranks for pack in packs) == alone
    together = [document for packs in ranks for document in documents_of_shown(packs)]
    assert len(together) == len(set(together)) == 100


def documents_of_shown(packs):
    found = []
    for tokens, _, positions, _ in packs:
        starts = [i for i, position in enumerate(positions) if position == 0] + [len(tokens)]
        found += [tuple(tokens[a:b]) for a, b in pairwise(starts)]
    return found


def test_ranks_without_a_window_end_at_once(builder):
    assert list(stream_of(builder, ROWS[:10], rank=3, world_size=4)) == []


def test_packs_of_a_window_are_shuffled_by_seed(builder):
    one, other = (shown(stream_of(builder, window=100, seed=seed)) for seed in (0, 1))
    assert one != other and sorted(one) == sorted(other)
    assert shown(stream_of(builder, window=100, seed=1)) == other


def test_a_repeated_stream_does_not_end_and_resumes_in_a_later_pass(builder):
    stream = stream_of(builder, ROWS[:10], repeat=True, window=6)
    seen = [next(stream) for _ in range(30)]
    state = stream.state_dict()
    rest = shown([next(stream) for _ in range(10)])
    again = stream_of(builder, ROWS[:10], repeat=True, window=6)
    again.load_state_dict(state)
    assert shown([next(again) for _ in range(10)]) == rest
    assert len(set(documents(seen))) == 10


def test_mixtures_keep_their_proportions_in_every_window(char_tokenizer):
    tokenizer, windows = char_tokenizer(), []

    def counting(name):
        def build(source):
            windows.append((name, len(source)))
            return instruct_dataset(tokenizer, source=source)

        return build

    rows = [[{"input": f"{name}{i}", "output": "x"} for i in range(size)] for name, size in (("a", 200), ("b", 50))]
    parts = [StreamPart(counting("a"), rows[0], weight=3), StreamPart(counting("b"), rows[1], weight=1)]
    packs = list(PackedStream(parts, max_seq_len=64, window=20))
    assert windows[:20] == [("a", 15), ("b", 5)] * 10
    assert len(documents(packs)) == 250  # what one has left when the other has ended comes too


def test_a_mixture_resumes_and_shards_as_one_source_does(builder):
    rows = [[{"input": f"{name}{i}", "output": "x" * (i % 9 + 1)} for i in range(60)] for name in "ab"]

    def make(**options):
        parts = [StreamPart(builder, rows[0], weight=2), StreamPart(builder, rows[1], weight=1)]
        return PackedStream(parts, max_seq_len=48, window=10, repeat=True, **options)

    def head(stream, count):
        return shown([next(stream) for _ in range(count)])

    whole = head(make(), 60)
    for taken in (0, 1, 7, 33):
        first = make()
        head(first, taken)
        second = make()
        second.load_state_dict(first.state_dict())
        assert head(second, 60 - taken) == whole[taken:]
    assert {str(p) for p in head(make(rank=0, world_size=2), 5)} <= {str(p) for p in whole}


def test_the_first_documents_of_a_mixture_are_counted_in_constant_time():
    for weights in ([0.7, 0.3], [0.5, 0.3, 0.2]):
        previous = [0] * len(weights)
        for total in (0, 1, 10, 65_535, 65_536, 65_537, 1_000_003):
            counts = _given_before(weights, total)
            assert sum(counts) == total and all(a <= b for a, b in zip(previous, counts))
            assert all(abs(c - w * total) <= 1 + total / 65_536 for c, w in zip(counts, weights))
            previous = counts


def test_rows_come_from_files_too(builder, write):
    source = write("rows.jsonl", ROWS)
    stream = stream_of(builder, lambda: open_source(source))
    assert documents(list(stream)) == documents(list(stream_of(builder)))


def test_bad_rows_keep_their_place(builder, write):
    source = write("rows.jsonl", "\n".join([*[json.dumps(row) for row in ROWS[:20]], "{"]))
    with pytest.raises(DataError, match=r"rows\.jsonl:21: not valid JSON"):
        list(stream_of(builder, lambda: open_source(source)))
    skipping = stream_of(partial(builder, on_bad_row="skip"), lambda: open_source(source))
    assert len(documents(list(skipping))) == 20 and skipping.report["skipped"]["malformed"]["count"] == 1


def test_windows_without_targets_are_passed_over_and_counted(char_tokenizer):
    builder = partial(instruct_dataset, char_tokenizer(), filter_fn=lambda row: not row["input"].startswith("q1"))
    rows = sorted(ROWS, key=lambda row: row["input"])
    stream = stream_of(builder, rows, window=4)
    assert len(documents(list(stream))) == 89
    assert stream.report["windows_without_samples"] == 2


def test_documents_that_are_too_long_are_an_error_in_a_stream_too(builder):
    with pytest.raises(DataError, match="max_seq_len is 12"):
        list(stream_of(builder, max_seq_len=12))
    assert list(stream_of(builder, max_seq_len=12, packing={"over_length": "drop"}))


def test_what_a_run_could_not_resume_in_is_refused(builder):
    with pytest.raises(ConfigError, match="read only once"):
        next(stream_of(builder, iter(ROWS)))
    with pytest.raises(ConfigError, match="window is 0"):
        stream_of(builder, window=0)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        stream_of(builder, rank=2, world_size=2)
    with pytest.raises(DataError, match="no rows"):
        next(stream_of(builder, []))


@pytest.mark.parametrize("change", [{"window": 8}, {"max_seq_len": 65}, {"seed": 1}, {"packing": {"trim_tail": True}},
                                    {"world_size": 2}, {"world_size": 2, "rank": 1}])  # fmt: skip
def test_a_place_in_another_stream_is_refused(builder, change):
    state = stream_of(builder).state_dict()
    with pytest.raises(ConfigError, match="of another stream") as caught:
        stream_of(builder, **change).load_state_dict(state)
    assert caught.value.id == "K09"
