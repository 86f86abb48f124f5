import numpy as np
import pytest

from torchmask.constants import ExitCode
from torchmask.data import PackedDataset, Sample, Samples, SamplesBuilder
from torchmask.errors import ConfigError, DataError
from torchmask.messages import MaskFlag

IGN = -100
T, F = True, False


def trained(*tokens):
    return Sample(list(tokens), [0] * len(tokens))


def only_row(samples, **options):
    dataset = PackedDataset(samples, **{"max_seq_len": 64, **options})
    assert len(dataset) == 1
    return dataset[0]


def targets_of(pack):
    """w of each token as a target: 1 where the slot before it predicts it."""
    return [0, *(int(label != IGN) for label in pack.labels[:-1])]


# masking.md, section 7


@pytest.mark.parametrize("max_seq_len", [None, 4, 8192])
def test_case_1_a_limit_that_cuts_nothing_changes_nothing(max_seq_len):
    pack = only_row([Sample([1, 10, 20, 2], [T, T, F, F])], max_seq_len=max_seq_len)
    assert pack.labels.tolist() == [IGN, 20, 2, IGN]


def test_case_2_the_stop_is_trained_although_it_is_the_pad_id():
    dataset = PackedDataset([trained(1, 5, 6, 2), trained(1, 7, 2)], max_seq_len=4)
    assert [dataset[i].labels.tolist() for i in range(2)] == [[5, 6, 2, IGN], [7, 2, IGN]]


def test_case_5_a_truncated_answer_gets_no_stop():
    sample = Sample([1, 10, 11, 20, 21, 22, 23, 2], [T, T, T, F, F, F, F, F])
    dataset = PackedDataset([sample], max_seq_len=6, over_length="truncate")
    assert dataset[0].tokens.tolist() == [1, 10, 11, 20, 21, 22]
    assert targets_of(dataset[0]) == [0, 0, 0, 1, 1, 1]
    assert dataset[0].labels[-1] == IGN  # edge E6
    assert dataset.report["eos"]["cut"] == 1 and dataset.report["eos"]["trained_stops"] == 0


def test_case_6_a_cut_inside_a_masked_turn_makes_no_trained_stop():
    sample = Sample([1, 10, 20, 2, 11, 12, 13, 21, 2], [T, T, F, F, T, T, T, F, F])
    pack = only_row([sample], max_seq_len=6, over_length="truncate")
    assert pack.tokens.tolist() == [1, 10, 20, 2, 11, 12]
    assert pack.labels.tolist() == [IGN, 20, 2, IGN, IGN, IGN]


def test_case_18_labels_are_shifted_once():
    assert only_row([Sample([9, 20, 21, 2], [T, F, F, F])]).labels.tolist() == [20, 21, 2, IGN]


def test_case_20_nothing_is_predicted_across_documents():
    pack = only_row([trained(1, 11, 2), trained(1, 21, 2)])
    assert pack.labels.tolist() == [11, 2, IGN, 21, 2, IGN]
    assert pack.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert pack.visible_until.tolist() == [3, 3, 3, 6, 6, 6]


def test_case_22_a_conversation_with_three_stop_tokens_is_one_document():
    pack = only_row([trained(1, 5, 2, 6, 2, 7, 2), trained(1, 2)])
    assert pack.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert pack.visible_until.tolist() == [7] * 7 + [9] * 2


def test_case_24_a_sliced_data_set_packs_the_slice_only():
    samples = Samples.from_samples([trained(1, i, 2) for i in range(100, 130)])
    for part in (samples[10:20], list(samples)[10:20]):
        dataset = PackedDataset(part, max_seq_len=9)
        seen = sorted(t for pack in dataset for t in pack.tokens.tolist() if t >= 100)
        assert seen == list(range(110, 120))


@pytest.mark.parametrize(("over_length", "rows"), [("drop", 1), ("truncate", 8), ("split", 10)])
def test_case_25_the_over_length_policy_comes_before_packing(over_length, rows):
    samples = [trained(1, 2, 3, 4, 5)] * 7 + [trained(1, 6, 7)]
    dataset = PackedDataset(samples, max_seq_len=4, over_length=over_length)
    assert len(dataset) == rows
    assert max(len(pack) for pack in dataset) <= 4
    assert all(len(document) for document in dataset)


def test_case_28_documents_without_targets_are_dropped_before_packing_and_counted_by_cause():
    builder = SamplesBuilder()
    for row in range(1, 101):
        mask = [1, 1, 1, 1] if row in (3, 7) else [1, 1, 1, 0] if row == 9 else [1, 0, 0, 0]
        builder.append([1, 5, 6, 2], mask, source="train.jsonl", row=row)
    dataset = PackedDataset(builder.finish(), max_seq_len=3, over_length="truncate")
    assert dataset.report["dropped_documents"] == {
        "all_masked": {"count": 2, "places": ["train.jsonl:3", "train.jsonl:7"]},
        "truncated_away": {"count": 1, "places": ["train.jsonl:9"]},
    }
    assert len(dataset) == 97 and dataset.row_targets.min() > 0


# packs


def test_a_masked_token_is_no_label_and_a_hidden_one_is_seen_by_nobody():
    sample = Sample([1, 5, 6, 2], [MaskFlag.LOSS, MaskFlag.ATTENTION, MaskFlag.LOSS | MaskFlag.ATTENTION, 0])
    pack = only_row([trained(9, 9), sample])
    assert pack.labels.tolist() == [9, IGN, 5, IGN, 2, IGN]
    assert pack.visible_until.tolist() == [2, 2, 6, 4, 5, 6]


def test_weights_move_with_their_labels_and_are_0_where_there_is_none():
    pack = only_row([Sample([1, 5, 6, 2], [0, 0, 1, 0], [1, 0.5, 3, 2]), trained(1, 7)])
    assert pack.labels.tolist() == [5, IGN, 2, IGN, 7, IGN]
    assert pack.weights.tolist() == [0.5, 0, 2, 0, 1, 0]
    assert pack.weights.dtype == np.float32


def test_a_pack_is_int32_and_has_no_weights_where_the_samples_have_none():
    pack = only_row([trained(1, 2)])
    assert {a.dtype for a in (pack.tokens, pack.labels, pack.positions, pack.visible_until)} == {np.dtype(np.int32)}
    assert pack.weights is None


def test_a_row_does_not_share_memory_with_the_samples():
    samples = Samples.from_samples([trained(1, 5, 2)])
    pack = PackedDataset(samples, max_seq_len=4)[0]
    pack.tokens[:] = 0
    assert samples[0].tokens.tolist() == [1, 5, 2]


def test_rows_can_be_counted_iterated_and_indexed_from_the_end():
    dataset = PackedDataset([trained(1, i, 2) for i in range(5)], max_seq_len=6)
    assert len(dataset) == 3 == len(list(dataset))
    assert dataset[-1].tokens.tolist() == dataset[2].tokens.tolist()
    assert [pack.tokens.tolist() for pack in dataset[1:]] == [dataset[i].tokens.tolist() for i in (1, 2)]
    assert dataset.row_lengths.tolist() == [len(pack) for pack in dataset]
    assert dataset.row_targets.tolist() == [int((pack.labels != IGN).sum()) for pack in dataset]
    with pytest.raises(IndexError):
        dataset[3]


def test_unpacked_is_the_plan_of_one_document_a_row():
    dataset = PackedDataset([trained(1, 5, 2), trained(1, 2)], max_seq_len=64, strategy="none")
    assert [pack.tokens.tolist() for pack in dataset] == [[1, 5, 2], [1, 2]]


def test_documents_say_what_lies_where():
    dataset = PackedDataset([trained(1, 5, 2), trained(1, 2, 3, 4, 5, 6), trained(1, 9)], max_seq_len=6)
    placed = [[tuple(d) for d in dataset.documents(i)] for i in range(len(dataset))]
    assert placed == [[(0, 0, 3, 0, False), (2, 0, 2, 3, False)], [(1, 0, 6, 0, False)]]


def test_the_row_order_is_a_permutation_that_seed_and_epoch_determine():
    dataset = PackedDataset([trained(1, i) for i in range(50)], max_seq_len=2)
    orders = [dataset.row_order(epoch, seed).tolist() for epoch, seed in ((0, 1), (1, 1), (0, 2))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert dataset.row_order(0, 1).tolist() == orders[0]


def test_the_row_order_stays_what_it_was():
    """The numbers were made by this function when it was written; a resumed run depends on them."""
    dataset = PackedDataset([trained(1, i) for i in range(8)], max_seq_len=2)
    assert dataset.row_order(0, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert dataset.row_order(3, 42).tolist() == [3, 4, 5, 0, 1, 6, 2, 7]


# cuts


def test_truncation_on_the_left_keeps_the_first_token_which_then_predicts_nothing():
    sample = Sample([1, 10, 20, 2, 11, 21, 22, 2], [T, T, F, F, T, F, F, F])
    dataset = PackedDataset([trained(7, 8), sample], max_seq_len=5, over_length="truncate", truncate_side="left")
    row = dataset[1]
    assert row.tokens.tolist() == [1, 11, 21, 22, 2]
    assert row.labels.tolist() == [IGN, 21, 22, 2, IGN]
    assert row.positions.tolist() == [0, 1, 2, 3, 4]
    assert dataset.report["eos"] == {
        "documents": 2, "trained_stops": 2, "masked_stops": 0, "without_stop": 0, "cut": 0
    }  # fmt: skip


def test_a_trained_token_whose_context_was_cut_is_no_target():
    row = only_row([trained(1, 2, 3, 4, 5, 6)], max_seq_len=4, over_length="truncate", truncate_side="left")
    assert row.tokens.tolist() == [1, 4, 5, 6]
    assert row.labels.tolist() == [IGN, 5, 6, IGN]


def test_a_document_cut_on_the_left_and_then_by_the_stream_keeps_its_first_token_once():
    samples = [trained(7, 8, 9), trained(1, 2, 3, 4, 5, 6)]
    dataset = PackedDataset(samples, max_seq_len=5, strategy="split", over_length="truncate", truncate_side="left")
    assert [pack.tokens.tolist() for pack in dataset] == [[7, 8, 9, 1, 3], [4, 5, 6]]
    assert [pack.labels.tolist() for pack in dataset] == [[8, 9, IGN, IGN, 4], [5, 6, IGN]]


def test_a_split_document_keeps_the_label_across_the_cut():
    dataset = PackedDataset([trained(1, 2, 3, 4, 5)], max_seq_len=2, over_length="split")
    assert [pack.tokens.tolist() for pack in dataset] == [[1, 2], [3, 4], [5]]
    assert [pack.labels.tolist() for pack in dataset] == [[2, 3], [4, 5], [IGN]]
    assert [pack.positions.tolist() for pack in dataset] == [[0, 1], [0, 1], [0]]


def test_pieces_that_only_show_context_stay_unless_tails_are_trimmed():
    sample = Sample(list(range(3, 45)), [1] * 35 + [0] * 7)
    whole = PackedDataset([sample], max_seq_len=10, over_length="split")
    assert [len(pack) for pack in whole] == [10, 10, 10, 10, 2] and whole.report["dropped"] == {}
    dataset = PackedDataset([sample], max_seq_len=10, over_length="split", trim_tail=True)
    assert [d.start for i in range(len(dataset)) for d in dataset.documents(i)] == [30, 40]
    assert dataset.report["dropped"] == {"trimmed": 30} and dataset.report["trained"] == 7


def test_the_split_strategy_cuts_the_stream_at_row_ends():
    dataset = PackedDataset([trained(1, 2, 3), trained(4, 5, 6, 7, 8, 9)], max_seq_len=4, strategy="split")
    assert [pack.tokens.tolist() for pack in dataset] == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    assert [pack.labels.tolist() for pack in dataset] == [[2, 3, IGN, 5], [6, 7, 8, 9], [IGN]]
    assert dataset[0].visible_until.tolist() == [3, 3, 3, 4]
    assert dataset.report["trained"] == 7 and dataset.report["dropped"] == {}


def test_a_split_label_that_is_masked_stays_masked_and_a_weighted_one_keeps_its_weight():
    sample = Sample([1, 2, 3, 4, 5], [1, 0, 1, 0, 0], [1, 1, 1, 0.25, 4])
    dataset = PackedDataset([sample], max_seq_len=2, over_length="split")
    assert [pack.labels.tolist() for pack in dataset] == [[2, IGN], [4, 5], [IGN]]
    assert [pack.weights.tolist() for pack in dataset] == [[1, 0], [0.25, 4], [0]]


def test_trimming_drops_what_follows_the_last_target_and_counts_it():
    samples = [Sample([1, 5, 2, 6, 7], [1, 0, 0, 1, 1]), trained(1, 2)]
    dataset = PackedDataset(samples, max_seq_len=64, trim_tail=True)
    assert dataset[0].tokens.tolist() == [1, 5, 2, 1, 2]
    assert dataset[0].labels.tolist() == [5, 2, IGN, 2, IGN]
    assert dataset.report["dropped"] == {"trimmed": 2}


def test_trimming_comes_before_the_over_length_policy():
    dataset = PackedDataset([Sample([1, 5, 2, 6, 7], [1, 0, 0, 1, 1])], max_seq_len=3, trim_tail=True)
    assert dataset[0].tokens.tolist() == [1, 5, 2]


def test_a_stop_that_was_trimmed_is_not_counted_as_cut():
    samples = [Sample([1, 5, 6, 2], [1, 0, 1, 1]), trained(1, 5, 6, 7, 2)]
    dataset = PackedDataset(samples, max_seq_len=4, trim_tail=True, over_length="truncate")
    assert dataset.report["eos"] == {
        "documents": 2, "trained_stops": 0, "masked_stops": 1, "without_stop": 0, "cut": 1
    }  # fmt: skip


def test_trimming_a_split_document_drops_parts_that_train_nothing():
    sample = Sample([1, 2, 3, 4, 5, 6, 7, 8], [1, 0, 1, 1, 1, 1, 1, 0])
    dataset = PackedDataset([sample], max_seq_len=2, over_length="split", trim_tail=True)
    assert [pack.tokens.tolist() for pack in dataset] == [[1, 2], [7, 8]]
    assert [pack.labels.tolist() for pack in dataset] == [[2, IGN], [8, IGN]]
    assert dataset.report["dropped"] == {"trimmed": 4}


def test_empty_documents_are_dropped_and_counted():
    dataset = PackedDataset([trained(), trained(1, 2), trained()], max_seq_len=4)
    assert dataset[0].tokens.tolist() == [1, 2]
    assert dataset.report["dropped_documents"]["empty"]["count"] == 2


def test_documents_without_targets_can_be_kept():
    dataset = PackedDataset([Sample([1, 5], [1, 1]), trained(1, 2)], max_seq_len=8, no_targets="keep")
    assert dataset[0].labels.tolist() == [IGN, IGN, 2, IGN]
    alone = PackedDataset([Sample([1, 5], [1, 1])], max_seq_len=8, no_targets="keep")
    assert alone.row_targets.tolist() == [0]


# errors


def sized(*lengths):
    builder = SamplesBuilder()
    for row, n in enumerate(lengths, 1):
        builder.append(np.arange(n), np.zeros(n, bool), source="train.jsonl", row=row)
    return builder.finish()


def test_a_document_that_is_too_long_is_an_error_that_names_the_row_and_the_ways_out():
    with pytest.raises(DataError) as error:
        PackedDataset(sized(100, 5210, 4100, 7), max_seq_len=4096)
    text = str(error.value)
    assert (error.value.id, error.value.exit_code) == ("D09", ExitCode.DATA)
    assert (
        "row 2 of train.jsonl has 5210 tokens, max_seq_len is 4096; set over_length to truncate, split or drop" in text
    )
    assert "2 of 4 documents (50 %) are too long" in text
    assert "p95 5,210" in text and "max_seq_len >= 5210 keeps every document whole" in text


def test_no_trained_token_at_all_is_an_error_that_shows_a_document():
    with pytest.raises(DataError) as error:
        PackedDataset([Sample([1, 17, 2], [1, 1, 1])] * 3, max_seq_len=8)
    assert error.value.id == "D11"
    text = str(error.value)
    assert "none of the 3 documents has a trained token" in text and "masking_strategy" in text
    assert "tokens     1    17     2\n    mask       1     1     1" in text


@pytest.mark.parametrize(
    ("sample", "cause"),
    [(Sample([5], [0]), "longer than one token"), (Sample([1, 5], [0, 0], [0, 0]), "every weight is 0")],
)
def test_no_trained_token_names_the_likely_cause(sample, cause):
    with pytest.raises(DataError, match=cause):
        PackedDataset([sample], max_seq_len=8)


def test_an_empty_data_set_is_an_error_that_says_what_was_skipped():
    builder = SamplesBuilder()
    builder.skip("malformed", "train.jsonl:1")
    with pytest.raises(DataError, match=r"empty: 1 rows were read and all skipped \{'malformed': 1\}") as error:
        PackedDataset(builder.finish(), max_seq_len=8)
    assert error.value.id == "D05"
    with pytest.raises(DataError, match="empty"):
        PackedDataset([], max_seq_len=8)


def answers_at(*starts, length=30):
    return [Sample(list(range(length)), [i < start for i in range(length)]) for start in starts]


def test_truncation_that_removes_too_many_targets_says_how_long_rows_must_be():
    samples = answers_at(*range(1, 21))
    with pytest.raises(DataError, match=r"every target of 10 of 20 documents \(50 %\)") as error:
        PackedDataset(samples, max_seq_len=11, over_length="truncate")
    assert error.value.id == "D10" and "max_seq_len >= 20 would keep 95 %" in str(error.value)
    dataset = PackedDataset(samples, max_seq_len=20, over_length="truncate")
    assert dataset.report["dropped_documents"]["truncated_away"]["count"] == 1


def test_truncation_on_the_left_says_how_long_rows_must_be_too():
    samples = [Sample(list(range(30)), [i != at for i in range(30)]) for at in range(2, 22)]
    with pytest.raises(DataError) as error:
        PackedDataset(samples, max_seq_len=11, over_length="truncate", truncate_side="left")
    enough = int(str(error.value).split("max_seq_len >= ")[1].split()[0])
    options = {"over_length": "truncate", "truncate_side": "left", "max_truncated_away": 1.0}
    lost = [
        PackedDataset(samples, max_seq_len=n, **options).report["dropped_documents"].get("truncated_away", {"count": 0})
        for n in (enough - 1, enough)
    ]
    assert [entry["count"] for entry in lost] == [2, 1]


def test_the_share_that_truncation_may_take_is_an_option():
    dataset = PackedDataset(answers_at(1, 20), max_seq_len=11, over_length="truncate", max_truncated_away=0.5)
    assert dataset.report["documents"] == 1


def test_documents_without_targets_can_be_an_error():
    with pytest.raises(DataError, match="1 of 2 documents have no trained token: sample 1"):
        PackedDataset([trained(1, 2), Sample([1, 2], [1, 1])], max_seq_len=8, no_targets="error")


def test_nothing_left_is_an_error():
    with pytest.raises(DataError, match=r"no document is left to train on: of 2, \{'over_length': 2\}"):
        PackedDataset(sized(9, 10), max_seq_len=4, over_length="drop")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"over_length": "trunc"}, "unknown over_length 'trunc'"),
        ({"strategy": "bfd"}, "unknown packing strategy 'bfd'"),
        ({"truncate_side": "both"}, "right, left"),
        ({"no_targets": "ignore"}, "drop, keep, error"),
        ({"max_seq_len": 0}, "at least 1, got 0"),
    ],
)
def test_unknown_options_are_refused_with_the_choices(options, says):
    with pytest.raises(ConfigError, match=says):
        PackedDataset([trained(1, 2)], **{"max_seq_len": 8, **options})
