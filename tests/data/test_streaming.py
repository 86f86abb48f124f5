import json
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from torchmask.data import PackedDataset, PackedStream, StreamPart, format_ledger, instruct_dataset, open_source
from torchmask.data.mixture import given_before
from torchmask.data.sample import Sample, Samples
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
    assert stream.report["documents"] == stream.report["source"]["samples"] == 100
    one_window = shown(stream_of(builder, window=1000))
    assert sorted(one_window) == sorted(shown(PackedDataset(whole, max_seq_len=64)))


@pytest.mark.parametrize("options", [{}, {"world_size": 2, "rank": 1}, {"packing": {"trim_tail": True}}])
def test_a_stream_resumed_anywhere_gives_the_packs_it_would_have_given(builder, options):
    whole = shown(stream_of(builder, **options))
    for taken in range(len(whole) + 1):
        first = stream_of(builder, **options)
        before = [next(first) for _ in range(taken)]
        state = json.loads(json.dumps(first.state_dict()))
        assert len(json.dumps(state)) < 3000
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


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.5, 0.3, 0.2], [1, 1e-6], [1, 3e-6, 2e-7], [0.9] + 10 * [0.01]])
def test_each_source_gives_its_share_however_small_and_however_late(weights):
    previous = [0] * len(weights)
    for total in (0, 1, 2, 3, 10, 55, 65_535, 65_536, 65_537, 1_000_003, 10**12, 10**15):
        counts = given_before(weights, total)
        assert sum(counts) == total and all(a <= b for a, b in zip(previous, counts))
        within = 0.51 if len(weights) == 2 else 2
        assert all(abs(c - w / sum(weights) * total) <= within for c, w in zip(counts, weights))
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
    assert len(documents(list(skipping))) == 20 and skipping.report["source"]["skipped"]["malformed"]["count"] == 1


def test_windows_without_documents_are_passed_over_and_counted(char_tokenizer):
    rows = [{"input": "q", "output": "" if 8 <= i < 16 else "a"} for i in range(24)]
    stream = stream_of(partial(instruct_dataset, char_tokenizer(), on_bad_row="skip"), rows, window=4)
    assert len(documents(list(stream))) == stream.report["documents"]
    assert sum(stream.report["windows"].values()) == 6 and stream.report["windows"]["packed"] == 4


def test_a_filter_does_not_change_the_shares_of_a_mixture(char_tokenizer):
    build = partial(instruct_dataset, char_tokenizer())
    kept = partial(build, filter_fn={"lang": "en"})
    rows = [{"input": f"q{i}", "output": "a", "lang": "fr" if i % 10 else "en"} for i in range(1000)]
    stream = PackedStream([StreamPart(build, rows), StreamPart(kept, rows)], max_seq_len=64, window=20, repeat=True)
    while stream.report["windows"].get("packed", 0) < 6:
        next(stream)
    assert [part["documents"] for part in stream.report["parts"]] == [60, 60]
    filtered = stream.report["source"]["skipped"]["filtered"]
    assert 530 <= filtered["count"] <= 600 and len(filtered["places"]) == 10


def test_a_source_that_gives_less_than_half_of_its_share_is_told_once(char_tokenizer):
    build = partial(instruct_dataset, char_tokenizer())
    rows = [{"input": f"q{i}", "output": "a", "lang": "fr"} for i in range(400)]
    bad = [*rows[:40], *[{"input": "q"}] * 360]
    told = []
    none = StreamPart(partial(build, filter_fn={"lang": "en"}), rows, name="none")
    some = StreamPart(partial(build, on_bad_row="skip", max_bad_share=1), bad, name="some")
    stream = PackedStream(
        [StreamPart(build, rows), none, some], max_seq_len=64, window=90, repeat=True, warn=told.append
    )
    assert stream.preview and len(told) == 1 and "none gave no document to train on" in told[0]
    for _ in range(400):
        next(stream)
    assert len([text for text in told if text.startswith("WARNING some gave")]) == 1
    assert len([text for text in told if "rows are skipped (missing_column)" in text]) == 1 and len(told) == 3


def test_the_ledger_balances_over_windows_of_every_kind_and_goes_on_after_a_resume(builder):
    rows = [{"input": f"q{i}", "output": "a" * (1 if 16 <= i < 32 else 90 if i % 9 == 0 else 5)} for i in range(64)]
    options = {"packing": {"over_length": "drop", "no_targets": "drop"}, "window": 8, "max_seq_len": 40}
    whole = stream_of(builder, rows, **options)
    list(whole)
    report = whole.report
    assert report["documents"] + report["dropped_documents"]["over_length"]["count"] == report["documents_in"] == 64
    assert report["tokens_in"] == report["trained"] + report["masked"] + sum(report["dropped"].values())
    lengths = builder(source=rows).lengths
    assert report["tokens_in"] == lengths.sum() and report["lengths"]["max"] == lengths.max()
    assert report["lengths"]["mean"] == pytest.approx(lengths.mean(), abs=0.01)
    assert "64 documents" in format_ledger(report) and "8 packed" in format_ledger(report)
    first = stream_of(builder, rows, **options)
    for _ in range(7):
        next(first)
    second = stream_of(builder, rows, **options)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    list(second)
    assert second.report == report


def test_documents_that_no_window_can_train_are_in_the_ledger(builder):
    rows = [{"input": "q", "output": "a" * (90 if i < 8 else 5)} for i in range(16)]
    stream = stream_of(builder, rows, window=8, max_seq_len=40, packing={"over_length": "drop"})
    assert len(documents(list(stream))) == 8
    report = stream.report
    assert report["windows"] == {"without_targets": 1, "packed": 1}
    assert report["dropped_documents"]["over_length"]["count"] == 8 and report["documents_in"] == 16
    with pytest.raises(DataError) as caught:
        list(stream_of(lambda source: no_targets(source), rows, packing={"no_targets": "error"}))
    assert caught.value.id == "D11"


def no_targets(rows):
    return Samples.from_samples([Sample([1, 2], [1, 1]) for _ in rows])


def cut_rows(lost, whole):
    return [*[{"input": "q" * 50, "output": "a"}] * lost, *[{"input": "q", "output": "a"}] * whole]


def test_truncation_is_judged_over_all_documents_and_not_over_one_window(builder):
    options = {"packing": {"over_length": "truncate"}, "max_seq_len": 40}
    good = stream_of(builder, cut_rows(8, 200), **options)  # half of the first window, 4 % of all
    assert len(documents(list(good))) == 200
    assert good.report["dropped_documents"]["truncated_away"]["count"] == 8
    bad = stream_of(builder, cut_rows(16, 200), **options)
    with pytest.raises(DataError, match="16 of the 216 documents so far") as caught:
        list(bad)
    assert caught.value.id == "D10"
    list(
        stream_of(builder, cut_rows(16, 200), max_seq_len=40, packing={**options["packing"], "max_truncated_away": 0.1})
    )
    long = stream_of(builder, cut_rows(2000, 8000), window=500, **options)
    with pytest.raises(DataError, match="2,000 of the 5,000"):
        list(long)


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


@pytest.mark.parametrize("change", [{"over_length": "drop"}, {"no_targets": "error"}, {"max_truncated_away": 0.5}])
def test_what_gets_a_run_over_an_error_of_its_data_may_change(builder, change):
    stream = stream_of(builder)
    before = shown([next(stream) for _ in range(20)])
    state, rest = stream.state_dict(), shown(stream)
    again = stream_of(builder, packing=change)
    again.load_state_dict(state)
    assert shown(again) == rest and len(before) == 20
