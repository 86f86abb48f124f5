"""Whether a model can be trained on rows, asked before anything is loaded."""

from types import SimpleNamespace

import pytest

from torchmask.data import PackedDataset
from torchmask.data.sample import Sample
from torchmask.errors import ConfigError, DataError, WeightsError


def model(**facts):
    usual = {"vocab_size": 50, "max_seq_len": 8, "learned_positions": False, "rope_changes_after": None}
    return SimpleNamespace(**{**usual, **facts})


def rows(*lengths, **options):
    samples = [Sample([1, 2, 3] + [10 + i] * (n - 3), [1] * (n - 1) + [0]) for i, n in enumerate(lengths)]
    return PackedDataset(samples, **{"max_seq_len": 32, **options})


def test_an_id_without_an_embedding_is_refused():
    with pytest.raises(WeightsError, match="token id 10, the model has 10 embeddings"):
        rows(5).check_fits(model(vocab_size=10), warn=pytest.fail)


def test_longer_documents_than_the_model_was_made_for_are_told_of():
    told = []
    rows(5, 8).check_fits(model(), warn=pytest.fail)
    rows(5, 9).check_fits(model(), warn=told.append)
    assert told == ["WARNING a document of 9 tokens in a row; the model was made for 8"]
    rows(5, 8, positions="continue", attention="causal").check_fits(model(), warn=told.append)
    assert told[1] == "WARNING positions 13 in a row; the model was made for 8"


def test_learned_positions_end_where_they_were_learned():
    rows(8).check_fits(model(learned_positions=True), warn=pytest.fail)
    with pytest.raises(DataError, match="a document of 9 tokens in a row; the model has learned 8 positions"):
        rows(5, 9).check_fits(model(learned_positions=True), warn=pytest.fail)


def test_prefixes_are_not_shared_where_positions_rotate_by_the_length():
    long = model(max_seq_len=64, rope_changes_after=8)
    rows(8, 8, share_prefixes=True).check_fits(long, warn=pytest.fail)
    rows(8, 9).check_fits(long, warn=pytest.fail)
    with pytest.raises(ConfigError, match="a document of 9 tokens: beyond 8"):
        rows(8, 9, share_prefixes=True).check_fits(long, warn=pytest.fail)
