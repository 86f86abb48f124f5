"""A decoder that reads a text in parts through a cache, against one that reads it at once."""

import pytest
import torch

from torchmask.modules import Decoder, DecoderSpec
from torchmask.modules.kv_cache import LayerCache


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    spec = DecoderSpec(
        vocab_size=97,
        embed_dim=32,
        intermediate_dim=56,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_seq_len=64,
    )
    return Decoder(spec).double()


def test_cached_logits_equal_those_of_one_forward_pass(model):
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    whole = model(tokens)
    cache = model.new_cache(2, 40)
    parts = [model(part, cache=cache) for part in tokens.split([17, 1, 1, 5, 16], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)


def test_a_cache_keeps_the_rows_asked_for_in_their_order(model):
    tokens = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(3, 12)
    model(tokens[:, :9], cache=cache)
    cache.keep_rows(torch.tensor([2, 0]))
    torch.testing.assert_close(model(tokens[[2, 0], 9:], cache=cache), model(tokens[[2, 0]])[:, 9:], rtol=0, atol=1e-12)


def test_padding_in_a_cached_prompt_is_seen_by_nobody(model):
    visible_until = torch.tensor([[1, 2, 3, 99, 99, 99]])
    positions = torch.tensor([[0, 0, 0, 0, 1, 2]])
    outs = []
    for pad in (0, 50):
        cache = model.new_cache(1, 8)
        model(torch.tensor([[pad] * 3 + [5, 6, 7]]), positions, visible_until, cache=cache)
        outs.append(model(torch.tensor([[8]]), torch.tensor([[3]]), None, cache=cache))
    assert torch.equal(*outs)
    torch.testing.assert_close(outs[0], model(torch.tensor([[5, 6, 7, 8]]))[:, -1:], rtol=0, atol=1e-12)


def test_a_cache_that_is_full_takes_no_more(model):
    cache = model.new_cache(1, 2)
    with pytest.raises(AssertionError, match="3 slots do not fit into a cache of 2"):
        model(torch.tensor([[5, 6, 7]]), cache=cache)


def windowed(window):
    torch.manual_seed(0)
    spec = DecoderSpec(
        vocab_size=97, embed_dim=32, intermediate_dim=56, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
        max_seq_len=64, sliding_window=window, window_pattern=(True, True, False),
    )  # fmt: skip
    return Decoder(spec).double()


@pytest.mark.parametrize("window", [1, 2, 6, 18, 30, 39, 50])
@pytest.mark.parametrize("sizes", [[17, 1, 1, 5, 16], [2, 1, 1, 1, 1, 1, 1, 32], [1] * 40, [3] * 12 + [4], [18, 22]])
def test_a_window_is_read_through_a_cache_in_texts_of_any_lengths(window, sizes):
    model = windowed(window)
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2, 40)
    parts = [model(part, cache=cache) for part in tokens.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("window", "num_held"), [(6, 6), (18, 20), (33, 36), (38, 40), (50, 40)])
@pytest.mark.parametrize("sizes", [[17, 1, 1, 5, 16], [1] * 40])
def test_windowed_layers_hold_the_window_and_an_eighth_and_never_more_than_the_sequence(window, num_held, sizes):
    model = windowed(window)
    cache = model.new_cache(2, 40)
    for part in torch.zeros(2, 40, dtype=torch.int64).split(sizes, dim=1):
        model(part, cache=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [num_held, num_held, 40]
    assert num_held <= window + -(-window // 8)
    for x in (cache.layers[0].keys, cache.layers[0].values):
        assert x.untyped_storage().nbytes() == 2 * 2 * num_held * 8 * 8


def test_a_full_window_moves_once_in_many_steps():
    layer = LayerCache(300, window=65)  # 64 held, 8 spare
    moves = 0
    layer.append(torch.zeros(1, 1, 100, 4), torch.zeros(1, 1, 100, 4))
    last = layer.append(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))[0].storage_offset()
    buffer = layer.keys
    for _ in range(80):
        keys, _ = layer.append(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        assert keys.shape[2] == 65 and keys.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        moves += keys.storage_offset() < last
        last = keys.storage_offset()
    assert moves == 10


@pytest.mark.parametrize("rows", [[1], [2, 0], [2, 1, 0]])
def test_rows_that_are_kept_count_windows_by_their_own_positions(rows):
    model = windowed(4)
    tokens = torch.randint(0, 97, (3, 8), generator=torch.Generator().manual_seed(0))
    starts, slots = torch.tensor([0, 3, 5]), torch.arange(6)  # padded on the left
    is_pad = slots < starts[:, None]
    cache = model.new_cache(3, 8)
    model(
        tokens[:, :6],
        (slots - starts[:, None]).clamp(min=0),
        torch.where(is_pad, slots + 1, 10**6),
        cache=cache,
    )
    cache.keep_rows(torch.tensor(rows))
    new_positions = torch.tensor([[6 - starts[row], 7 - starts[row]] for row in rows])
    new = model(tokens[rows, 6:], new_positions, cache=cache)
    for row, hidden in zip(rows, new):
        alone = model(tokens[row : row + 1, starts[row] :])[0, -2:]
        torch.testing.assert_close(hidden, alone, rtol=0, atol=1e-12)


def test_rows_that_are_kept_read_a_text_both_ways():
    model = windowed(60)
    tokens = torch.randint(0, 97, (3, 10), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(3, 10)
    model(tokens[:, :6], cache=cache)
    cache.keep_rows(torch.tensor([2, 1]))
    since = torch.tensor([[6, 6, 6, 9], [6, 7, 7, 7]])
    new = model(tokens[[2, 1], 6:], visible_from=since, cache=cache)
    whole = torch.cat((torch.arange(6).expand(2, -1), since), dim=1)
    torch.testing.assert_close(new, model(tokens[[2, 1]], visible_from=whole)[:, 6:], rtol=0, atol=1e-12)
    assert not torch.allclose(new, model(tokens[[2, 1]])[:, 6:], atol=1e-3)
