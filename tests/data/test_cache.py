import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from torchmask.data import alpaca_dataset, instruct_dataset, mapped
from torchmask.data import cache as cache_module
from torchmask.data.cache import cache_root, cached_arrays, list_entries, remove_entry
from torchmask.data.fingerprints import key_of, plain
from torchmask.data.sample import Samples
from torchmask.errors import ConfigError, DataError, EnvironmentFault

ROWS = [{"input": f"q{i}", "output": f"a{i}" * (i % 5 + 1)} for i in range(20)]


@pytest.fixture
def tokenizer(char_tokenizer, tmp_path):
    """A tokenizer of one token a character with one file, that counts what it encodes."""
    (tmp_path / "vocabulary.txt").write_text("v1")

    class Known(char_tokenizer):
        def identity(self):
            return {"files": [tmp_path / "vocabulary.txt"], "chat_format": "c"}

    return Known()


@pytest.fixture
def source(write):
    return write("rows.jsonl", ROWS)


def age(path):
    """Makes a file look old, so that its hash is believed."""
    os.utime(path, (time.time() - 60, time.time() - 60))


def flip(path, at=0):
    """Changes one bit of a file and not its size."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def assert_same(one, other):
    for field in fields(Samples):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.tolist() == b.tolist(), field.name
        elif field.name != "home":
            assert a == b, field.name
    assert one.fingerprint == other.fingerprint and one.largest_token == other.largest_token


def test_a_second_start_gives_the_same_samples_without_tokenising(tokenizer, source, tmp_path):
    plain_samples = instruct_dataset(tokenizer, source=source)
    first = instruct_dataset(tokenizer, source=source, cache=str(tmp_path / "cache"))
    before = tokenizer.num_encoded
    second = instruct_dataset(tokenizer, source=source, cache=str(tmp_path / "cache"))
    assert tokenizer.num_encoded == before
    assert_same(plain_samples, first)
    assert_same(plain_samples, second)
    assert second.home.parent == tmp_path / "cache" / "data" and plain_samples.home is None


def test_the_columns_of_a_cached_data_set_are_mapped(tokenizer, source, tmp_path):
    samples = instruct_dataset(tokenizer, source=source, cache=tmp_path / "cache")
    assert isinstance(samples.tokens.base, np.memmap)
    size = sum(path.stat().st_size for path in samples.home.glob("*.bin"))
    assert size <= 6 * len(samples.tokens) + 32 * len(samples)


def test_true_means_the_users_cache_folder(tokenizer, source, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHMASK_CACHE", str(tmp_path / "own"))
    instruct_dataset(tokenizer, source=source, cache=True)
    assert len(list_entries(tmp_path / "own")) == 1
    monkeypatch.delenv("TORCHMASK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "torchmask"


def entries_after(build, root):
    build()
    return {entry.key for entry in list_entries(root)}


@pytest.mark.parametrize(
    "change",
    ["row", "row of the same length and time", "template", "tokenizer file", "mask option", "max_rows", "split"],
)
def test_whatever_determines_the_data_gives_a_new_entry(tokenizer, source, tmp_path, change):
    root, options = tmp_path / "cache", {"source": source, "cache": tmp_path / "cache"}
    age(source)
    first = entries_after(lambda: instruct_dataset(tokenizer, **options), root)
    assert entries_after(lambda: instruct_dataset(tokenizer, **options), root) == first
    if change.startswith("row"):
        stamp = os.stat(source)
        text = Path(source).read_text()
        Path(source).write_text(text.replace("a3", "b3") if "same" in change else text + json.dumps(ROWS[0]))
        if "same" in change:
            os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    elif change == "template":
        options["new_system_prompt"] = "S"
    elif change == "tokenizer file":
        (tmp_path / "vocabulary.txt").write_text("v2")
    elif change == "mask option":
        options["masking_strategy"] = "train_on_all"
    else:
        options |= {"max_rows": 3} if change == "max_rows" else {"split": "train[:3]"}
    assert len(entries_after(lambda: instruct_dataset(tokenizer, **options), root)) == 2


def test_another_version_gives_a_new_entry(tokenizer, source, tmp_path, monkeypatch):
    instruct_dataset(tokenizer, source=source, cache=tmp_path / "cache")
    monkeypatch.setattr(cache_module, "version_facts", lambda: {"torchmask": "99", "code": "x"})
    instruct_dataset(tokenizer, source=source, cache=tmp_path / "cache")
    assert len(list_entries(tmp_path / "cache")) == 2


def test_touching_a_file_or_the_number_of_workers_changes_nothing(tokenizer, source, tmp_path):
    instruct_dataset(tokenizer, source=source, cache=tmp_path / "cache")
    os.utime(source)
    before = tokenizer.num_encoded
    instruct_dataset(tokenizer, source=source, cache=tmp_path / "cache", num_workers=1)
    assert tokenizer.num_encoded == before


@pytest.mark.parametrize("damage", ["truncated", "changed", "header", "missing"])
def test_a_damaged_entry_is_built_again_and_said_so(tokenizer, source, tmp_path, caplog, damage):
    build = lambda: instruct_dataset(tokenizer, source=source, cache=tmp_path / "cache")  # noqa: E731
    folder = build().home
    if damage == "truncated":
        os.truncate(folder / "tokens.bin", 5)
    elif damage == "changed":
        flip(folder / "tokens.bin")
    elif damage == "header":
        text = (folder / "header.json").read_text()
        (folder / "header.json").write_text(text.replace("a", "b", 3))
    else:
        (folder / "offsets.bin").unlink()
    with caplog.at_level(logging.WARNING):
        again = build()
    assert "is damaged" in caplog.text and "built again" in caplog.text
    assert_same(instruct_dataset(tokenizer, source=source), again)
    assert not list(folder.parent.glob(".tmp-*"))


def test_a_large_entry_is_read_again_once_anything_touched_its_files(tokenizer, source, tmp_path, monkeypatch, caplog):
    read = []
    monkeypatch.setattr(mapped, "SMALL", 0)
    monkeypatch.setattr(mapped, "_UNSURE_NS", 0)
    monkeypatch.setattr(cache_module, "verify", lambda folder: (read.append(folder), mapped.verify(folder)))
    build = lambda: instruct_dataset(tokenizer, source=source, cache=tmp_path / "cache")  # noqa: E731
    folder = build().home
    build()
    assert read == []
    os.utime(folder / "mask.bin")
    build()
    assert read == [folder] and "damaged" not in caplog.text
    build()
    assert read == [folder]  # it was found whole, which was written down
    flip(folder / "mask.bin")
    again = build()
    assert "mask.bin does not hold what was written" in caplog.text
    assert_same(instruct_dataset(tokenizer, source=source), again)


def test_within_every_byte_checked_nothing_is_believed(tokenizer, source, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mapped, "SMALL", 0)
    build = lambda: instruct_dataset(tokenizer, source=source, cache=tmp_path / "cache")  # noqa: E731
    folder = build().home
    flip(folder / "tokens.bin")
    mapped._keep_stamps(folder, mapped._stamps(folder))  # as a disk does that forgets
    build()
    assert "damaged" not in caplog.text
    with cache_module.every_byte_checked():
        again = build()
    assert "is damaged" in caplog.text
    assert_same(instruct_dataset(tokenizer, source=source), again)


def test_a_folder_that_cannot_be_written_is_read_whenever_it_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "SMALL", 0)
    mapped.write_mapped(tmp_path, {"x": np.array([3, 1, 4])}, {})
    (tmp_path / "checked.json").unlink()

    def read_only(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(mapped, "_keep_stamps", read_only)
    monkeypatch.setattr(mapped, "_UNSURE_NS", 0)
    mapped.believe(tmp_path)
    assert not mapped.is_believed(tmp_path)


def test_what_was_changed_just_now_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "SMALL", 0)
    mapped.write_mapped(tmp_path, {"x": np.array([3, 1, 4])}, {})
    assert mapped.is_believed(tmp_path)
    flip(tmp_path / "x.bin")
    mapped.believe(tmp_path)
    assert not mapped.is_believed(tmp_path)


def test_what_cannot_be_fingerprinted_is_refused(tokenizer, source, tmp_path, char_tokenizer):
    for options, message in [
        ({"filter_fn": lambda row: True}, "filter_fn is a function"),
        ({"source": ROWS}, "got rows"),
        ({"streaming": True}, "exclude each other"),
    ]:
        with pytest.raises(ConfigError, match=message):
            instruct_dataset(tokenizer, **{"source": source, "cache": tmp_path / "cache", **options})
    with pytest.raises(ConfigError, match="knows its files"):
        instruct_dataset(char_tokenizer(), source=source, cache=tmp_path / "cache")
    assert plain({"a": (1, None)}, "x") == {"a": [1, None]}
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def test_a_folder_that_cannot_be_made_is_named(tokenizer, source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="TORCHMASK_CACHE"):
        instruct_dataset(tokenizer, source=source, cache=tmp_path / "file" / "cache")


def test_a_full_disk_leaves_nothing_behind(tokenizer, source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "write_mapped", full)
    with pytest.raises(EnvironmentFault, match="No space left"):
        instruct_dataset(tokenizer, source=source, cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache" / "data").iterdir() if p.is_dir()]


def test_a_removed_entry_is_still_readable_where_it_is_open(tokenizer, source, tmp_path):
    samples = instruct_dataset(tokenizer, source=source, cache=tmp_path / "cache")
    tokens = samples.tokens.copy()
    remove_entry(samples.home)
    assert list_entries(tmp_path / "cache") == [] and samples.tokens.tolist() == tokens.tolist()


FACTS = {"kind": "test"}


def numbers(log, seconds=0.0, fault=None):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    if fault == "error":
        raise DataError("D01", "row 3 is bad", where="a.jsonl:3", fix="mend it")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"x": np.arange(5)}, {"said": 1}


def ask(root, log, results, seconds, fault):
    try:
        entry = cached_arrays(lambda: numbers(log, seconds, fault), FACTS, root=root, wait_seconds=20)
        results.put(entry.arrays["x"].tolist())
    except DataError as error:
        results.put(str(error))


def start_asking(root, log, results, *, seconds=0.4, fault=None):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=ask, args=(root, log, results, seconds, fault))
    process.start()
    return process


def test_one_process_builds_and_the_others_wait(tmp_path):
    results, log = multiprocessing.get_context("fork").Queue(), tmp_path / "log"
    for process in [start_asking(tmp_path / "cache", log, results) for _ in range(4)]:
        process.join(20)
        assert process.exitcode == 0
    assert [results.get(timeout=5) for _ in range(4)] == [[0, 1, 2, 3, 4]] * 4
    assert len(log.read_text().split()) == 1


def test_those_who_wait_get_the_builders_error(tmp_path):
    results, log = multiprocessing.get_context("fork").Queue(), tmp_path / "log"
    for process in [start_asking(tmp_path / "cache", log, results, fault="error") for _ in range(3)]:
        process.join(20)
    assert [results.get(timeout=5) for _ in range(3)] == ["a.jsonl:3: row 3 is bad\n  fix: mend it"] * 3
    assert len(log.read_text().split()) == 1
    # A later run tries again.
    assert cached_arrays(lambda: numbers(log), FACTS, root=tmp_path / "cache").header == {"said": 1}


def test_when_the_builder_is_killed_another_one_builds(tmp_path):
    results, log = multiprocessing.get_context("fork").Queue(), tmp_path / "log"
    victim = start_asking(tmp_path / "cache", log, results, fault="killed", seconds=0.5)
    time.sleep(0.2)
    waiter = start_asking(tmp_path / "cache", log, results, seconds=0)
    victim.join(20)
    waiter.join(20)
    assert (victim.exitcode, waiter.exitcode) == (-signal.SIGKILL, 0)
    assert results.get(timeout=5) == [0, 1, 2, 3, 4]


def test_waiting_ends_with_the_name_of_who_is_waited_for(tmp_path):
    results, log = multiprocessing.get_context("fork").Queue(), tmp_path / "log"
    builder = start_asking(tmp_path / "cache", log, results, seconds=3)
    time.sleep(0.5)
    with pytest.raises(EnvironmentFault, match=f"process {builder.pid} on "):
        cached_arrays(lambda: numbers(log), FACTS, root=tmp_path / "cache", wait_seconds=0.3)
    builder.kill()
    builder.join()


def test_a_cached_data_set_of_a_real_tokenizer_opens_in_another_process(assets, tmp_path):
    code = """
        import sys
        from torchmask.data import alpaca_dataset
        from torchmask.tokenizers import from_pretrained
        tokenizer = from_pretrained(sys.argv[1] + "/tokenizers/stories260k")
        samples = alpaca_dataset(tokenizer, source=sys.argv[1] + "/data/alpaca_en_demo.json", split="train[:40]",
                                 cache=sys.argv[2])
        print(samples.fingerprint, samples.home)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(assets), str(tmp_path)]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert outputs[0] == outputs[1]
    assert len(list_entries(tmp_path)) == 1


def test_builders_are_cached_builders():
    assert alpaca_dataset.__wrapped__.__name__ == "alpaca_dataset"
