import json

import numpy as np
import pytest

from torchmask.data import PackedDataset, SamplesBuilder, format_ledger
from torchmask.data.report import length_summary


@pytest.fixture
def report():
    builder = SamplesBuilder()
    for row in range(1, 61):
        masked = row % 20 == 0
        builder.append([1, 5, 6, 2], [1, 1, 0, 0] if not masked else [1] * 4, source="/data/train.jsonl", row=row)
    builder.append([1] * 9, [1, 0, 0, 0, 0, 0, 0, 0, 0], source="/data/train.jsonl", row=61, num_straddlers=2)
    builder.append([1, 5, 6], [1, 0, 0], source="/data/train.jsonl", row=62, stop=-1)
    builder.append([1, 5, 6], [1, 0, 1], source="/data/train.jsonl", row=63)
    builder.skip("malformed", "/data/train.jsonl:64")
    return PackedDataset(builder.finish(), max_seq_len=8, over_length="truncate").report


def test_every_token_is_trained_masked_or_dropped(report):
    assert report["tokens_in"] == 60 * 4 + 9 + 3 + 3
    assert report["dropped"] == {"all_masked": 12, "truncated": 1}
    assert report["trained"] == 57 * 2 + 7 + 2 + 1
    assert report["tokens_in"] == report["trained"] + report["masked"] + sum(report["dropped"].values())


def test_documents_rows_and_fill_are_counted(report):
    assert (report["documents_in"], report["documents"], report["fragments"]) == (63, 60, 60)
    assert report["fill"] == (report["tokens_in"] - 13) / (report["rows"] * 8)


def test_every_document_has_one_kind_of_stop(report):
    assert report["eos"] == {"documents": 60, "trained_stops": 57, "masked_stops": 1, "without_stop": 1, "cut": 1}


def test_the_report_is_plain_json(report):
    assert json.loads(json.dumps(report)) == report


def test_the_ledger_names_every_number_and_the_rows_that_were_dropped(report):
    text = format_ledger(report)
    assert text.splitlines()[0] == "data: 63 documents of 255 tokens"
    assert "dropped: all_masked" in text and "3 documents: train.jsonl:20, train.jsonl:40, train.jsonl:60" in text
    assert "57 of 60 documents end in a trained stop token, 1 not trained, 1 cut off, 1 have none" in text
    assert "2 tokens cover both template and text" in text
    assert "malformed: 1 row: train.jsonl:64" in text
    assert f"{report['rows']:,} rows of 8 slots, fill" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text


def test_the_ledger_of_unpacked_documents_claims_no_fill():
    builder = SamplesBuilder()
    builder.append([1, 5], [1, 0])
    text = format_ledger(PackedDataset(builder.finish(), max_seq_len=100, strategy="none").report, title="validation")
    assert text.startswith("validation: 1 document of 2 tokens")
    assert "none: 1 row of one document each" in text and "fill" not in text


def test_weights_before_are_those_after_and_those_dropped():
    builder = SamplesBuilder()
    builder.append([1, 5, 6, 7], [1, 0, 0, 0], [1, 0.5, 2, 4])
    report = PackedDataset(builder.finish(), max_seq_len=3, over_length="truncate").report
    assert report["weights"] == {"before": 6.5, "after": 2.5, "dropped": {"truncated": 4.0}}
    assert "6.5 = 2.5 kept + 4 dropped" in format_ledger(report)


def test_lengths_are_summed_up():
    summary = length_summary(np.arange(1, 101))
    assert (summary["min"], summary["p50"], summary["p95"], summary["max"], summary["mean"]) == (1, 51, 96, 100, 50.5)
    assert sum(count for *_, count in summary["histogram"]) == 100
    assert length_summary(np.zeros(0, np.int64))["max"] == 0
