"""ALiBi by the fused kernel, with heights as one more channel: the reference's results, and no scores held."""

import shutil
from dataclasses import replace

import pytest
import torch

from torchmask.modules import Decoder, DecoderSpec, decoder
from torchmask.modules.attention import alibi_slopes, attend
from torchmask.modules.attention_kernels import STEP_QUERIES
from torchmask.modules.attention_mask import build_attention_mask
from torchmask.modules.attention_scores import ScoreRule

RULES = {
    "plain": ScoreRule(alibi_slopes=alibi_slopes(4)),
    "rounded": ScoreRule(alibi_slopes=alibi_slopes(4), alibi_scale=0.3, alibi_rounded=True),
    "scaled": ScoreRule(scale=0.7, alibi_slopes=alibi_slopes(4)),
}


def tree():
    """A trunk of 300 slots with branches of 200 and 70, then a document of 290: limits and positions."""
    ends = torch.tensor([570] * 300 + [500] * 200 + [570] * 70 + [860] * 290)[None]
    lengths = (range(300), range(300, 500), range(300, 370), range(290))
    return ends, torch.tensor([p for stretch in lengths for p in stretch])[None]


def layout(name, num_slots):
    """Limits and positions of one row."""
    if name == "tree":
        return tree()
    positions = torch.arange(num_slots)[None]
    return {
        "row": (None, positions),
        "far along": (None, positions + 90_000),
        "backwards": (None, positions.flip(-1)),
        "jumping": (None, (positions * 37) % 101),
        "repeated": (None, positions // 3),
    }[name]


def results(backend, dtype, rule, limits, positions, *, sinks=True, num_slots=None):
    """Attended values and all gradients, of the same random inputs in any dtype."""
    num_slots = positions.shape[1] if num_slots is None else num_slots
    random = torch.Generator().manual_seed(3)
    q, k, v, g = (torch.randn(1, h, num_slots, 8, generator=random, dtype=torch.float64) for h in (4, 2, 2, 4))
    leaves = [x.to(dtype).clone().requires_grad_() for x in (q, k, v)]
    leaves += [torch.linspace(-1, 1, 4).to(dtype).requires_grad_()] * sinks
    mask = build_attention_mask(limits, torch.zeros(1, num_slots), backend=backend, positions=positions, biased=True)
    out = attend(*leaves[:3], mask, rule, sinks=leaves[3] if sinks else None)
    return [out.detach(), *torch.autograd.grad((out * g.to(dtype)).sum(), leaves)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["row", "far along", "backwards", "jumping", "repeated", "tree"])
@pytest.mark.parametrize("sinks", [True, False])
def test_steps_of_a_row_give_the_references_results(rule, name, sinks):
    limits, positions = layout(name, 2 * STEP_QUERIES + 45)
    options = {"rule": RULES[rule], "limits": limits, "positions": positions, "sinks": sinks}
    for a, b in zip(results("sdpa", torch.float64, **options), results("dense", torch.float64, **options)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["row", "far along", "tree"])
def test_fp32_keeps_what_the_reference_keeps(name):
    """Counted from position 0, heights of 90,000 would leave 0.003 of a score."""
    limits, positions = layout(name, 3 * STEP_QUERIES)
    options = {"rule": RULES["plain"], "limits": limits, "positions": positions}
    truth = results("dense", torch.float64, **options)
    for a, b in zip(results("sdpa", torch.float32, **options), truth):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_attended_at_least_as_exactly_as_by_the_reference(dtype):
    limits, positions = layout("row", 3 * STEP_QUERIES)
    options = {"rule": RULES["plain"], "limits": limits, "positions": positions}
    truth = results("dense", torch.float64, **options)
    own, reference = results("sdpa", dtype, **options), results("dense", dtype, **options)
    assert own[0].dtype == dtype
    for a, b, c in zip(own, reference, truth):
        assert (a - c).norm() <= 1.1 * (b - c).norm()


@pytest.mark.parametrize("name", ["row", "far along", "repeated", "tree"])
def test_no_scores_are_held_where_nobody_sees_a_later_position(name, monkeypatch):
    def refuse(*args):
        raise AssertionError("scores were written out")

    limits, positions = layout(name, 2 * STEP_QUERIES)
    monkeypatch.setattr(ScoreRule, "capped_scores", refuse)
    results("sdpa", torch.float32, RULES["plain"], limits, positions)


def test_positions_that_go_back_are_told_from_those_that_do_not():
    for name, looks_back in (("row", True), ("repeated", True), ("backwards", False), ("jumping", False)):
        limits, positions = layout(name, 200)
        mask = build_attention_mask(limits, positions, backend="sdpa", positions=positions, biased=True)
        assert [part.looks_back for part in mask.parts.own] == [looks_back], name


def test_steps_are_made_once_for_all_layers():
    mask = build_attention_mask(None, torch.zeros(1, 300), backend="sdpa", biased=True)
    (part,) = mask.parts.own
    first, further = part.steps(STEP_QUERIES)
    assert [(p.queries, p.causal) for p in first] == [
        (slice(0, 128), True),
        (slice(128, 256), True),
        (slice(256, 300), True),
    ]
    assert [(p.queries, p.keys) for p in further] == [
        (slice(128, 256), slice(0, 128)),
        (slice(256, 300), slice(0, 256)),
    ]
    assert part.steps(STEP_QUERIES)[0] is first


def test_a_soft_caps_slope_is_taken_from_the_scores_that_are_there(monkeypatch):
    calls = []
    products = ScoreRule.capped_scores
    monkeypatch.setattr(ScoreRule, "capped_scores", lambda *args: calls.append(1) or products(*args))
    results("sdpa", torch.float32, ScoreRule(softcap=2.0), None, torch.arange(200)[None])
    assert len(calls) == 2  # once forward, once backward


SPEC = DecoderSpec(
    vocab_size=97, embed_dim=32, intermediate_dim=56, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    max_seq_len=64, alibi=True, sliding_window=6, window_pattern=(True, False),
)  # fmt: skip


def test_slopes_are_made_once_a_forward_pass_with_a_cache_and_without(monkeypatch):
    calls = []
    monkeypatch.setattr(decoder, "alibi_slopes", lambda *args: calls.append(1) or alibi_slopes(*args))
    model, tokens = Decoder(SPEC), torch.zeros(1, 5, dtype=torch.int64)
    model(tokens)
    assert len(calls) == 1
    cache = model.new_cache(1, 7)
    for part in (tokens, tokens[:, :1], tokens[:, :1]):
        model(part, cache=cache)
    assert len(calls) == 4


def test_slopes_are_there_after_a_model_was_built_without_memory():
    torch.manual_seed(0)
    model, tokens = Decoder(SPEC).double(), torch.arange(9)[None]
    with torch.device("meta"):
        empty = Decoder(SPEC).double()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(tokens), model(tokens))
    plain = Decoder(replace(SPEC, alibi=False)).double()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(tokens), model(tokens), atol=1e-3)


@pytest.mark.slow  # compiles
def test_compiled_layers_take_slopes_in_training_and_from_a_cache():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    model, tokens = Decoder(SPEC).double(), torch.arange(9)[None]
    whole = model(tokens)
    whole.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for layer in model.layers:
        layer.compile()
    again = model(tokens)
    again.square().sum().backward()
    torch.testing.assert_close(again, whole, rtol=1e-9, atol=1e-9)
    for a, b in zip((p.grad for p in model.parameters() if p.grad is not None), grads):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    cache = model.new_cache(1, 9)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split([7, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)
