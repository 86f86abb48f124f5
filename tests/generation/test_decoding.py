"""Decoding against transformers and against the model without a cache, alone and in batches of unequal prompts."""

import json

import pytest
import torch
from safetensors.torch import load_file

from torchmask.errors import DataError, DivergedError
from torchmask.generation import generate
from torchmask.models import from_config, from_pretrained

TINY = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,  # wide, so that what follows depends on the whole prompt
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "gqa": {},
    "llama3_rope": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500_000.0},
    "tied": {"tie_word_embeddings": True},
}
PROMPTS = [[5, 9, 17, 33, 2], [1], [7] * 3 + [20, 21, 22, 23, 24, 25], [60, 61], [3, 1, 4, 1, 5, 9, 2, 6]]


@pytest.fixture(scope="module")
def model():
    """fp64, so that batches cannot move an argmax or a draw by rounding."""
    return from_config(TINY, dtype=torch.float64, seed=3)


def _without_cache(model, prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(model.lm_head(model(torch.tensor([tokens])))[0, -1].argmax().item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_of_unequal_prompts_equal_those_of_transformers(variant, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = {**TINY, **VARIANTS[variant]}
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, eos_token_id=None, pad_token_id=0))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = theirs.double().eval()
    longest = max(map(len, PROMPTS))
    expected = theirs.generate(
        torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS]),
        max_new_tokens=64,
        do_sample=False,
    )[:, longest:]
    found = generate(from_pretrained(tmp_path, dtype="fp64"), PROMPTS, max_new_tokens=64)
    assert found == expected.tolist()
    assert len({tuple(row) for row in found}) == len(PROMPTS)  # the prompts matter


def test_greedy_tokens_of_stories260k_equal_the_golden(assets):
    folder = assets / "checkpoints" / "stories260k"
    bos, *expected = load_file(folder / "golden.safetensors")["greedy_ids"].tolist()
    assert len(expected) == 200
    assert generate(from_pretrained(folder), [[bos]], max_new_tokens=200) == [expected]


def test_a_completion_equals_the_argmax_of_full_forward_passes(model):
    found = generate(model, PROMPTS, max_new_tokens=20)
    assert found == [_without_cache(model, prompt, 20) for prompt in PROMPTS]


LONG_ROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 6.0, 8.0]}


@pytest.mark.parametrize("rope", [None, {**LONG_ROPE, "original_max_position_embeddings": 9}], ids=["plain", "long"])
@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
def test_completions_are_those_of_full_forward_passes_under_every_mask(prefix, rope):
    model = from_config({**TINY, "rope_scaling": rope}, dtype=torch.float64, seed=3)

    def since(prompt, tokens):
        n = len(prompt) if prefix == "bidirectional" else 0
        return torch.tensor([[0] * n + [*range(n, len(tokens))]])

    for prompt, completion in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=12, prefix=prefix)):
        tokens = list(prompt)
        for _ in range(12):
            hidden = model(torch.tensor([tokens]), visible_from=since(prompt, tokens))
            tokens.append(model.lm_head(hidden)[0, -1].argmax().item())
        assert completion == tokens[len(prompt) :]
    if prefix == "bidirectional":
        assert generate(model, PROMPTS, max_new_tokens=12) != generate(model, PROMPTS, max_new_tokens=12, prefix=prefix)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "seed": 4}, {"temperature": 1.0, "top_p": 0.8, "seed": 4}]
)
def test_a_completion_does_not_depend_on_the_prompts_beside_it(model, options):
    together = generate(model, PROMPTS, max_new_tokens=20, **options)
    alone = [generate(model, [p], max_new_tokens=20, first_index=i, **options)[0] for i, p in enumerate(PROMPTS)]
    assert together == alone


def test_a_prompt_that_comes_twice_is_drawn_twice(model):
    first, second = generate(model, [[5, 6]] * 2, max_new_tokens=20, temperature=1.0, seed=0)
    assert first != second


def test_sampling_repeats_with_its_seed_and_not_with_another(model):
    runs = [generate(model, PROMPTS, max_new_tokens=20, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_without_a_seed_every_call_draws_anew(model):
    runs = [generate(model, PROMPTS, max_new_tokens=20, temperature=1.0) for _ in range(2)]
    assert runs[0] != runs[1]


def test_more_tokens_begin_with_fewer(model):
    short, long = (generate(model, PROMPTS, max_new_tokens=n, temperature=1.0, seed=0) for n in (5, 30))
    assert [row[:5] for row in long] == short


def test_top_k_of_one_is_greedy(model):
    greedy = generate(model, PROMPTS, max_new_tokens=20)
    assert generate(model, PROMPTS, max_new_tokens=20, temperature=2.0, top_k=1, seed=0) == greedy


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-6])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_the_smallest_temperatures_are_greedy(options, temperature):
    model = from_config(TINY, seed=3)
    greedy = generate(model, PROMPTS, max_new_tokens=5)
    assert generate(model, PROMPTS, max_new_tokens=5, temperature=temperature, seed=0, **options) == greedy


def test_a_completion_ends_before_its_stop_token(model):
    free = generate(model, PROMPTS, max_new_tokens=30)
    stops = {free[0][4], free[2][11]}

    def cut(row):
        return row[: next((i for i, token in enumerate(row) if token in stops), len(row))]

    expected = [cut(row) for row in free]
    assert len({len(row) for row in expected}) > 2  # rows end at different steps, so that some are dropped on the way
    assert generate(model, PROMPTS, max_new_tokens=30, stop_ids=sorted(stops)) == expected


def test_finished_rows_are_dropped_from_the_batch(model, monkeypatch):
    num_rows = []
    forward = type(model).forward

    def counting(self, tokens, *args, **kwargs):
        num_rows.append(tokens.shape[0])
        return forward(self, tokens, *args, **kwargs)

    left = [3, 6, 6, 9, 99]  # how many tokens each row is allowed
    monkeypatch.setattr(type(model), "forward", counting)
    found = generate(
        model, PROMPTS, max_new_tokens=12, on_token=lambda i, t: left.__setitem__(i, left[i] - 1) or not left[i]
    )
    assert [len(row) for row in found] == [3, 6, 6, 9, 12]
    assert num_rows == [5] * 6 + [2] * 3 + [1] * 3


def test_dropping_finished_rows_does_not_change_the_draws_of_the_others(model):
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 0}
    free = generate(model, PROMPTS, **options)
    left = [1, 1, 1, 99, 3]
    found = generate(model, PROMPTS, **options, on_token=lambda i, t: left.__setitem__(i, left[i] - 1) or not left[i])
    assert found == [free[0][:1], free[1][:1], free[2][:1], free[3], free[4][:3]]


def test_decoding_ends_when_all_rows_are_done(model, monkeypatch):
    first = generate(model, [[5]], max_new_tokens=1)[0][0]
    calls = []
    monkeypatch.setattr(model.lm_head, "forward", lambda h: calls.append(1) or torch.nn.functional.one_hot(
        torch.full((h.shape[0],), first), 97).to(h.dtype))  # fmt: skip
    assert generate(model, [[5], [6]], max_new_tokens=50, stop_ids=[first]) == [[], []]
    assert len(calls) == 1


def test_completions_end_at_max_seq_len():
    model = from_config({**TINY, "max_position_embeddings": 12}, seed=3)
    prompts = [[5] * 4, [6] * 9]
    found = generate(model, prompts, max_new_tokens=20, max_seq_len=12)
    assert [len(row) for row in found] == [8, 3]
    assert [row[:n] for row, n in zip(generate(model, prompts, max_new_tokens=20), (8, 3))] == found
    with pytest.raises(DataError, match="12 tokens leave no room to answer; max_seq_len is 12"):
        generate(model, [[5] * 12], max_new_tokens=1, max_seq_len=12)


def test_completions_end_where_learned_positions_do():
    config = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    model = from_config({**config, "initializer_range": 0.4}, dtype=torch.float64, seed=3)
    prompts = [[5] * 13, [6], [7] * 6, [8] * 2, [9] * 3]
    together = generate(model, prompts, max_new_tokens=64)
    assert [len(row) for row in together] == [3, 15, 10, 14, 13]
    assert together == [generate(model, [prompt], max_new_tokens=64)[0] for prompt in prompts]


def test_on_token_hears_every_token_and_can_end_a_completion(model):
    free = generate(model, PROMPTS, max_new_tokens=12)
    heard = [[] for _ in PROMPTS]

    def on_token(index, token):
        heard[index].append(token)
        return index == 1 and len(heard[1]) == 4

    found = generate(model, PROMPTS, max_new_tokens=12, on_token=on_token)
    assert found == heard == [row[:4] if i == 1 else row for i, row in enumerate(free)]


def test_on_token_does_not_hear_the_stop_token(model):
    free = generate(model, [PROMPTS[0]], max_new_tokens=12)[0]
    heard = []
    generate(model, [PROMPTS[0]], max_new_tokens=12, stop_ids=[free[5]], on_token=lambda i, t: heard.append(t))
    assert heard == free[: free.index(free[5])]


def test_every_module_is_in_its_own_mode_again(model):
    model.train()
    model.layers[1].eval()
    before = [module.training for module in model.modules()]
    generate(model, [[5]], max_new_tokens=2)
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


def test_a_model_can_be_trained_after_it_has_generated(model):
    generate(model, [[5, 6]], max_new_tokens=2)
    model(torch.tensor([[5, 6]])).sum().backward()
    assert model.layers[0].attn.q_proj.weight.grad is not None


def test_no_prompts_and_no_tokens_are_empty(model):
    assert generate(model, [], max_new_tokens=5) == []
    assert generate(model, [[5], [6]], max_new_tokens=0) == [[], []]


def test_logits_that_are_not_numbers_stop_the_generation():
    model = from_config(TINY, seed=3)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(DivergedError, match="not numbers"):
        generate(model, [[5]], max_new_tokens=5)


BROKEN_FROM = 5
OPTIONS = {"greedy": {}, "drawn": {"temperature": 1.0, "seed": 0}, "top": {"temperature": 1.0, "top_k": 9, "seed": 0}}


@pytest.fixture
def breaking():
    """Its prompts of ids below 5 are read well; what it says then is NaN to it."""
    model = from_config({**TINY, "tie_word_embeddings": False}, seed=3)
    with torch.no_grad():
        model.embed_tokens.weight[BROKEN_FROM:] = torch.nan
        model.lm_head.weight[:BROKEN_FROM] = 0
        model.lm_head.weight[BROKEN_FROM:] *= 50  # the first token is one of these for sure
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("listening", [False, True], ids=["alone", "told"])
def test_logits_that_stop_being_numbers_on_the_way_stop_the_generation(breaking, options, listening):
    told = []
    on_token = (lambda index, token: told.append(token)) if listening else None
    first = generate(breaking, [[1, 2]], max_new_tokens=1, **options)[0][0]
    assert first >= BROKEN_FROM
    with pytest.raises(DivergedError, match="not numbers") as caught:
        generate(breaking, [[1, 2]], max_new_tokens=4, on_token=on_token, **options)
    assert caught.value.id == "R01"
    assert told == [first] * listening  # nothing that is no token


def test_infinite_logits_stop_the_generation():
    model = from_config(TINY, seed=3)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.inf
    with pytest.raises(DivergedError, match="not numbers"):
        generate(model, [[5]], max_new_tokens=5)


def test_a_row_that_has_ended_may_say_anything():
    model = from_config(TINY, dtype=torch.float64, seed=3)
    first, *others = generate(model, PROMPTS, max_new_tokens=6)
    stop = first[0]
    assert not any(stop in row for row in (*others, *PROMPTS))
    with torch.no_grad():
        model.embed_tokens.weight[stop] = torch.nan  # read by the first row alone, which is carried along
    assert generate(model, PROMPTS, max_new_tokens=6, stop_ids=[stop]) == [[], *others]


def test_one_step_waits_for_the_device_once(model, monkeypatch):
    waits = []
    for name in ("tolist", "item", "__bool__", "__int__", "nonzero"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real: waits.append(1) or real(self))
    counts = []
    for num_tokens in (10, 11):
        waits.clear()
        generate(model, [[5, 6]], max_new_tokens=num_tokens, temperature=1.0, seed=0)
        counts.append(len(waits))
    assert counts[1] - counts[0] == 1


def test_windows_are_right_after_rows_of_unequal_prompts_are_dropped():
    config = {**TINY, "model_type": "mistral", "sliding_window": 4}
    model = from_config(config, dtype=torch.float64, seed=3)
    options = {"max_new_tokens": 14, "prefix": "causal"}
    alone = [generate(model, [prompt], **options)[0] for prompt in PROMPTS]
    for last in range(len(PROMPTS)):  # the row that goes on when all others have ended

        def on_token(index, token, last=last):
            return index != last

        found = generate(model, PROMPTS, **options, on_token=on_token)
        assert found == [row if i == last else row[:1] for i, row in enumerate(alone)]


@pytest.mark.gpu
def test_tokens_on_cuda_equal_those_on_the_cpu(model):
    on_cuda = from_config(TINY, dtype=torch.float64, device="cuda", seed=3)
    for options in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 1}):
        expected = generate(model, PROMPTS, max_new_tokens=20, **options)
        assert generate(on_cuda, PROMPTS, max_new_tokens=20, **options) == expected
