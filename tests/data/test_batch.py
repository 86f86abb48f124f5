import numpy as np
import pytest
import torch

from torchmask.data import Batch, Pack, PackedDataset, Sample, collate, filler

IGN = -100


def rows(*samples, **options):
    return list(PackedDataset(samples, **{"max_seq_len": 8, "strategy": "none", **options}))


def test_rows_are_stacked_and_padded_on_the_right():
    batch = collate(rows(Sample([1, 5, 6, 2], [1, 0, 0, 0]), Sample([1, 7], [1, 0])), pad_id=9)
    assert batch.tokens.tolist() == [[1, 5, 6, 2], [1, 7, 9, 9]]
    assert batch.labels.tolist() == [[5, 6, 2, IGN], [7, IGN, IGN, IGN]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch.visible_until.tolist() == [[4, 4, 4, 4], [2, 2, 3, 4]]
    assert {t.dtype for t in (batch.tokens, batch.labels, batch.positions, batch.visible_until)} == {torch.int64}
    assert (batch.weights, batch.num_targets, batch.num_tokens) == (None, 4, 6)


def test_weights_are_stacked_and_missing_ones_are_one_for_every_label():
    weighted = rows(Sample([1, 5, 6], [0, 0, 0], [1, 0.5, 0]))
    batch = collate(weighted + rows(Sample([1, 7], [1, 0])))
    assert batch.weights.tolist() == [[0.5, 0, 0], [1, 0, 0]]
    assert batch.weights.dtype == torch.float32
    assert batch.num_targets == 2


def test_a_weight_of_zero_is_no_target_even_in_a_hand_made_pack():
    column = np.array([1, 2, 3], np.int32)
    pack = Pack(column, column, column, column, np.array([1, 0, 2], np.float32))
    assert collate([pack]).num_targets == 2


@pytest.mark.parametrize(
    ("options", "width"),
    [({}, 3), ({"pad_to": 7}, 7), ({"pad_to_multiple_of": 8}, 8), ({"pad_to": 9, "pad_to_multiple_of": 4}, 12)],
)
def test_the_width_is_as_asked(options, width):
    assert collate(rows(Sample([1, 5, 2], [0, 0, 0])), **options).tokens.shape == (1, width)


def test_a_filler_row_trains_nothing_and_changes_no_other_row():
    real = rows(Sample([1, 5, 2], [0, 0, 0]))
    batch = collate([*real, filler()])
    assert batch.labels[1].tolist() == [IGN, IGN, IGN]
    assert batch.num_targets == collate(real).num_targets == 2
    assert collate([filler()]).num_targets == 0


def test_a_row_longer_than_the_width_is_refused():
    with pytest.raises(ValueError, match="a row of 3 slots does not fit into pad_to=2"):
        collate(rows(Sample([1, 5, 2], [0, 0, 0])), pad_to=2)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        collate([])


def test_a_batch_moves_with_all_its_tensors_and_keeps_its_counts():
    batch = collate(rows(Sample([1, 5], [0, 0], [1, 0.5])))
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and moved.weights.device.type == moved.tokens.device.type == "meta"
    assert (moved.num_targets, moved.num_tokens) == (1, 2)
    assert batch.to("cpu").weights.tolist() == [[0.5, 0]]


def test_packing_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from torchmask.data import PackedDataset, Sample; "
        "PackedDataset([Sample([1, 2], [0, 0])], max_seq_len=4)[0]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
