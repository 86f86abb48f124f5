"""A decoder on packed rows computes what it computes on the documents alone: trees, prompts, windows, caps, ALiBi."""

import shutil

import pytest
import torch

from torchmask.modules import Decoder, DecoderSpec, attention_plan, linear_cross_entropy


@pytest.fixture(autouse=True)
def rows_are_planned_as_long_ones(monkeypatch):
    monkeypatch.setattr(attention_plan, "SMALL", 3)
    monkeypatch.setattr(attention_plan, "PAIRS_PER_PART", 0)


FACTS = {
    "plain": {},
    "window": {"sliding_window": 6},
    "every other layer windowed": {"sliding_window": 6, "window_pattern": (True, False)},
    "softcap and scale": {"attn_softcap": 1.5, "attn_scale": 0.5},
    "alibi": {"alibi": True},
    "alibi and window": {"alibi": True, "sliding_window": 7},
    "rounded alibi": {"alibi": True, "alibi_rounded": True, "alibi_scale": 0.3},
}


def model_of(facts, attention="auto", dtype=torch.float64):
    torch.manual_seed(0)
    spec = DecoderSpec(
        vocab_size=50,
        embed_dim=32,
        intermediate_dim=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_seq_len=64,
        **facts,
    )
    model = Decoder(spec, attention=attention).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens_of(*shape):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))


# A prefix of 9 with branches of 5 and 12, of which the second forks after 4 into 3 and 5; then a document of 6.
UNTIL = torch.tensor([[26] * 9 + [14] * 5 + [26] * 4 + [21] * 3 + [26] * 5 + [32] * 6])
POSITIONS = torch.tensor([[*range(9), *range(9, 14), *range(9, 13), *range(13, 16), *range(13, 18), *range(6)]])
PATHS = ([*range(14)], [*range(9), *range(14, 21)], [*range(9), *range(14, 18), *range(21, 26)], [*range(26, 32)])


@pytest.mark.parametrize("attention", ["dense", "sdpa", "flex"])
@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
def test_a_tree_equals_its_documents_alone(facts, attention):
    dtype, error = (torch.float32, 2e-4) if attention == "flex" else (torch.float64, 1e-11)
    model = model_of(facts, attention, dtype)
    tokens = tokens_of(1, 32)
    with torch.no_grad():
        together = model(tokens, POSITIONS, UNTIL)
        for path in PATHS:
            alone = model(tokens[:, path])
            torch.testing.assert_close(together[:, path], alone, rtol=0, atol=error)


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
def test_gradients_of_a_tree_equal_those_of_the_dense_reference(facts):
    results = []
    for attention, checkpointed in (("dense", False), ("sdpa", False), ("sdpa", True)):
        model = model_of(facts, attention)
        for layer in model.layers:
            layer.checkpoint_activations = checkpointed
        tokens = tokens_of(1, 32)
        loss = linear_cross_entropy(model(tokens, POSITIONS, UNTIL), model.lm_head, tokens.roll(-1, 1))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for dense, *others in zip(*results):
        for other in others:
            torch.testing.assert_close(other, dense, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("attention", ["dense", "sdpa", "flex"])
def test_a_prompt_sees_itself_both_ways_and_its_answer_only_back(attention):
    dtype = torch.float32 if attention == "flex" else torch.float64
    model, tokens = model_of({}, attention, dtype), tokens_of(1, 10)
    since = torch.tensor([[0] * 6 + [6, 7, 8, 9]])

    def changed_by(slot):
        other = tokens.clone()
        other[0, slot] = (other[0, slot] + 1) % 50
        with torch.no_grad():
            difference = (model(other, visible_from=since) - model(tokens, visible_from=since)).abs().amax(-1)
        return (difference[0] > 1e-6).int().tolist()

    assert changed_by(5) == [1] * 10
    assert changed_by(6) == [0] * 6 + [1] * 4
    assert changed_by(9) == [0] * 9 + [1]


def test_without_visible_from_a_model_is_causal():
    model, tokens = model_of({}), tokens_of(2, 12)
    torch.testing.assert_close(model(tokens, visible_from=torch.arange(12).repeat(2, 1)), model(tokens))


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
def test_a_cache_gives_what_one_forward_pass_gives(facts):
    model, tokens = model_of(facts), tokens_of(2, 24)
    for since in (None, torch.tensor([[0] * 11 + [*range(11, 24)]] * 2)):
        whole = model(tokens, visible_from=since)
        cache = model.new_cache(2, 24)
        parts = [
            model(part, visible_from=None if since is None or cache.length else since[:, :11], cache=cache)
            for part in tokens.split([11, 1, 1, 6, 5], dim=1)
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-11)


def test_padded_prompts_that_see_both_ways_are_cached_as_alone():
    model = model_of({"alibi": True, "sliding_window": 5})
    prompt, more = tokens_of(1, 7), tokens_of(1, 3)
    cache = model.new_cache(1, 13)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompt], dim=1)
    slots = torch.arange(10)[None]
    positions = (slots - 3).clamp(min=0)
    until = torch.where(slots < 3, slots + 1, 10**6)
    since = torch.where(slots < 3, slots, 3)
    first = model(padded, positions, until, since, cache=cache)[:, 3:]
    rest = [model(more[:, i : i + 1], torch.tensor([[7 + i]]), cache=cache) for i in range(3)]
    alone = model(torch.cat([prompt, more], dim=1), visible_from=torch.tensor([[0] * 7 + [7, 8, 9]]))
    torch.testing.assert_close(torch.cat([first, *rest], dim=1), alone, rtol=0, atol=1e-11)


def test_rows_of_a_cache_keep_their_positions_and_prompts():
    model = model_of({"alibi": True})
    tokens, since = tokens_of(3, 8), torch.tensor([[0] * 6, [*range(6)], [0, 0, 0, 3, 4, 5]])
    cache = model.new_cache(3, 8)
    model(tokens[:, :6], visible_from=since, cache=cache)
    cache.keep_rows(torch.tensor([2, 1]))
    since = torch.cat([since, torch.tensor([[6, 7]] * 3)], dim=1)
    last = model(tokens[[2, 1], 6:], cache=cache)
    torch.testing.assert_close(last, model(tokens, visible_from=since)[[2, 1], 6:], rtol=0, atol=1e-11)


def test_one_mask_is_made_for_each_kind_of_layer(monkeypatch):
    from torchmask.modules import decoder

    windows = []
    build = decoder.build_attention_mask
    monkeypatch.setattr(
        decoder, "build_attention_mask", lambda *a, **kw: (windows.append(kw["window"]), build(*a, **kw))[1]
    )
    model_of({"sliding_window": 6, "window_pattern": (True, False)})(tokens_of(1, 12))
    assert sorted(windows, key=str) == [6, None]


@pytest.mark.slow  # compiles
def test_compiled_layers_train_on_trees_as_plain_ones_do():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    tokens, grads = tokens_of(1, 32), []
    for compiled in (False, True):
        model = model_of({}, dtype=torch.float32)
        for layer in model.layers:
            if compiled:
                layer.compile()
        for until in (
            UNTIL,
            UNTIL.clamp(max=26).maximum(torch.arange(1, 33)),
        ):  # another mask must not recompile wrongly
            linear_cross_entropy(model(tokens, POSITIONS, until), model.lm_head, tokens.roll(-1, 1)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
