"""A decoder that reads a text in parts through a cache, against one that reads it at once."""

import pytest
import torch

from torchmask.modules import Decoder, DecoderSpec


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


def test_windowed_layers_hold_the_window_alone():
    torch.manual_seed(0)
    spec = DecoderSpec(
        vocab_size=97, embed_dim=32, intermediate_dim=56, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
        max_seq_len=64, sliding_window=6, window_pattern=(True, True, False),
    )  # fmt: skip
    model = Decoder(spec).double()
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    for sizes in ([17, 1, 1, 5, 16], [2, 1, 1, 1, 1, 1, 1, 32]):
        cache = model.new_cache(2, 40)
        parts = [model(part, cache=cache) for part in tokens.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=1e-12)
        assert [layer.keys.shape[2] for layer in cache.layers] == [5, 5, 40]
        assert cache.layers[0].keys.untyped_storage().nbytes() == 2 * 2 * 5 * 8 * 8
