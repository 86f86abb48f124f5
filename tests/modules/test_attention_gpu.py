"""The CUDA kernels against the fp64 reference; run with `pytest -m gpu` where there is a CUDA device."""

import copy

import numpy as np
import pytest
import torch

from torchmask.modules import Decoder, DecoderSpec, linear_cross_entropy
from torchmask.modules.attention import attend
from torchmask.modules.attention_mask import build_attention_mask

pytestmark = pytest.mark.gpu


def _documents(num_rows, num_slots, seed, hidden_share=0.05):
    """visible_until and positions of random packed rows with some hidden tokens and padded ends."""
    rng = np.random.default_rng(seed)
    until, positions = np.zeros((num_rows, num_slots), np.int64), np.zeros((num_rows, num_slots), np.int64)
    for row in range(num_rows):
        start, stop_all = 0, num_slots - int(rng.integers(0, 40))
        while start < stop_all:
            stop = min(start + int(rng.lognormal(4.5, 1.0)) + 1, stop_all)
            until[row, start:stop], positions[row, start:stop] = stop, np.arange(stop - start)
            start = stop
        slots = np.arange(num_slots)
        until[row, stop_all:] = slots[stop_all:] + 1
        hide = rng.random(num_slots) < hidden_share
        until[row, hide] = slots[hide] + 1
    return torch.from_numpy(until).cuda(), torch.from_numpy(positions).cuda()


def _gradients(backend, until, dtype, generator_seed=0):
    generator = torch.Generator("cuda").manual_seed(generator_seed)

    def make(heads):
        x = torch.randn(until.shape[0], heads, until.shape[1], 64, device="cuda", generator=generator)
        return x.to(dtype).requires_grad_()

    q, k, v = make(8), make(2), make(2)
    out = attend(q, k, v, build_attention_mask(until, until, backend=backend))
    out.backward(torch.ones_like(out) / 16)
    return [t.detach().double() for t in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("num_slots", [256, 1000, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_is_as_close_to_fp64_as_dense_attention_of_the_same_dtype(num_slots, dtype):
    until, _ = _documents(2, num_slots, seed=num_slots)
    exact = _gradients("dense", until, torch.float64)
    for name, flex, dense, truth in zip(
        ("out", "q", "k", "v"), _gradients("flex", until, dtype), _gradients("dense", until, dtype), exact
    ):
        rounding = (dense - truth).abs().max()
        assert (flex - truth).abs().max() <= 4 * rounding + 1e-5, name


def _model(dtype):
    torch.manual_seed(0)
    spec = DecoderSpec(
        vocab_size=512,
        embed_dim=128,
        intermediate_dim=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_seq_len=1024,
    )
    return Decoder(spec).cuda().to(dtype)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_packed_training_step_has_the_gradients_of_the_dense_model(compiled):
    until, positions = _documents(2, 512, seed=3, hidden_share=0.0)
    tokens = torch.randint(0, 512, until.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    labels = tokens.roll(-1, dims=1)
    results = {}
    for backend in ("dense", "flex"):
        model = _model(torch.float32)
        model.attention = backend
        if compiled and backend == "flex":
            for layer in model.layers:
                layer.compile()
        loss = linear_cross_entropy(model(tokens, positions, until), model.lm_head, labels) / labels.numel()
        loss.backward()
        results[backend] = loss.item(), {n: p.grad for n, p in model.named_parameters()}
    assert results["flex"][0] == pytest.approx(results["dense"][0], rel=1e-4)
    for name, gradient in results["dense"][1].items():
        other = results["flex"][1][name]
        assert (gradient - other).norm() <= 2e-2 * gradient.norm(), name  # tf32 matrix products on both sides


def test_changing_one_document_leaves_the_others_within_kernel_error():
    until = torch.tensor([[100] * 100 + [256] * 156], device="cuda")
    positions = torch.cat([torch.arange(100), torch.arange(156)])[None].cuda()
    model = _model(torch.float32)
    tokens = torch.randint(0, 512, (1, 256), device="cuda")
    changed = copy.deepcopy(tokens)
    changed[:, :100] = (changed[:, :100] + 1) % 512
    with torch.no_grad():
        before, after = model(tokens, positions, until), model(changed, positions, until)
    torch.testing.assert_close(after[:, 100:], before[:, 100:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after[:, :100], before[:, :100])
