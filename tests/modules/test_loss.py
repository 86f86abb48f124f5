"""linear_cross_entropy equals the obvious computation, in any chunking, and survives batches without targets."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchmask.modules import linear_cross_entropy


def _case(dtype=torch.float64, num_ignored=4):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 7, 6, dtype=dtype, generator=generator, requires_grad=True)
    head = nn.Linear(6, 11, bias=False, dtype=dtype)
    labels = torch.randint(0, 11, (2, 7), generator=generator)
    labels.view(-1)[torch.randperm(14, generator=generator)[:num_ignored]] = -100
    return hidden, head, labels


@pytest.mark.parametrize("chunk_logits", [1, 33, 2**25])
def test_sum_and_gradients_equal_plain_cross_entropy_in_any_chunking(chunk_logits):
    hidden, head, labels = _case()
    expected = cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    wanted = torch.autograd.grad(expected, [hidden, head.weight])
    loss = linear_cross_entropy(hidden, head, labels, chunk_logits=chunk_logits)
    got = torch.autograd.grad(loss, [hidden, head.weight])
    torch.testing.assert_close(loss, expected)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)


def test_weights_scale_each_targets_loss():
    hidden, head, labels = _case()
    weights = torch.linspace(0, 2, 14, dtype=torch.float64).view(2, 7)
    nll = cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="none").view(2, 7)
    torch.testing.assert_close(linear_cross_entropy(hidden, head, labels, weights), (nll * weights).sum())


def test_batch_without_targets_is_a_graph_connected_zero():  # masking.md case 30
    hidden, head, labels = _case()
    loss = linear_cross_entropy(hidden, head, torch.full_like(labels, -100))
    assert loss.item() == 0.0 and loss.requires_grad
    loss.backward()
    assert hidden.grad is not None and not hidden.grad.any()
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_micro_batches_sum_to_one_batch():  # masking.md case 31: never a mean of means
    sums = [torch.tensor([2.0]).sum(), torch.full((9,), 1.0).sum()]
    assert (sum(sums) / 10).item() == pytest.approx(1.1)
    hidden, head, labels = _case()
    whole = linear_cross_entropy(hidden, head, labels)
    parts = sum(linear_cross_entropy(hidden[i : i + 1], head, labels[i : i + 1]) for i in range(2))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_the_sum_is_at_least_fp32_and_fp64_stays_fp64(dtype, expected):
    hidden, head, labels = _case(dtype)
    assert linear_cross_entropy(hidden, head, labels).dtype is expected
    assert linear_cross_entropy(hidden, head, torch.full_like(labels, -100)).dtype is expected
