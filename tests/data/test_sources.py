import os
import sys
import types
from pathlib import Path

import pytest

from torchmask.data.sources import open_source
from torchmask.errors import ConfigError, DataError, EnvironmentFault, TorchmaskError


def numbers(source, **options):
    return [row.values["a"] for row in open_source(str(source), **options)]


def lines(start, stop):
    return [{"a": i} for i in range(start, stop)]


def test_a_folder_is_read_in_sorted_order_with_its_subfolders(write, tmp_path):
    write("d/b.jsonl", lines(2, 4))
    write("d/a/z.jsonl", lines(0, 2))
    write("d/c.json", lines(4, 5))
    write("d/.hidden/x.jsonl", lines(9, 10))
    assert numbers(tmp_path / "d") == [0, 1, 2, 3, 4]


def test_a_glob_is_read_in_sorted_order(write, tmp_path):
    for i in (3, 1, 2):
        write(f"part-{i}.jsonl", lines(i, i + 1))
    write("other.jsonl", lines(9, 10))
    assert numbers(tmp_path / "part-*.jsonl") == [1, 2, 3]


def test_row_numbers_begin_anew_in_each_file(write, tmp_path):
    write("d/a.jsonl", lines(0, 2))
    write("d/b.jsonl", lines(2, 3))
    where = [row.where for row in open_source(str(tmp_path / "d"))]
    assert where == [f"{tmp_path}/d/a.jsonl:1", f"{tmp_path}/d/a.jsonl:2", f"{tmp_path}/d/b.jsonl:1"]


def test_a_folder_of_mixed_kinds_asks_for_a_glob(write, tmp_path):
    write("d/a.jsonl", lines(0, 1))
    write("d/LICENSE.txt", "words")
    with pytest.raises(DataError, match=r"mixes .jsonl and .txt") as caught:
        numbers(tmp_path / "d")
    assert "/**/*.jsonl" in caught.value.fix


def test_files_named_after_splits_are_chosen_by_split(write, tmp_path):
    write("d/data/train-00000-of-00002.jsonl", lines(0, 2))
    write("d/data/train-00001-of-00002.jsonl", lines(2, 3))
    write("d/data/dev.jsonl", lines(7, 8))
    assert numbers(tmp_path / "d", split="train") == [0, 1, 2]
    assert numbers(tmp_path / "d", split="validation") == [7]
    assert numbers(tmp_path / "d", split="dev") == [7]
    assert numbers(tmp_path / "d") == [7, 0, 1, 2]


def test_a_split_that_no_file_is_named_after_lists_those_there_are(write, tmp_path):
    write("d/train.jsonl", lines(0, 2))
    with pytest.raises(ConfigError, match="belongs to split 'test'") as caught:
        numbers(tmp_path / "d", split="test")
    assert "train" in caught.value.fix


def test_a_file_is_the_split_train_and_no_other(write):
    path = write("a.jsonl", lines(0, 2))
    assert numbers(path, split="train") == [0, 1]
    with pytest.raises(ConfigError, match="'validation'"):
        numbers(path, split="validation")


def test_torchtune_style_names_a_kind_and_data_files(write):
    path = write("a.data", '{"a": 1}\n{"a": 2}\n')
    assert numbers("json", data_files=path, split="train") == [1, 2]
    assert numbers("json", data_files=[path, path], split="train[:3]") == [1, 2, 1]


def test_data_files_by_split(write):
    files = {"train": write("x.jsonl", lines(0, 2)), "test": write("y.jsonl", lines(5, 6))}
    assert numbers("json", data_files=files, split="test") == [5]
    with pytest.raises(ConfigError, match="no split 'dev'"):
        numbers("json", data_files=files, split="dev")


def test_data_files_are_looked_up_in_a_source_folder(write, tmp_path):
    write("d/x.jsonl", lines(0, 2))
    write("d/y.txt", "words")
    assert numbers(tmp_path / "d", data_files="x.jsonl") == [0, 1]
    assert numbers(tmp_path / "d", data_files="*.jsonl") == [0, 1]


def test_a_kind_without_data_files_says_so():
    with pytest.raises(ConfigError, match="needs data_files"):
        numbers("json")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:3]", [0, 1, 2]),
        ("train[8:]", [8, 9]),
        ("train[3:5]", [3, 4]),
        ("train[-2:]", [8, 9]),
        ("train[:-8]", [0, 1]),
        ("train[10%:30%]", [1, 2]),
        ("train[:15%]", [0, 1]),
        ("train[-10%:]", [9]),
        ("train[:1]+train[-1:]", [0, 9]),
        ("train[5:500]", [5, 6, 7, 8, 9]),
    ],
)
def test_slices_of_local_files_mean_what_they_mean_to_datasets(write, split, expected):
    import datasets

    path = write("a.jsonl", lines(0, 10))
    assert numbers(path, split=split) == expected
    if "500" not in split:  # datasets refuses bounds beyond the end
        builder = datasets.ReadInstruction.from_spec(split)
        info = {"train": datasets.SplitInfo(name="train", num_examples=10)}
        absolute = builder.to_absolute({name: split.num_examples for name, split in info.items()})
        assert [
            i for part in absolute for i in range(part.from_ or 0, part.to if part.to is not None else 10)
        ] == expected


def test_a_slice_without_rows_is_an_error(write):
    with pytest.raises(DataError, match="slice of the split holds no row"):
        numbers(write("a.jsonl", lines(0, 3)), split="train[5:]")


@pytest.mark.parametrize("split", ["train[", "train[1:2:3]", "train[a:b]", "", "train[:5]+test[:5]"])
def test_a_split_that_cannot_be_read_says_how_to_write_it(write, split):
    with pytest.raises(ConfigError, match="train\\[10%:20%\\]"):
        numbers(write("a.jsonl", lines(0, 3)), split=split)


def test_an_absent_file_is_named_by_its_absolute_path_with_near_names(write, tmp_path, monkeypatch):
    write("train.jsonl", lines(0, 1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        numbers("trian.jsonl")
    assert (caught.value.id, caught.value.where) == ("D05", f"{tmp_path}/trian.jsonl")
    assert "train.jsonl" in caught.value.fix


def test_an_absent_file_is_reported_before_any_row_is_asked_for(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        open_source(str(tmp_path / "none.jsonl"))


def test_a_path_into_a_folder_that_exists_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        open_source("data/alpaca")


def test_a_glob_without_a_match_shows_the_absolute_pattern(tmp_path):
    with pytest.raises(DataError, match="no file matches") as caught:
        numbers(tmp_path / "*.jsonl")
    assert caught.value.id == "D05" and caught.value.where == f"{tmp_path}/*.jsonl"


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b""), ("a.json", b""), ("a.csv", b""), ("a.txt", b"")])
def test_an_empty_file_is_called_empty(write, name, content):
    path = write(name, content)
    with pytest.raises(DataError, match=r"empty \(0 bytes\)") as caught:
        numbers(path)
    assert caught.value.id == "D05" and caught.value.where == path


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b"\n\n"), ("a.json", b"[]"), ("a.csv", b"a,b\n")])
def test_a_file_without_rows_is_an_error(write, name, content):
    with pytest.raises(DataError, match="zero rows") as caught:
        numbers(write(name, content))
    assert caught.value.id == "D05"


def test_an_empty_folder_says_which_kinds_were_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no data file in this folder \(looked for .*\.jsonl"):
        numbers(tmp_path)


def test_an_unknown_kind_of_file_lists_the_known(write):
    with pytest.raises(DataError, match=r"unknown kind of file '\.xlsx'") as caught:
        numbers(write("a.xlsx", b"x"))
    assert ".parquet" in caught.value.fix


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_a_fault_of_the_environment(write):
    path = write("a.jsonl", lines(0, 1))
    Path(path).chmod(0)
    with pytest.raises(EnvironmentFault, match="no permission"):
        numbers(path)


def test_a_folder_of_save_to_disk_is_read_by_datasets(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(lines(0, 5))
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data.select([4])}).save_to_disk(tmp_path / "splits")
    assert numbers(tmp_path / "plain") == [0, 1, 2, 3, 4]
    assert numbers(tmp_path / "splits", split="test") == [4]
    assert numbers(tmp_path / "splits", split="train[-40%:]") == [3, 4]
    with pytest.raises(ConfigError, match="no split 'dev'") as caught:
        numbers(tmp_path / "splits", split="dev")
    assert "train, test" in caught.value.fix


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets library that records what it is asked for."""
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        if isinstance(answer["value"], Exception):
            raise answer["value"]
        return answer["value"]

    answer = {"value": lines(0, 3)}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return types.SimpleNamespace(calls=calls, answer=answer)


def test_a_hub_name_is_loaded_with_its_split(hub):
    rows = list(open_source("owner/name", split="train[:3]", name="en", streaming=True))
    assert [row.where for row in rows] == [f"owner/name[train[:3]]:{i}" for i in (1, 2, 3)]
    (call,) = hub.calls
    assert call[0] == "owner/name"
    assert call[1] == {"name": "en", "revision": None, "data_files": None, "split": "train[:3]", "streaming": True}


def test_an_unreachable_hub_is_a_fault_of_the_environment_that_names_the_local_path(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.answer["value"] = ConnectionError("Couldn't reach 'owner/name' on the Hub")
    with pytest.raises(EnvironmentFault) as caught:
        open_source("owner/name")
    assert caught.value.id == "R18" and f"{tmp_path}/owner/name" in caught.value.message
    assert "go online once" in caught.value.fix


def test_a_split_that_the_hub_does_not_have_is_a_configuration_error(hub):
    hub.answer["value"] = ValueError("Unknown split \"dev\". Should be one of ['train'].")
    with pytest.raises(ConfigError, match="Should be one of"):
        open_source("owner/name", split="dev")


def test_a_gated_data_set_says_where_to_accept_its_terms(hub):
    class GatedRepoError(OSError):
        pass

    hub.answer["value"] = GatedRepoError("401 Client Error")
    with pytest.raises(EnvironmentFault) as caught:
        open_source("owner/name")
    assert "huggingface.co/datasets/owner/name" in caught.value.fix


def test_a_stream_that_breaks_off_is_explained(hub):
    def stream():
        yield {"a": 1}
        raise ConnectionError("reset by peer")

    hub.answer["value"] = stream()
    rows = open_source("owner/name", streaming=True)
    assert next(rows).values == {"a": 1}
    with pytest.raises(TorchmaskError, match="reset by peer"):
        next(rows)


def test_without_datasets_a_hub_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFault) as caught:
        open_source("owner/name")
    assert caught.value.id == "D20" and "pip install" in caught.value.fix
