"""The CUDA kernels against the fp64 reference; run with `pytest -m gpu` where there is a CUDA device."""

import copy

import numpy as np
import pytest
import torch

from torchmask.modules import Decoder, DecoderSpec, linear_cross_entropy
from torchmask.modules.attention import alibi_slopes, attend
from torchmask.modules.attention_mask import build_attention_mask
from torchmask.modules.attention_scores import ScoreRule
from torchmask.modules.attention_varlen import takes_windows

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


def _trees(num_slots, seed):
    """visible_until, visible_from and positions of one row of trees, prompts that see both ways and hidden tokens."""
    rng = np.random.default_rng(seed)
    slots = np.arange(num_slots)
    until, since, positions = slots + 1, slots.copy(), np.zeros(num_slots, np.int64)

    def grow(start, end, position, depth):
        while start < end:
            stop = min(end, start + int(rng.integers(1, 400)))
            shared = min(stop, start + int(rng.integers(1, 150))) if depth else stop
            until[start:shared], positions[start:shared] = stop, position + slots[: shared - start]
            if rng.random() < 0.3:
                since[start:shared] = start
            if depth:
                grow(shared, stop, position + shared - start, depth - 1)
            start = stop

    grow(0, num_slots - 30, 0, 2)
    hide = rng.random(num_slots) < 0.03
    until[hide], since[hide] = slots[hide] + 1, slots[hide]
    return [torch.from_numpy(x)[None].cuda() for x in (until, since, positions)]


def _gradients(backend, until, dtype, *, since=None, positions=None, window=None, **scores):
    generator = torch.Generator("cuda").manual_seed(0)

    def make(heads):
        x = torch.randn(until.shape[0], heads, until.shape[1], 64, device="cuda", generator=generator)
        return x.to(dtype).requires_grad_()

    q, k, v = make(8), make(2), make(2)
    mask = build_attention_mask(
        until, until, backend=backend, visible_from=since, positions=positions, window=window, biased=bool(scores)
    )
    out = attend(q, k, v, mask, ScoreRule(**scores))
    out.backward(torch.ones_like(out) / 16)
    return [t.detach().double() for t in (out, q.grad, k.grad, v.grad)]


def _assert_close_to_fp64(backend, until, dtype, **options):
    exact = _gradients("dense", until, torch.float64, **options)
    kernel, dense = (_gradients(name, until, dtype, **options) for name in (backend, "dense"))
    for name, ours, reference, truth in zip(("out", "q", "k", "v"), kernel, dense, exact):
        rounding = (reference - truth).abs().max()
        assert (ours - truth).abs().max() <= 4 * rounding + 1e-5, name


@pytest.mark.parametrize("num_slots", [256, 1000, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_is_as_close_to_fp64_as_dense_attention_of_the_same_dtype(num_slots, dtype):
    until, _ = _documents(2, num_slots, seed=num_slots)
    _assert_close_to_fp64("flex", until, dtype)


@pytest.mark.parametrize("options", ["plain", "window", "softcap", "alibi", "all"])
@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_trees_and_prompts_take_every_option_on_the_gpu(backend, options):
    until, since, positions = _trees(1300, seed=4)
    chosen = {
        "window": {"window": 90},
        "softcap": {"softcap": 3.0},
        "alibi": {"alibi_slopes": alibi_slopes(8, "cuda")},
    }
    chosen["all"] = {name: value for some in chosen.values() for name, value in some.items()} | {"scale": 0.2}
    _assert_close_to_fp64(backend, until, torch.float32, since=since, positions=positions, **chosen.get(options, {}))


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("num_slots", [256, 1000, 2048])
def test_varlen_takes_flat_rows_and_is_as_close_to_fp64_as_dense_attention(num_slots, window):
    until, positions = _documents(2, num_slots, seed=num_slots, hidden_share=0.0)
    mask = build_attention_mask(until, until, backend="varlen", positions=positions, window=window)
    if window is None or takes_windows():
        assert mask.documents is not None
    _assert_close_to_fp64("varlen", until, torch.bfloat16, positions=positions, window=window)


def test_varlen_gives_way_to_flex_where_rows_are_not_flat():
    until, since, positions = _trees(1000, seed=1)
    mask = build_attention_mask(until, until, backend="varlen", visible_from=since, positions=positions)
    assert mask.documents is None and mask.blocks is not None


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
