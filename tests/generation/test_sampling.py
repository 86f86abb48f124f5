"""Draws from logits: distribution, top-k, top-p."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchmask.generation import sample
from torchmask.generation.sampling import uniforms_of

NUM_DRAWS = 20_000


def _counts(logits, **options):
    """How often each token comes in as many rows of the same logits, each with its own number."""
    rows = logits.expand(NUM_DRAWS, -1)
    return torch.bincount(sample(rows, uniforms_of(0, 0, NUM_DRAWS), **options), minlength=len(logits)).numpy()


def _chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    seen = expected > 0
    assert counts[~seen].sum() == 0
    return (((counts - expected) ** 2)[seen] / expected[seen]).sum(), seen.sum() - 1


@pytest.fixture(scope="module")
def logits():
    return torch.randn(40, generator=torch.Generator().manual_seed(2)) * 1.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(logits, temperature):
    probabilities = (logits.double() / temperature).softmax(-1).numpy()
    chi_square, freedom = _chi_square(_counts(logits, temperature=temperature), probabilities)
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)  # 5 sigma


def test_top_k_draws_from_the_k_most_probable_by_their_share(logits):
    probabilities = logits.double().softmax(-1)
    kept = torch.zeros_like(probabilities)
    top = probabilities.topk(5).indices
    kept[top] = probabilities[top] / probabilities[top].sum()
    chi_square, freedom = _chi_square(_counts(logits, top_k=5), kept.numpy())
    assert freedom == 4 and chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_a_top_k_beyond_the_vocabulary_takes_all(logits):
    uniforms = uniforms_of(0, 0, 100)
    rows = logits.expand(100, -1)
    assert torch.equal(sample(rows, uniforms, top_k=1000), sample(rows, uniforms, top_k=40))


@given(st.floats(0.01, 1.0), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_top_p_draws_from_the_fewest_tokens_of_that_mass(top_p, seed):
    logits = torch.randn(30, generator=torch.Generator().manual_seed(seed)) * 2
    rows, uniforms = logits.expand(2000, -1), torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    drawn = set(sample(rows, uniforms, top_p=top_p).tolist())
    probabilities = logits.softmax(-1).double()
    order = probabilities.argsort(descending=True)
    cumulative = probabilities[order].cumsum(-1)
    size = int((cumulative < top_p * cumulative[-1]).sum()) + 1  # reaches the mass; without its last token it does not
    assert drawn <= set(order[:size].tolist())
    share = probabilities[order[:size]] / probabilities[order[:size]].sum()
    assert {int(t) for t, s in zip(order, share) if s > 1 / 1000} <= drawn


def test_top_p_of_one_takes_all(logits):
    chi_square, freedom = _chi_square(_counts(logits, top_p=1.0), logits.double().softmax(-1).numpy())
    assert freedom == 39 and chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_top_p_is_of_what_top_k_has_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # of the three left, the first two have 7/9 of the mass: enough for 0.75, not in the whole
    uniforms = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    rows = logits.expand(100, -1)
    assert set(sample(rows, uniforms, top_k=3, top_p=0.75).tolist()) == {0, 1}
    assert set(sample(rows, uniforms, top_p=0.75).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_a_token_without_probability_is_never_drawn(options):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert set(sample(logits.expand(3, -1), ends, **options).tolist()) <= {1, 3}


def test_half_precision_logits_are_drawn_from_in_fp32():
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    uniforms = uniforms_of(1, 0, 1)
    assert torch.equal(sample(logits, uniforms), sample(logits.float(), uniforms))


@pytest.mark.parametrize("options", [{}, {"top_k": 50_000}, {"top_p": 1.0}], ids=str)
def test_tokens_far_less_probable_than_fp32_can_tell_from_one_are_found(options):
    """Of 2e-9 each: sums beyond a half that are rounded to fp32 are 6e-8 apart."""
    logits = -20 - torch.arange(40_001) * 1e-5  # the most probable first, as they are ranked
    logits[0] = 0.0
    probabilities = logits.softmax(-1).double().numpy()
    middles = (np.cumsum(probabilities) - probabilities / 2) / probabilities.sum()
    wanted = torch.arange(7, len(logits), 997)
    found = sample(logits.expand(len(wanted), -1), torch.from_numpy(middles)[wanted], **options)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_temperature_that_underflows_draws_the_most_probable_token(temperature, dtype):
    logits = torch.tensor([[3.0, 9.0, -torch.inf, 8.5], [-1e4, -2e4, -1e3, -torch.inf]], dtype=dtype)
    uniforms = torch.tensor([0.999, 0.0], dtype=torch.float64)
    assert sample(logits, uniforms, temperature=temperature).tolist() == [1, 2]


def test_a_temperature_that_overflows_draws_from_all_tokens_alike():
    logits, ends = torch.tensor([[5.0, -torch.inf, -5.0]]), torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert sample(logits.expand(2, -1), ends, temperature=1e300).tolist() == [0, 2]


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
def test_of_logits_that_are_not_numbers_some_token_is_drawn(options):
    drawn = sample(torch.full((1, 4), torch.nan), torch.tensor([0.5], dtype=torch.float64), **options)
    assert 0 <= drawn.item() < 4


def test_numbers_of_a_prompt_depend_on_seed_and_index_only():
    assert torch.equal(uniforms_of(3, 1, 50)[:10], uniforms_of(3, 1, 10))
    first = [uniforms_of(seed, index, 4) for seed in range(3) for index in range(3)]
    assert len({tuple(u.tolist()) for u in first}) == 9
