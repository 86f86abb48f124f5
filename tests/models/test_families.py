"""Every family against transformers, one tiny random model for each config.json in `configs/`.

Norms, biases and sinks are random too, so that none can be forgotten unnoticed. Tolerances are the reference's own
rounding: how far its fp32 results are from those of its fp64 twin. What our own model says in fp64 has to agree with
itself to 1e-10 however documents are laid out.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from torchmask import models
from torchmask.generation import generate
from torchmask.generation.decoding import num_new_tokens
from torchmask.models import from_config, from_pretrained, read_config, save_pretrained
from torchmask.models.folder import family_of
from torchmask.modules import linear_cross_entropy
from torchmask.modules.rope_scaling import BY_LENGTH

transformers = pytest.importorskip("transformers")

HERE = Path(__file__).parent
CASES = sorted(path.stem for path in (HERE / "configs").glob("*.json"))
SIZES = {name: count for path in sorted((HERE / "sizes").glob("*.json")) for name, count in read_config(path).items()}
DOCUMENTS = (17, 1, 40, 23)


def config_of(case):
    config = read_config(HERE / "configs" / f"{case}.json")
    config.pop("_note", None)
    return config


def reference_options(config):
    """How transformers computes: every step written out, in whatever dtype.

    Falcon's eager attention adds ALiBi's biases twice; what it does by default adds them once, as the models' own code.
    """
    attention = "sdpa" if config["model_type"] == "falcon" else "eager"
    return {"attn_implementation": attention, "experts_implementation": "eager"}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(transformers' model, ours, the folder both come from)."""
    folder, config = tmp_path_factory.mktemp(request.param), config_of(request.param)
    torch.manual_seed(1)
    reference = transformers.AutoConfig.for_model(**copy.deepcopy(config))
    theirs = transformers.AutoModelForCausalLM.from_config(reference, **reference_options(config)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    # It would give the embedding of `pad_token_id` no gradient, also where that is a text's own last token.
    theirs.get_input_embeddings().padding_idx = None
    theirs.save_pretrained(folder)
    (folder / "config.json").rename(folder / "new_spelling.json")
    (folder / "config.json").write_text(json.dumps(config))
    return theirs, from_pretrained(folder), folder


def tokens_of(model, *shape, seed=5):
    return torch.randint(0, model.spec.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens, *layout):
    return model.lm_head(model(tokens, *layout))


def packed(documents):
    """Tokens, positions and limits of one row that holds the documents."""
    sizes = [d.shape[1] for d in documents]
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    ends = torch.tensor(sizes).cumsum(0).repeat_interleave(torch.tensor(sizes))[None]
    return torch.cat(documents, dim=1), positions, ends


@torch.no_grad()
def rounding_of(theirs, tokens):
    """How far the reference itself is from its fp64 twin on these tokens, and some room."""
    twin = copy.deepcopy(theirs).double()
    return 4 * (theirs(tokens).logits.double() - twin(tokens).logits).abs().max().item() + 1e-6


@torch.no_grad()
def test_logits_are_those_of_transformers(pair):
    theirs, ours, _ = pair
    tokens = tokens_of(ours, 2, 61)
    error = (logits_of(ours, tokens) - theirs(tokens).logits).abs().max().item()
    assert error <= rounding_of(theirs, tokens)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_packed_documents_get_the_logits_they_have_alone_in_transformers(pair, backend):
    theirs, ours, _ = pair
    documents = [tokens_of(ours, 1, n, seed=n) for n in DOCUMENTS]
    alone = torch.cat([theirs(d).logits for d in documents], dim=1)
    tolerance = max(rounding_of(theirs, d) for d in documents)
    ours.attention = backend
    together = logits_of(ours, *packed(documents))
    ours.attention = "auto"
    assert (together - alone).abs().max().item() <= tolerance


def in_file_layout(model, values, folder, save):
    """Values for every parameter, named and shaped as the model's files have them."""
    twin = copy.deepcopy(model)
    for (name, p), value in zip(twin.named_parameters(), values, strict=True):
        assert value is not None, f"{name} has no gradient"
        p.data = value.contiguous()
    save(twin, folder)
    tensors = [named for file in folder.glob("*.safetensors") for named in load_file(file).items()]
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors}


def test_loss_and_every_gradient_are_those_of_transformers(pair, tmp_path):
    theirs, ours, _ = pair
    tokens = tokens_of(ours, 2, 31)
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    labels[0, :9] = -100
    losses, grads = {}, {}
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(theirs).to(dtype)
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
        values = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        losses[dtype] = loss.item()
        grads[dtype] = in_file_layout(model, values, tmp_path / str(dtype), lambda m, f: m.save_pretrained(f))
    model = copy.deepcopy(ours)
    loss = linear_cross_entropy(model(tokens), model.lm_head, labels)
    loss.backward()
    own = in_file_layout(model, [p.grad for p in model.parameters()], tmp_path / "ours", save_pretrained)
    exact, single = grads[torch.float64], grads[torch.float32]
    rounding = abs(losses[torch.float32] - losses[torch.float64])
    assert loss.item() == pytest.approx(losses[torch.float64], abs=4 * rounding + 1e-3)
    assert own.keys() == exact.keys()
    for name, grad in own.items():
        room = 4 * (single[name] - exact[name]).abs().max() + 1e-6 * exact[name].abs().max() + 1e-5
        assert (grad - exact[name]).abs().max() <= room, name


@torch.no_grad()
def test_in_fp64_documents_alone_packed_and_sharing_a_prefix_agree(pair):
    model = copy.deepcopy(pair[1]).double()
    by_length = isinstance(model.spec.rope_scaling, BY_LENGTH)  # such documents share only with those of their length
    sizes = (19, 9, 9, 9) if by_length else (19, 7, 1, 9)
    prefix, *branches = (tokens_of(model, 1, n, seed=i) for i, n in enumerate(sizes))
    documents = [torch.cat([prefix, branch], dim=1) for branch in branches]
    alone = [logits_of(model, d) for d in documents]
    flat = logits_of(model, *packed(documents))
    assert (flat - torch.cat(alone, dim=1)).abs().max() < 1e-10

    tokens = torch.cat([prefix, *branches], dim=1)
    ends = torch.tensor([19, *(b.shape[1] for b in branches)]).cumsum(0).tolist()
    positions, until, start = [torch.arange(19)], [torch.full((19,), ends[-1])], 19
    for end in ends[1:]:
        positions.append(torch.arange(19, 19 + end - start))
        until.append(torch.full((end - start,), end))
        start = end
    tree = logits_of(model, tokens, torch.cat(positions)[None], torch.cat(until)[None])
    start = 19
    for document, end in zip(alone, ends[1:]):
        assert (tree[:, start:end] - document[:, 19:]).abs().max() < 1e-10
        assert (tree[:, :19] - document[:, :19]).abs().max() < 1e-10
        start = end


@torch.no_grad()
def test_in_fp64_hidden_tokens_and_prompts_that_see_both_ways_are_what_the_dense_mask_says(pair):
    model = copy.deepcopy(pair[1]).double()
    tokens, positions, until = packed([tokens_of(model, 1, n, seed=n) for n in (21, 30)])
    hidden, since = until.clone(), torch.arange(51)[None].clone()
    hidden[:, [3, 4, 25]] = torch.tensor([4, 5, 26])
    since[:, 21:31] = 21  # a prompt of ten tokens
    since[:, 25] = 25
    for layout in ((positions, hidden), (positions, until, since), (positions, hidden, since)):
        model.attention = "dense"
        expected = logits_of(model, tokens, *layout)
        model.attention = "sdpa"
        assert (logits_of(model, tokens, *layout) - expected).abs().max() < 1e-10
    model.attention = "dense"
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % model.spec.vocab_size
    before, after = (logits_of(model, t, positions, hidden) for t in (tokens, changed))
    assert not torch.equal(before[:, 4], after[:, 4])
    before[:, 4] = after[:, 4] = 0  # elsewhere only the rounding of products that experts do together may change
    assert (before - after).abs().max() < 1e-12, "a later token sees a hidden one"


@torch.no_grad()
def test_greedy_ids_of_unequal_prompts_are_those_of_transformers_over_64_tokens(pair):
    theirs, ours, _ = pair
    prompts = [tokens_of(ours, 1, n, seed=n) for n in (13, 1, 6)]
    room = [num_new_tokens(ours, p.shape[1], 64) for p in prompts]  # fewer where learned positions end
    assert ours.spec.learned_positions or room == [64] * 3
    theirs = copy.deepcopy(theirs)  # what it generates moves its dynamic rope
    own = generate(ours, [p[0].tolist() for p in prompts], max_new_tokens=64)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt, new, n in zip(prompts, own, room, strict=True):
        ids = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, **options)
        assert new == ids[0, prompt.shape[1] :].tolist()


@torch.no_grad()
def test_saved_weights_are_bit_identical_and_load_in_transformers(pair, tmp_path):
    theirs, ours, _ = pair
    save_pretrained(ours, tmp_path)
    again = from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    options = reference_options(ours.hub_config)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    tokens = tokens_of(ours, 1, 40)
    assert loaded(tokens).logits.equal(theirs(tokens).logits)


def test_both_spellings_of_config_json_are_read_alike_and_written_back(pair):
    _, ours, folder = pair
    assert from_config(folder / "new_spelling.json", device="meta").spec == ours.spec
    family = family_of(ours.hub_config)
    assert family.spec_from_config(family.config_from_spec(ours.spec)) == ours.spec


def test_transformers_builds_the_same_model_from_the_config_we_write(pair):
    theirs, ours, _ = pair
    config = family_of(ours.hub_config).config_from_spec(ours.spec)
    again = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(again, **reference_options(config)).eval()
    model.load_state_dict(theirs.state_dict())
    tokens = tokens_of(ours, 1, 40)
    with torch.no_grad():
        assert model(tokens).logits.equal(theirs(tokens).logits)


@pytest.mark.parametrize("name", SIZES)
def test_a_named_builder_has_the_published_number_of_parameters(name):
    model = getattr(models, name)(device="meta")
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    assert from_config(model.hub_config, device="meta").spec == model.spec


def test_every_known_family_has_a_case_and_every_builder_a_size():
    assert {config_of(case)["model_type"] for case in CASES} == set(models.FAMILIES)
    builders = {name for family in models.FAMILIES.values() for name in models.builders_of(family)}
    assert builders == SIZES.keys()
    assert builders <= set(models.__all__)
