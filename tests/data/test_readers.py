import json

import pytest

from torchmask.data.rows import RowError
from torchmask.data.sources import open_source
from torchmask.errors import DataError


def values(source, **options):
    return [row.values for row in open_source(source, **options)]


def bad_rows(source, **options):
    return [row.error for row in open_source(source, **options) if row.error]


def test_jsonl_rows_are_numbered_by_their_line(write):
    path = write("a.jsonl", '{"a": 1}\n\n  \n{"a": 2}')
    assert [(row.number, row.values) for row in open_source(path)] == [(1, {"a": 1}), (4, {"a": 2})]


def test_bom_crlf_blank_lines_and_a_missing_final_newline_are_accepted(write):
    path = write("a.jsonl", b'\xef\xbb\xbf{"a": "x"}\r\n\r\n{"a": "y"}')
    assert values(path) == [{"a": "x"}, {"a": "y"}]


def test_line_separators_of_unicode_do_not_end_a_json_line(write):
    path = write("a.jsonl", '{"a": "x\u2028y\u0085z"}\n')
    assert values(path) == [{"a": "x\u2028y\u0085z"}]


def test_a_malformed_line_is_reported_with_reason_column_and_excerpt(write):
    line = '{"messages":[{"role":"user","content":"hi'
    path = write("a.jsonl", '{"a": 1}\n' + line + '\n{"a": 3}\n')
    (error,) = bad_rows(path)
    assert isinstance(error, RowError) and (error.id, error.cause) == ("D01", "malformed")
    assert error.where == f"{path}:2"
    assert error.message == "not valid JSON: unterminated string at column 39"
    assert error.excerpt == f"2 | {line}"
    assert [row.number for row in open_source(path) if not row.error] == [1, 3]


def test_an_excerpt_has_at_most_80_characters_and_shows_the_fault(write):
    path = write("a.jsonl", '{"a": "' + "x" * 3000 + '" FAULT, "b": "' + "y" * 3000 + '"}\n')
    (error,) = bad_rows(path)
    assert len(error.excerpt) <= 80 and "FAULT" in error.excerpt


def test_control_characters_of_a_row_never_reach_the_terminal(write):
    (error,) = bad_rows(write("a.jsonl", '{"a": "\x1b[31mred'))
    assert "\x1b" not in str(error)


@pytest.mark.parametrize(
    ("line", "found"),
    [("[1, 2]", "a list of 2"), ('"text"', "the text 'text'"), ("null", "null"), ("17", "the number 17")],
)
def test_a_line_that_is_no_object_is_a_bad_row(write, line, found):
    (error,) = bad_rows(write("a.jsonl", line + "\n"))
    assert error.id == "D01" and found in error.message


def test_json_nested_too_deep_is_a_bad_row_and_not_a_crash(write):
    (error,) = bad_rows(write("a.jsonl", '{"a": ' + "[" * 200_000 + "\n"))
    assert error.id == "D01" and len(str(error)) < 600


def test_a_number_of_too_many_digits_is_a_bad_row(write):
    (error,) = bad_rows(write("a.jsonl", '{"a": ' + "1" * 5000 + "}\n"))
    assert error.id == "D01"


def test_invalid_utf8_is_reported_with_the_byte_offset_in_its_line(write):
    path = write("a.jsonl", b'{"a": "ok"}\n{"a": "\xff"}\n')
    (error,) = bad_rows(path)
    assert (error.id, error.where) == ("D02", f"{path}:2")
    assert "byte 0xff at byte 7 of the line" in error.message and "UTF-8" in error.fix


def test_utf16_is_called_by_its_name(write):
    error = bad_rows(write("a.jsonl", '{"a": 1}\n'.encode("utf-16")))[0]
    assert "UTF-16" in error.message


def test_a_json_list_gives_rows_counted_from_one(write):
    path = write("a.json", '[\n {"a": 1},\n {"a": 2}\n]\n')
    assert [(row.number, row.values["a"]) for row in open_source(path)] == [(1, 1), (2, 2)]


def test_an_element_of_a_json_list_that_is_no_object_is_one_bad_row(write):
    path = write("a.json", '[{"a": 1}, 7, {"a": 3}]')
    rows = list(open_source(path))
    assert [row.error is None for row in rows] == [True, False, True]
    assert rows[1].error.where == f"{path}:2"


def test_rows_under_a_field(write):
    path = write("a.json", '{"version": 1, "rows": [{"a": 1}, {"a": 2}]}')
    assert values(path, field="rows") == [{"a": 1}, {"a": 2}]


def test_an_unknown_field_lists_the_keys_found(write):
    path = write("a.json", '{"version": 1, "rows": [{"a": 1}]}')
    with pytest.raises(DataError, match="keys found: version, rows"):
        values(path, field="data")


def test_a_field_that_is_no_list_says_what_it_is(write):
    with pytest.raises(DataError, match="field 'a' holds the number 1, expected a list") as caught:
        values(write("a.json", '{"a": 1}'), field="a")
    assert caught.value.id == "D08"


def test_a_json_file_of_lines_is_read_as_lines(write):
    path = write("a.json", '{"a": 1}\n{"a": 2}\n')
    assert [(row.number, row.values["a"]) for row in open_source(path)] == [(1, 1), (2, 2)]


def test_a_damaged_first_line_does_not_hide_that_a_json_file_holds_lines(write):
    path = write("a.json", '{"a" 1}\n{"a": 2}\n')
    rows = list(open_source(path))
    assert rows[0].error.where == f"{path}:1" and rows[1].values == {"a": 2}


def test_a_pretty_printed_object_is_one_row(write):
    assert values(write("a.json", json.dumps({"a": {"b": 1}, "c": 2}, indent=2))) == [{"a": {"b": 1}, "c": 2}]


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2', '[{"a": 1} {"a": 2}]', '[{"a": 1}] x', '[{"a": 1},]'])
def test_a_damaged_json_list_stops_with_its_line(write, text):
    path = write("a.json", text)
    with pytest.raises(DataError) as caught:
        values(path)
    assert caught.value.id == "D01" and caught.value.where == f"{path}:1" and "column" in caught.value.message


def test_invalid_utf8_inside_a_json_list_is_placed_by_line(write):
    path = write("a.json", b'[{"a": "x"},\n {"a": "\xe9"}]')
    with pytest.raises(DataError) as caught:
        values(path)
    assert (caught.value.id, caught.value.where) == ("D02", f"{path}:2")
    assert "at byte 8 of the line" in caught.value.message


def test_csv_fields_may_hold_commas_quotes_and_line_breaks(write):
    path = write("a.csv", 'input,output\r\n"a, ""b""\nc",d\r\n\r\ne,f\r\n')
    rows = list(open_source(path))
    assert [row.values for row in rows] == [{"input": 'a, "b"\nc', "output": "d"}, {"input": "e", "output": "f"}]
    assert rows[0].number == 2


def test_tsv_is_separated_by_tabs(write):
    assert values(write("a.tsv", "a\tb\n1\t2,3\n")) == [{"a": "1", "b": "2,3"}]


def test_a_csv_row_with_another_number_of_fields_is_bad(write):
    path = write("a.csv", "a,b\n1,2\n1,2,3\n4,5\n")
    (error,) = bad_rows(path)
    assert error.where == f"{path}:3" and "3 fields, the header names 2 columns" in error.message


def test_invalid_utf8_in_csv_is_one_bad_row(write):
    path = write("a.csv", b"a,b\n1,2\n\xff,3\n4,5\n")
    rows = list(open_source(path))
    assert [row.error is None for row in rows] == [True, False, True]
    assert (rows[1].error.id, rows[1].error.where) == ("D02", f"{path}:3")


def test_a_csv_field_may_be_longer_than_the_csv_module_allows_by_default(write):
    assert len(values(write("a.csv", "text\n" + "x" * 300_000 + "\n"))[0]["text"]) == 300_000


def test_a_csv_header_that_names_a_column_twice_is_refused(write):
    with pytest.raises(DataError, match="names 'a' twice"):
        values(write("a.csv", "a,a\n1,2\n"))


def test_parquet_rows_keep_nested_values(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(open_source(str(tmp_path / "a.parquet")))
    assert [row.values for row in found] == rows and [row.number for row in found] == [1, 2]


def test_a_damaged_parquet_file_is_named(write):
    path = write("a.parquet", b"PAR1 nothing else")
    with pytest.raises(DataError, match="not readable as Parquet") as caught:
        values(path)
    assert caught.value.where == path


def test_text_rows_are_lines_without_the_blank_ones(write):
    path = write("a.txt", "one\r\n\r\n two \n")
    assert [(row.number, row.values) for row in open_source(path)] == [(1, {"text": "one"}), (3, {"text": " two "})]


def test_text_rows_can_be_whole_documents(write):
    assert values(write("a.txt", "one\r\ntwo\n"), sample_by="document") == [{"text": "one\ntwo\n"}]


def test_rows_are_read_while_they_are_used(write):
    path = write("a.jsonl", '{"a": 1}\n' * 3 + "[" * 10)
    rows = open_source(path)
    assert next(rows).values == {"a": 1}  # the broken last line was not reached
