import pytest

from torchmask.data.rows import BadRows, Row, RowError, excerpt, keep_rows
from torchmask.errors import ConfigError, DataError


def error(number):
    return RowError("D01", "malformed", f"fault {number}", where=f"a.jsonl:{number}", fix="mend the line")


def filled(on_bad_row, count, **options):
    bad = BadRows(on_bad_row, **options)
    for number in range(1, count + 1):
        bad.add(error(number))
    return bad


def test_without_bad_rows_nothing_happens():
    BadRows("error").finish(10)
    BadRows("skip").finish(0)


def test_all_bad_rows_are_reported_together_ten_of_them_by_place():
    with pytest.raises(RowError) as caught:
        filled("error", 13).finish(200)
    text = str(caught.value)
    assert caught.value.id == "D01" and caught.value.where == "a.jsonl:1"
    assert text.startswith("a.jsonl:1: fault 1\n") and "13 of 200 rows are bad" in text
    assert "a.jsonl:10: [D01] fault 10" in text and "fault 11" not in text and "and 3 more" in text
    assert "on_bad_row=skip" in text


def test_one_bad_row_is_reported_without_a_list():
    with pytest.raises(RowError) as caught:
        filled("error", 1).finish(200)
    assert str(caught.value).splitlines()[0] == "a.jsonl:1: fault 1" and len(str(caught.value).splitlines()) == 2


def test_a_stream_stops_at_its_first_bad_row():
    with pytest.raises(RowError, match="fault 1"):
        filled("error", 1, stop_at_first=True)


@pytest.mark.parametrize(
    ("num_bad", "num_rows", "stops"), [(10, 12, False), (11, 200, True), (11, 1100, False), (12, 1100, True)]
)
def test_skipping_tolerates_ten_rows_or_one_percent(num_bad, num_rows, stops):
    bad = filled("skip", num_bad)
    if not stops:
        return bad.finish(num_rows)
    with pytest.raises(RowError, match="tolerates"):
        bad.finish(num_rows)


def test_the_tolerated_share_can_be_raised():
    filled("skip", 100, max_bad_share=1.0).finish(100)


@pytest.mark.parametrize("options", [{"on_bad_row": "ignore"}, {"on_bad_row": "skip", "max_bad_share": 2.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        BadRows(**options)


def test_an_excerpt_around_a_place_is_marked_where_it_is_cut():
    text = excerpt("a" * 100 + "HERE" + "b" * 100, around=101, label="7 | ")
    assert len(text) == 80 and text.startswith("7 | …") and text.endswith("…") and "HERE" in text


def rows(*values):
    return [Row("a.csv", number, {"a": value}) for number, value in enumerate(values, 1)]


def test_a_function_filters_rows_and_the_dropped_are_told():
    dropped = []
    kept = list(keep_rows(rows(1, 2, 3), lambda values: values["a"] > 1, dropped.append))
    assert [row.number for row in kept] == [2, 3] and [row.where for row in dropped] == ["a.csv:1"]


def test_a_mapping_filters_by_a_value_or_by_one_of_many():
    assert [row.number for row in keep_rows(rows("x", "y", "z"), {"a": "y"}, print)] == [2]
    assert [row.number for row in keep_rows(rows("x", "y", "z"), {"a": ["x", "z"]}, lambda row: None)] == [1, 3]


def test_a_filter_on_a_missing_column_is_a_bad_row_and_not_an_empty_data_set():
    (row,) = keep_rows(rows(1), {"lang": "en"}, print)
    assert row.error.id == "D04" and "columns found: a" in row.error.message


def test_a_filter_function_that_fails_names_the_row():
    with pytest.raises(DataError, match="KeyError: 'b'") as caught:
        list(keep_rows(rows(1), lambda values: values["b"], print))
    assert caught.value.where == "a.csv:1"


def test_unreadable_rows_pass_every_filter():
    broken = Row("a.csv", 1, {}, error(1))
    assert list(keep_rows([broken], {"a": 1}, print)) == [broken]


def test_a_filter_that_is_neither_function_nor_mapping_is_refused():
    with pytest.raises(ConfigError, match=r"filter_fn is the text 'mymodule\.f'"):
        keep_rows([], "mymodule.f", print)
