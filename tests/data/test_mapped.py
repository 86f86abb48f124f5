import json

import numpy as np
import pytest

from torchmask.data.mapped import HEADER, Damaged, open_mapped, read_facts, verify, write_mapped

ARRAYS = {
    "rows": np.arange(3, 90, 2),
    "flags": np.zeros(70, bool),
    "ones": np.ones(5, bool),
    "tokens": np.array([1, 2, 4], np.int32),
    "mask": np.array([0, 1, 3], np.uint8),
    "weights": np.array([0.5, 1, -2], np.float32),
    "empty": np.array([], np.int64),
}


@pytest.fixture
def folder(tmp_path):
    write_mapped(tmp_path, ARRAYS, {"a": [1, "é"]})
    return tmp_path


def test_arrays_and_facts_come_back_as_they_were(folder):
    arrays, facts = open_mapped(folder)
    assert facts == {"a": [1, "é"]} == read_facts(folder)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and arrays[name].tolist() == array.tolist()
    verify(folder)


def test_mapped_arrays_cannot_be_written(folder):
    with pytest.raises(ValueError, match="read-only"):
        open_mapped(folder)[0]["tokens"][0] = 7


def test_nothing_of_a_column_is_read_before_it_is_used(folder):
    arrays, _ = open_mapped(folder)
    assert isinstance(arrays["tokens"].base, np.memmap)


def test_big_endian_columns_are_stored_in_one_order(tmp_path):
    write_mapped(tmp_path, {"x": np.array([1, 258, 7], ">i4")}, {})
    assert open_mapped(tmp_path)[0]["x"].tolist() == [1, 258, 7]


def test_a_truncated_column_is_damage(folder):
    path = folder / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match=r"tokens\.bin has 11 bytes, its header says 12"):
        open_mapped(folder)


def test_a_column_that_is_gone_is_damage(folder):
    (folder / "mask.bin").unlink()
    with pytest.raises(Damaged, match=r"mask\.bin cannot be read"):
        open_mapped(folder)


def test_any_flipped_byte_of_the_header_is_damage(folder):
    whole = (folder / HEADER).read_bytes()
    for at in range(len(whole)):
        (folder / HEADER).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            arrays, facts = open_mapped(folder)
        except Damaged:
            continue
        # What still opens says the same: the byte was a blank or the case of an escape.
        assert facts == {"a": [1, "é"]} and arrays["tokens"].tolist() == [1, 2, 4]


def test_a_header_of_another_format_is_not_guessed_at(folder):
    header = json.loads((folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps({**header, "format": 99}))
    with pytest.raises(Damaged, match="format 99"):
        open_mapped(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "{", '{"format": 1}'])
def test_what_is_no_header_is_damage(folder, text):
    (folder / HEADER).write_text(text)
    with pytest.raises(Damaged):
        open_mapped(folder)


def test_a_changed_byte_of_a_column_is_found_by_verify(folder):
    data = bytearray((folder / "weights.bin").read_bytes())
    data[3] ^= 1
    (folder / "weights.bin").write_bytes(bytes(data))
    open_mapped(folder)
    with pytest.raises(Damaged, match=r"weights\.bin does not hold"):
        verify(folder)


def test_even_numbers_need_no_file(folder):
    assert sorted(path.name for path in folder.glob("*.bin")) == ["empty.bin", "mask.bin", "tokens.bin", "weights.bin"]
    with pytest.raises(ValueError, match="read-only"):
        open_mapped(folder)[0]["rows"][0] = 7
