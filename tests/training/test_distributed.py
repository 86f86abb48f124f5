"""Gradient norms and clipping, and giving layers back their memory."""

import math

import pytest
import torch

from torchmask.models import from_config
from torchmask.training import checkpoint_activations, clip_grad_norm

TINY = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _with_gradients(dtype=torch.float32):
    model = from_config(TINY, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    whole = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    return model, whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_taken_in_fp32_and_larger_gradients_are_scaled_to_it(dtype):
    model, whole = _with_gradients(dtype)
    norm = clip_grad_norm(model, 2.0)
    assert norm.dtype is torch.float32 and norm.item() == pytest.approx(whole, rel=1e-5)
    clipped = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    assert clipped == pytest.approx(2.0, rel=1e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("max_norm", [None, 1e6])
def test_smaller_gradients_are_left_alone(max_norm):
    model, whole = _with_gradients()
    before = [p.grad.clone() for p in model.parameters()]
    assert clip_grad_norm(model, max_norm).item() == pytest.approx(whole, rel=1e-5)
    assert all(p.grad.equal(g) for p, g in zip(model.parameters(), before))


def test_checkpointed_layers_keep_less_for_the_backward_pass():
    kept = {}
    for enabled in (False, True):
        model = from_config(TINY)
        checkpoint_activations(model, enabled)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.zeros(2, 64, dtype=torch.int64))
        kept[enabled] = sum(sizes)
    assert kept[True] < kept[False] / 3
