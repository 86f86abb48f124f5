"""Rotary positions: partial, per document, and norms and heads with scales of their own."""

import pytest
import torch

from torchmask.modules import DynamicRopeScaling, LongRopeScaling
from torchmask.modules.head import Head
from torchmask.modules.norm import OffsetRMSNorm
from torchmask.modules.rope import apply_rope, document_lengths_of_slots, rope_cos_sin
from torchmask.modules.spec import DecoderSpec

SIZES = {
    "vocab_size": 11, "embed_dim": 8, "intermediate_dim": 8, "num_layers": 4, "num_heads": 1, "num_kv_heads": 1,
    "head_dim": 8, "max_seq_len": 64,
}  # fmt: skip
LONG = LongRopeScaling((1.0, 1.0), (4.0, 8.0), original_max_seq_len=3, attention_factor=1.25)


def test_channels_beyond_the_rotated_ones_stay():
    x = torch.randn(1, 2, 3, 8)
    cos, sin = rope_cos_sin(torch.arange(3)[None], 4, base=100.0, scaling=None, dtype=torch.float32)
    rotated = apply_rope(x, cos, sin)
    assert torch.equal(rotated[..., 4:], x[..., 4:]) and torch.equal(rotated[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(rotated[..., :4], apply_rope(x[..., :4].contiguous(), cos, sin))
    assert not torch.equal(rotated[:, :, 1, :4], x[:, :, 1, :4])


@pytest.mark.parametrize("scaling", [LONG, DynamicRopeScaling(4.0, 3)])
def test_a_document_rotates_by_its_own_length_whatever_it_is_packed_with(scaling):
    positions, until = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]), torch.tensor([[5, 5, 5, 5, 5, 8, 8, 8]])
    lengths = document_lengths_of_slots(positions, until)
    assert lengths.tolist() == [[5] * 5 + [3] * 3]
    options = {"base": 100.0, "scaling": scaling, "dtype": torch.float64}
    packed = rope_cos_sin(positions, 4, **options, lengths=lengths)
    for part in (slice(0, 5), slice(5, 8)):
        alone = rope_cos_sin(positions[:, part], 4, **options)
        assert all(torch.equal(a[:, :, part], b) for a, b in zip(packed, alone))
    short, long = packed[0][:, :, 6], packed[0][:, :, 1]  # position 1 of each
    assert not torch.equal(short, long)


def test_the_length_of_a_tree_is_its_longest_path_and_hidden_tokens_end_no_document():
    positions = torch.tensor([[0, 1, 2, 3, 2, 0, 1]])
    until = torch.tensor([[5, 5, 4, 4, 5, 6, 7]])  # a prefix of 2 with branches of 2 and 1; a hidden token, one more
    assert document_lengths_of_slots(positions, until).tolist() == [[4, 4, 4, 4, 4, 1, 2]]
    hidden = torch.tensor([[3, 2, 3, 5, 5, 7, 7]])
    assert document_lengths_of_slots(torch.tensor([[0, 1, 2, 0, 1, 0, 1]]), hidden).tolist() == [[3, 3, 3, 2, 2, 2, 2]]


def test_windowed_layers_may_rotate_by_another_base_and_some_layers_not_at_all():
    spec = DecoderSpec(
        **SIZES, sliding_window=4, window_pattern=(True, True, False), window_rope_base=10.0, rope_base=1000.0,
        rope_scaling=LONG, rope_pattern=(True, False, True, True),
    )  # fmt: skip
    assert [spec.rope_of(i) for i in range(4)] == [(10.0, None), None, (1000.0, LONG), (10.0, None)]
    assert spec.window_of(2) is None and spec.window_of(3) == 4


def test_a_norm_with_an_offset_adds_it_in_fp32():
    norm = OffsetRMSNorm(4, eps=1e-6, offset=1.0).to(torch.bfloat16)
    torch.nn.init.constant_(norm.weight, 2**-10)  # 1 + 2^-10 is 1 in bf16
    x = torch.tensor([[3.0, -3.0, 3.0, -3.0]], dtype=torch.float64)
    torch.testing.assert_close(norm(x), x / 3 * (1 + 2**-10), rtol=1e-6, atol=0)


def test_the_head_scales_and_then_squeezes():
    head, x = Head(DecoderSpec(**SIZES, logit_scale=0.5, logit_softcap=2.0)), torch.randn(3, 8) * 10
    torch.testing.assert_close(head(x), 2 * torch.tanh(x @ head.weight.T * 0.5 / 2))
