"""In bf16 our models are as near to the truth as transformers' own: what is computed more precisely is so here too.

The truth is the fp64 twin of the same weights, which bf16 holds exactly. Logits are compared by the median of their
errors, as a token that rounding sends to another expert is no measure of the arithmetic; what a whole model would drown
in its other roundings (norms, tables of angles, the router) is compared alone.
"""

import copy
import json
from pathlib import Path

import pytest
import torch

from torchmask.lora import LoRA
from torchmask.models import adapt, from_config, from_pretrained, read_config
from torchmask.models.adapters import merged_parameters
from torchmask.modules.lora import adapted_layers

transformers = pytest.importorskip("transformers")

CONFIGS = Path(__file__).parent / "configs"
CASES = [
    "gemma_untied",
    "gemma2_usual",
    "gemma3_text_usual",
    "llama_llama3_rope",
    "qwen3_tied",
    "qwen3_moe_normalized",
    "mixtral_top2",
    "phi3_plain",
]
MIXTURES = ["qwen3_moe_normalized", "mixtral_top2"]
WIDTH = 48  # of which the root is not near to a number of bf16: 6.928 and 6.9375


def pair_of(case, folder, **changes):
    """(transformers' model in bf16, ours, the fp64 twin), all of the same weights."""
    config = {**read_config(CONFIGS / f"{case}.json"), **changes}
    config.pop("_note", None)
    torch.manual_seed(1)
    auto = transformers.AutoModelForCausalLM
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    exact = auto.from_config(transformers.AutoConfig.for_model(**copy.deepcopy(config)), **options)
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_((p + torch.randn_like(p) * 0.1).bfloat16().float())
    exact.save_pretrained(folder)
    theirs = auto.from_pretrained(folder, dtype=torch.bfloat16, **options)  # `.bfloat16()` would cast its frequencies
    (folder / "config.json").write_text(json.dumps(config))
    return theirs.eval(), from_pretrained(folder, dtype="bf16"), exact.eval().double()


@pytest.fixture(scope="module", params=CASES)
def models(request, tmp_path_factory):
    return pair_of(request.param, tmp_path_factory.mktemp(request.param), hidden_size=WIDTH)


def tokens_of(model, *shape):
    return torch.randint(0, model.spec.vocab_size, shape, generator=torch.Generator().manual_seed(5))


def median_error(result, truth):
    return (result.double() - truth).abs().median().item()


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 3000])
@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_logits_are_as_near_to_the_truth_as_those_of_transformers(models, backend, start):
    theirs, ours, exact = models
    tokens, positions = tokens_of(ours, 32, 48), torch.arange(start, start + 48)[None].expand(32, 48)
    ours.attention = backend
    logits = ours.lm_head(ours(tokens, positions))
    ours.attention = "auto"
    reference = theirs(tokens, position_ids=positions).logits
    truth = exact(tokens, position_ids=positions).logits
    assert logits.dtype == torch.bfloat16
    assert median_error(logits, truth) <= 1.25 * median_error(reference, truth)


def first_input(model, layers, *args):
    """What the first layer gets."""
    seen = []
    handle = layers[0].register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    model(*args)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_embeddings_are_those_of_transformers_bit_for_bit(models):
    theirs, ours, _ = models
    tokens = tokens_of(ours, 2, 64)
    expected = first_input(theirs, theirs.model.layers, tokens)
    assert first_input(ours, ours.layers, tokens).equal(expected)


def angles(theirs, positions):
    """Transformers' cosines and sines, of the layers without a window."""
    x = torch.zeros(1, 1, dtype=torch.bfloat16)
    kinds = {"layer_type": "full_attention"} if theirs.config.model_type == "gemma3_text" else {}
    return theirs.model.rotary_emb(x, positions, **kinds)


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 500, 4000, 100_000])
def test_angles_are_those_of_transformers_bit_for_bit_at_positions_near_and_far(models, start):
    theirs, ours, _ = models
    spec = ours.spec
    layer = next(i for i in range(spec.num_layers) if not (spec.window_of(i) and spec.window_rope_base))
    seen = []
    handle = ours.layers[layer].attn.register_forward_pre_hook(lambda attn, given: seen.append(given[1]))
    positions = torch.arange(start, start + 50)[None]
    ours(tokens_of(ours, 1, 50), positions)
    handle.remove()
    for own, expected in zip(seen[0][:2], angles(theirs, positions), strict=True):
        assert own.dtype == torch.bfloat16 and own[:, 0].equal(expected)


@torch.no_grad()
def test_norms_are_as_near_to_the_truth_as_those_of_transformers(models):
    theirs, ours, exact = models
    x = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(2)).bfloat16()
    truth = exact.model.layers[0].input_layernorm(x.double())
    reference, own = theirs.model.layers[0].input_layernorm(x), ours.layers[0].attn_norm(x)
    mean_error, mean_reference = ((y.double() - truth).abs().mean().item() for y in (own, reference))
    assert mean_error <= 1.02 * mean_reference


@torch.no_grad()
@pytest.mark.parametrize("case", MIXTURES)
def test_routers_weigh_their_logits_in_fp32(case, tmp_path):
    theirs, ours, _ = pair_of(case, tmp_path)
    x = torch.randn(200, ours.spec.embed_dim, generator=torch.Generator().manual_seed(2)).bfloat16()
    router = next(layer.mlp for layer in theirs.model.layers if hasattr(layer.mlp, "gate")).gate
    block = next(layer.mlp for layer in ours.layers if hasattr(layer.mlp, "router"))
    logits, _, chosen = router(x)
    weights, own = block.route(x)
    of_chosen = logits.double().softmax(-1).gather(-1, own)
    assert own.equal(chosen)
    torch.testing.assert_close(weights.double(), of_chosen / of_chosen.sum(-1, keepdim=True), rtol=1e-6, atol=0)


@torch.no_grad()
def test_merged_adapters_are_rounded_once(tmp_path):
    model = from_config(read_config(CONFIGS / "llama_tied.json"), dtype="bf16")
    adapt(model, LoRA(rank=4))
    generator = torch.Generator().manual_seed(3)
    for _, layer in adapted_layers(model):
        for p in (layer.lora_a, layer.lora_b):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    merged = merged_parameters(model)
    for name, layer in adapted_layers(model):
        exact = layer.weight.double() + layer.scale * layer.lora_b.double() @ layer.lora_a.double()
        error, least = ((w.double() - exact).abs() for w in (merged[f"{name}.weight"], exact.bfloat16()))
        assert error.mean() <= 1.0001 * least.mean(), name
