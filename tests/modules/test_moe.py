"""Experts: the grouped product against the loop, the router against its definition, tokens on their own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchmask.modules import MoESpec
from torchmask.modules.moe import MoE, can_group, grouped_product, looped_product


def moe(dtype=torch.float64, activation="silu", **options):
    torch.manual_seed(0)
    block = MoE(16, MoESpec(num_experts=5, experts_per_token=2, expert_dim=8, **options), activation=activation)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block.to(dtype)


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"bias": True}, {"bias": True, "gate_limit": 0.5}])
def test_each_token_gets_the_weighted_sum_of_its_experts(options):
    block, x = moe(**options), torch.randn(2, 7, 16, dtype=torch.float64)
    experts, expected = block.experts, torch.zeros(14, 16, dtype=torch.float64)
    for n, token in enumerate(x.flatten(0, 1)):
        shares = block.router(token).softmax(-1)
        chosen = shares.topk(2).indices.tolist()
        total = sum(shares[e] for e in chosen) if options.get("normalize", True) else 1
        for e in chosen:
            up, gate = experts.up_proj[e] @ token, experts.gate_proj[e] @ token
            if "bias" in options:
                up, gate = up + experts.up_proj_bias[e], gate + experts.gate_proj_bias[e]
            if "gate_limit" in options:
                gate, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
                inside = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            else:
                inside = gate * torch.sigmoid(gate) * up
            out = experts.down_proj[e] @ inside
            expected[n] += shares[e] / total * (out + experts.down_proj_bias[e] if "bias" in options else out)
    torch.testing.assert_close(block(x).flatten(0, 1), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_grouped_product_is_the_loop_forward_and_backward(sizes, dtype):
    torch.manual_seed(1)
    x, matrices = torch.randn(sum(sizes), 16, dtype=dtype), torch.randn(len(sizes), 8, 16, dtype=dtype)
    assert can_group(x, matrices)
    results = []
    for product in (grouped_product, looped_product):
        a, b = x.clone().requires_grad_(), matrices.clone().requires_grad_()
        out = product(a, b, torch.tensor(sizes))
        (out * torch.linspace(-1, 1, max(out.numel(), 1), dtype=dtype)[: out.numel()].view_as(out)).sum().backward()
        results.append((out, a.grad, b.grad))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def test_what_the_grouped_kernel_does_not_take_goes_through_the_loop():
    assert not can_group(torch.zeros(1, 16, dtype=torch.float64), torch.zeros(2, 8, 16, dtype=torch.float64))
    assert not can_group(torch.zeros(1, 12), torch.zeros(2, 6, 12))


def test_a_token_does_not_depend_on_the_others_and_unused_experts_get_no_gradient():
    block, x = moe(), torch.randn(1, 6, 16, dtype=torch.float64)
    together = block(x)
    alone = torch.cat([block(x[:, i : i + 1]) for i in range(6)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    block(x[:, :1]).sum().backward()
    _, chosen = block.route(x[0, :1])
    used = {e for e in range(5) if block.experts.up_proj.grad[e].abs().sum() > 0}
    assert used == set(chosen[0].tolist())


def test_the_slope_of_clamped_gates_is_the_specs():
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    usual, other = (
        moe(bias=True, gate_limit=0.5, **slope)(x) for slope in ({"gate_slope": 1.702}, {"gate_slope": 1.0})
    )
    assert torch.equal(usual, moe(bias=True, gate_limit=0.5)(x)) and not torch.allclose(usual, other)


@pytest.mark.parametrize(("dtype", "is_one_graph"), [(torch.bfloat16, True), (torch.float32, False)])
def test_compiled_experts_give_what_uncompiled_ones_do(dtype, is_one_graph):
    block, x = moe(dtype, bias=True), torch.randn(2, 5, 16, dtype=dtype)
    results = []
    for forward in (block, torch.compile(block, backend="aot_eager", fullgraph=is_one_graph)):
        block.zero_grad()
        out = forward(x)
        out.float().sum().backward()
        results.append([out.detach(), *(p.grad for p in block.parameters())])
    for compiled, plain in zip(*results):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "groups"), [("bf16", 512, False), ("bf16", 510, True), ("fp32", 512, True)]
)
def test_on_a_cpu_in_16_bits_experts_with_many_tokens_each_are_looped_over(dtype, num_tokens, groups):
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    x, matrices = torch.zeros(num_tokens, 16, dtype=dtype), torch.zeros(2, 8, 16, dtype=dtype)
    assert can_group(x, matrices) == groups
