import logging
from types import SimpleNamespace

import numpy as np
import pytest

from torchmask.data import cache as cache_module
from torchmask.data import cached_rows, instruct_dataset
from torchmask.data import mapped as mapped_module
from torchmask.data.cache import list_entries
from torchmask.data.packing import PackedDataset

MODEL = SimpleNamespace(vocab_size=200, max_seq_len=512, learned_positions=False, rope_changes_after=None)
ROWS = [{"input": f"the same question {i % 3}", "output": f"a{i}" * (i % 7 + 1)} for i in range(60)]
OPTIONS = [
    {},
    {"strategy": "first_fit", "trim_tail": True},
    {"strategy": "split", "eos": {"boundary_loss": "train"}},
    {"share_prefixes": True, "max_share": 8, "no_targets": "keep"},
    {"prefix": "bidirectional", "loss_normalization": "sequence"},
    {"over_length": "truncate", "max_seq_len": 34, "eos": {"on_truncate": "terminate"}, "max_truncated_away": 1.0},
    {"over_length": "split", "max_seq_len": 20, "positions": "continue", "attention": "causal"},
    {"epoch_repack": True},
]


@pytest.fixture
def samples(char_tokenizer, write, tmp_path):
    (tmp_path / "vocabulary.txt").write_text("v1")

    class Known(char_tokenizer):
        def identity(self):
            return {"files": [tmp_path / "vocabulary.txt"]}

    source = write("rows.jsonl", ROWS)
    return lambda **options: instruct_dataset(Known(), source=source, **options)


def assert_same_rows(one, other):
    assert len(one) == len(other) and one.report == other.report and one.rule_names == other.rule_names
    assert one.row_targets.tolist() == other.row_targets.tolist()
    assert one.row_lengths.tolist() == other.row_lengths.tolist()
    for i in range(len(one)):
        for name, value in vars(one[i]).items():
            theirs = getattr(other[i], name)
            if isinstance(value, np.ndarray):
                assert value.dtype == theirs.dtype and value.tolist() == theirs.tolist(), name
            else:
                assert value == theirs, name
        assert one.documents(i) == other.documents(i)
        assert [d.parent for d in one.documents(i)] == [d.parent for d in other.documents(i)]
    assert one.row_order(1, 2).tolist() == other.row_order(1, 2).tolist()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_that_were_kept_are_the_rows_that_were_planned(samples, tmp_path, monkeypatch, options):
    options = {"max_seq_len": 128, **options}
    planned = PackedDataset(samples(), **options)
    mapped = samples(cache=tmp_path / "cache")
    assert_same_rows(PackedDataset(mapped, **options), planned)
    assert {entry.facts["kind"] for entry in list_entries(tmp_path / "cache")} == {"samples", "rows"}

    def refuse(*_, **__):
        raise AssertionError("planned again")

    monkeypatch.setattr("torchmask.data.packing.select_fragments", refuse)
    again = PackedDataset(samples(cache=tmp_path / "cache"), **options)
    assert_same_rows(again, planned)
    if options.get("epoch_repack"):
        assert_same_rows(again.for_epoch(3, 5), planned.for_epoch(3, 5))


def test_another_option_is_another_plan(samples, tmp_path):
    mapped = samples(cache=tmp_path / "cache")
    for options in ({"max_seq_len": 128}, {"max_seq_len": 256}, {"max_seq_len": 128, "trim_tail": True}):
        assert_same_rows(PackedDataset(mapped, **options), PackedDataset(samples(), **options))
    assert len(list_entries(tmp_path / "cache")) == 4


def test_a_second_start_reads_no_token_of_a_large_data_set(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_module, "SMALL", 0)
    PackedDataset(samples(cache=tmp_path / "cache"), max_seq_len=128)
    opened = cache_module.open_mapped

    def without_tokens(folder):
        arrays, facts = opened(folder)
        for name in ("tokens", "mask", "rules"):
            if name in arrays:  # to look at one of these is an error
                (folder / f"{name}.bin").rename(folder / f"{name}.gone")
                size = arrays[name].nbytes
                (folder / f"{name}.bin").write_bytes(b"\xff" * size)
                arrays[name] = opened(folder)[0][name]
        mapped_module._keep_stamps(folder, mapped_module._stamps(folder))
        return arrays, facts

    monkeypatch.setattr(cache_module, "open_mapped", without_tokens)
    packs = PackedDataset(samples(cache=tmp_path / "cache"), max_seq_len=128)
    expected = samples()
    assert packs.samples.fingerprint == expected.fingerprint and packs.report["tokens_in"] == len(expected.tokens)
    packs.check_fits(MODEL, warn=pytest.fail)


def test_damaged_rows_are_planned_again(samples, tmp_path, caplog):
    planned = PackedDataset(samples(), max_seq_len=128)
    PackedDataset(samples(cache=tmp_path / "cache"), max_seq_len=128)
    (entry,) = [entry for entry in list_entries(tmp_path / "cache") if entry.facts["kind"] == "rows"]
    for path in entry.folder.glob("*.bin"):
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(bytes(data))
    assert_same_rows(PackedDataset(samples(cache=tmp_path / "cache"), max_seq_len=128), planned)
    assert "does not hold what was written" in caplog.text


def test_slices_and_samples_in_memory_are_planned_as_ever(samples, tmp_path):
    mapped = samples(cache=tmp_path / "cache")
    PackedDataset(mapped[:10], max_seq_len=128)
    PackedDataset(samples(), max_seq_len=128)
    assert len(list_entries(tmp_path / "cache")) == 1


def test_where_rows_cannot_be_kept_they_are_planned(samples, tmp_path, monkeypatch, caplog):
    mapped = samples(cache=tmp_path / "cache")
    expected = PackedDataset(samples(), max_seq_len=128)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "write_mapped", full)
    with caplog.at_level(logging.WARNING):
        assert_same_rows(PackedDataset(mapped, max_seq_len=128), expected)
    assert "the rows are not kept" in caplog.text
    monkeypatch.setattr(cached_rows, "_CLASSES", {})
    assert_same_rows(PackedDataset(mapped, max_seq_len=128), expected)
