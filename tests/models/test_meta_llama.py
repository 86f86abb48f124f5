"""Meta's own Llama checkpoints against a few lines of the model that they were made for."""

import json

import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from torchmask.models import from_config, from_pretrained, load_pretrained, read_config, save_pretrained

PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "multiple_of": 8, "norm_eps": 1e-5}
HIDDEN = 88  # two thirds of 4 * 32 is 85
GENERATIONS = {
    "llama 2": {"vocab_size": -1, "n_kv_heads": None},
    "llama 2 grouped": {"vocab_size": -1},
    "code llama": {"rope_theta": 1_000_000},
    "llama 3": {"rope_theta": 500_000.0, "by_rows": True},
    "llama 3.1": {"rope_theta": 500_000.0, "by_rows": True, "use_scaled_rope": True},
}
ROW_PARALLEL = ("wo.weight", "w2.weight")


def generation(name, **more):
    params = {**PARAMS, **GENERATIONS[name], **more}
    by_rows = params.pop("by_rows", False)
    return {key: value for key, value in params.items() if value is not None}, by_rows


def meta_weights(params):
    generator = torch.Generator().manual_seed(7)

    def randn(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    dim, heads = params["dim"], params["n_heads"]
    kv_dim = dim // heads * params.get("n_kv_heads", heads)
    weights = {"tok_embeddings.weight": randn(40, dim), "norm.weight": 1 + randn(dim), "output.weight": randn(40, dim)}
    for i in range(params["n_layers"]):
        shapes = {
            "attention.wq": (dim, dim),
            "attention.wk": (kv_dim, dim),
            "attention.wv": (kv_dim, dim),
            "attention.wo": (dim, dim),
            "feed_forward.w1": (HIDDEN, dim),
            "feed_forward.w2": (dim, HIDDEN),
            "feed_forward.w3": (HIDDEN, dim),
        }
        weights |= {f"layers.{i}.{name}.weight": randn(*shape) for name, shape in shapes.items()}
        weights |= {f"layers.{i}.{name}.weight": 1 + randn(dim) for name in ("attention_norm", "ffn_norm")}
    return weights


def cut(name, tensor, num_files, by_rows):
    """What each of the files holds of a tensor."""
    if tensor.ndim == 1:
        return [tensor] * num_files
    by_columns = name.endswith(ROW_PARALLEL) or (name == "tok_embeddings.weight" and not by_rows)
    return [part.clone() for part in tensor.chunk(num_files, dim=1 if by_columns else 0)]


def write(folder, params, weights, num_files=1, by_rows=False):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for i in range(num_files):
        part = {name: cut(name, tensor, num_files, by_rows)[i] for name, tensor in weights.items()}
        torch.save({**part, "rope.freqs": torch.ones(4)}, folder / f"consolidated.{i:02d}.pth")
    return folder


def meta_logits(params, weights, tokens):
    """The model of the release: rotations as products of complex numbers, over neighbouring channels."""
    heads, dim = params["n_heads"], params["dim"]
    width = dim // heads
    freqs = 1.0 / params.get("rope_theta", 10_000.0) ** (torch.arange(0, width, 2).double() / width)
    if params.get("use_scaled_rope"):
        # Long wavelengths are stretched by 8, short ones kept, those between 8192 / 4 and 8192 / 1 mixed.
        smooth = ((8192 * freqs / (2 * torch.pi) - 1.0) / (4.0 - 1.0)).clamp(0, 1)
        freqs = (1 - smooth) * freqs / 8 + smooth * freqs
    angles = torch.outer(torch.arange(tokens.shape[1]).double(), freqs)
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(3)

    def norm(x, name):
        return rms_norm(x, (dim,), weights[name].double(), params["norm_eps"])

    def linear(x, name):
        return x @ weights[f"{name}.weight"].double().T

    x = weights["tok_embeddings.weight"].double()[tokens]
    for i in range(params["n_layers"]):
        at = f"layers.{i}.attention"
        y = norm(x, f"layers.{i}.attention_norm.weight")
        q, k, v = (linear(y, f"{at}.{name}").unflatten(-1, (-1, width)) for name in ("wq", "wk", "wv"))
        q, k, v = (t.transpose(1, 2) for t in (rotated(q), rotated(k), v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + linear(y.transpose(1, 2).flatten(2), f"{at}.wo")
        y, at = norm(x, f"layers.{i}.ffn_norm.weight"), f"layers.{i}.feed_forward"
        x = x + linear(silu(linear(y, f"{at}.w1")) * linear(y, f"{at}.w3"), f"{at}.w2")
    return linear(norm(x, "norm.weight"), "output")


@torch.no_grad()
@pytest.mark.parametrize("num_files", [1, 2])
@pytest.mark.parametrize("name", GENERATIONS)
def test_logits_are_those_of_metas_model(name, num_files, tmp_path):
    params, by_rows = generation(name)
    weights = meta_weights(params)
    model = from_pretrained(write(tmp_path / "meta", params, weights, num_files, by_rows), dtype="fp64")
    tokens = torch.randint(0, 40, (2, 50), generator=torch.Generator().manual_seed(0))
    # fp64 but for the tables of our rope, which are made in fp32 where transformers makes them so.
    torch.testing.assert_close(model.lm_head(model(tokens)), meta_logits(params, weights, tokens), rtol=0, atol=2e-6)


def test_one_file_or_several_make_the_same_parameters_and_a_hugging_face_folder(tmp_path):
    params, by_rows = generation("llama 3.1", n_kv_heads=4)
    weights = meta_weights(params)
    models = [from_pretrained(write(tmp_path / str(n), params, weights, n, by_rows)) for n in (1, 2, 4)]
    save_pretrained(models[0], tmp_path / "hub")
    models.append(from_pretrained(tmp_path / "hub"))
    for same in zip(*(model.state_dict().items() for model in models)):
        assert all(tensor.equal(same[0][1]) for _, tensor in same), same[0][0]
    assert models[0].spec == models[3].spec


def test_heads_that_several_files_hold_alike_are_read_once(tmp_path):
    params, by_rows = generation("llama 3")
    weights = meta_weights(params)
    folder = write(tmp_path / "meta", params, weights, 4, by_rows)
    for i in range(4):  # four files for two heads of keys and values
        file = folder / f"consolidated.{i:02d}.pth"
        part = torch.load(file)
        for name in part:
            if name.endswith(("wk.weight", "wv.weight")):
                part[name] = weights[name].chunk(2)[i // 2].clone()
        torch.save(part, file)
    expected = from_pretrained(write(tmp_path / "one", params, weights)).state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in from_pretrained(folder).state_dict().items())


def test_a_head_that_is_the_embedding_is_tied_and_has_the_small_models_rope(tmp_path):
    params, _ = generation("llama 3.1")
    weights = meta_weights(params)
    for name, head in (("absent", None), ("equal", weights["tok_embeddings.weight"].clone())):
        held = {**weights, "output.weight": head} if head is not None else dict(weights)
        if head is None:
            del held["output.weight"]
        model = from_pretrained(write(tmp_path / name, params, held))
        assert model.lm_head.weight is model.embed_tokens.weight
        assert model.spec.rope_scaling.factor == 32.0


# The published params.json, but for numbers that a size needs not; from the releases.
PUBLISHED = {
    "llama2_7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1},
    "llama2_70b": {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    },
    "code_llama_34b": {
        "dim": 8192,
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.0,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 48,
        "norm_eps": 1e-5,
        "rope_theta": 1_000_000,
        "vocab_size": 32_000,
    },
    "llama3_1_8b": {
        "dim": 4096,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 32,
        "n_kv_heads": 8,
        "n_layers": 32,
        "norm_eps": 1e-5,
        "vocab_size": 128_256,
        "rope_theta": 500_000.0,
        "use_scaled_rope": True,
    },
    "llama3_2_1b": {
        "dim": 2048,
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.5,
        "n_heads": 32,
        "n_kv_heads": 8,
        "n_layers": 16,
        "norm_eps": 1e-5,
        "vocab_size": 128_256,
        "rope_theta": 500_000.0,
        "use_scaled_rope": True,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_params_give_the_published_architecture(name, tmp_path):
    from torchmask import models

    params = PUBLISHED[name]
    num_rows = params["vocab_size"] if params["vocab_size"] > 0 else 32_000
    (tmp_path / "params.json").write_text(json.dumps(params))
    # Rows that take no room: only their number is asked for.
    tensors = {"tok_embeddings.weight": torch.zeros(1, 1).expand(num_rows, params["dim"])}
    if name != "llama3_2_1b":
        tensors["output.weight"] = torch.ones(1, 1).expand(num_rows, params["dim"])
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    published = getattr(models, name)(device="meta").spec
    assert from_config(tmp_path, device="meta").spec == published


@pytest.mark.parametrize("num_files", [1, 2])
def test_a_head_that_begins_like_the_embedding_is_kept(num_files, tmp_path, monkeypatch):
    monkeypatch.setattr("torchmask.models.weights._ROWS_COMPARED", 8)
    params, by_rows = generation("llama 3.1")
    weights = meta_weights(params)
    head = weights["tok_embeddings.weight"].clone()
    head[-1, -1] += 1.0
    folder = write(tmp_path / "meta", params, {**weights, "output.weight": head}, num_files, by_rows)
    model = from_pretrained(folder)
    assert model.lm_head.weight.equal(head) and model.spec.rope_scaling.factor == 8.0
    tied = from_config({**read_config(folder), "tie_word_embeddings": True})
    with pytest.raises(ValueError, match=r"output\.weight differs from tok_embeddings\.weight"):
        load_pretrained(tied, folder)


def test_a_head_that_is_the_embedding_in_every_one_of_several_files_is_tied(tmp_path):
    params, by_rows = generation("llama 3")
    weights = meta_weights(params)
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    assert from_pretrained(write(tmp_path / "meta", params, weights, 2, by_rows)).spec.tie_embeddings


@pytest.mark.parametrize("generation_name", ["llama 2", "llama 3"])
def test_missing_last_files_are_told_by_what_each_file_holds(generation_name, tmp_path):
    params, by_rows = generation(generation_name)
    folder = write(tmp_path / "meta", params, meta_weights(params), 4, by_rows)
    model = from_config(read_config(folder))
    (folder / "consolidated.03.pth").unlink()
    for load in (from_pretrained, from_config, lambda folder: load_pretrained(model, folder)):
        with pytest.raises(ValueError, match=r"consolidated\.03\.pth is missing: of the 32 rows .* holds 8,") as caught:
            load(folder)
        assert caught.value.id == "W03" and "there are 4 files; the folder has consolidated.00.pth, " in str(
            caught.value
        )


def test_a_file_too_many_is_told(tmp_path):
    params, by_rows = generation("llama 3")
    folder = write(tmp_path / "meta", params, meta_weights(params), 2, by_rows)
    (folder / "consolidated.02.pth").write_bytes((folder / "consolidated.01.pth").read_bytes())
    with pytest.raises(ValueError, match=r"so there are 2 files; the folder has .*consolidated\.02\.pth") as caught:
        from_pretrained(folder)
    assert caught.value.id == "W05"


def test_another_number_of_layers_is_told_by_params_json(tmp_path):
    params, _ = generation("llama 3")
    folder = write(tmp_path / "meta", {**params, "n_layers": 7}, meta_weights(params))
    with pytest.raises(ValueError, match=r"the weights have 2 layers, params\.json says 7") as caught:
        from_pretrained(folder)
    assert "fix: use the params.json that belongs" in str(caught.value)


@pytest.mark.parametrize("name", ["a", "tok_embeddings.weight"])
def test_files_of_something_else_beside_params_json_are_told_by_what_they_hold(name, tmp_path):
    params, _ = generation("llama 3")
    with pytest.raises(ValueError, match=r"no matrix tok_embeddings\.weight in consolidated\.00\.pth") as caught:
        from_pretrained(write(tmp_path / "meta", params, {name: torch.ones(2)}))
    assert f"it holds {name} [2], rope.freqs [4]\n" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    params, by_rows = generation("llama 3")
    folder = write(tmp_path / "meta", params, meta_weights(params), 2, by_rows)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth is missing; the folder holds consolidated\.01\.pth"):
        from_pretrained(folder)


def test_what_does_not_fit_is_told_by_file_and_name(tmp_path):
    params, _ = generation("llama 2")
    weights = meta_weights(params)
    weights["layers.0.attention.wo.weight"] = torch.zeros(32, 31)
    weights["extra"] = weights.pop("layers.1.ffn_norm.weight")
    with pytest.raises(ValueError, match="do not fit") as caught:
        from_pretrained(write(tmp_path / "meta", params, weights))
    for line in (
        "consolidated.00.pth: layers.0.attention.wo.weight: the file has [32, 31], the model [32, 32]",
        "missing: consolidated.00.pth: layers.1.ffn_norm.weight",
        "unexpected: consolidated.00.pth: extra",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"vision_chunk_size": 448}, "a model of images"),
        ({"quantization_args": {"scheme": "int4"}}, "quantised"),
        ({"moe_args": {"num_experts": 16}}, "a mixture of experts"),
        ({"dim": None}, "it has no 'dim'"),
        ({"multiple_of": 0}, "multiple_of is 0; it must be a whole number above 0"),
        ({"n_heads": 5}, "n_heads is 5, which does not divide dim, 32"),
        ({"n_heads": -4}, "n_heads is -4; it must be a whole number above 0"),
        ({"n_kv_heads": 3}, "n_kv_heads is 3, which does not divide n_heads, 4"),
        ({"norm_eps": "1e-5"}, "norm_eps is '1e-5'; it must be a number above 0"),
        ({"vocab_size": "40"}, "vocab_size is '40'; it must be a whole number"),
    ],
)
def test_params_of_something_else_are_refused(tmp_path, more, why):
    params, _ = generation("llama 3", **more)
    with pytest.raises(ValueError, match=rf"meta/params\.json: .*describes no Llama: .*{why}") as caught:
        read_config(write(tmp_path / "meta", params, meta_weights(PARAMS)))
    assert "fix: take the params.json that was published with" in str(caught.value)


def test_weights_of_meta_fill_a_model_that_is_there(tmp_path):
    params, _ = generation("llama 2")
    folder = write(tmp_path / "meta", params, meta_weights(params))
    model = from_config(folder, dtype="bf16")
    load_pretrained(model, folder)
    assert model.norm.weight.equal(from_pretrained(folder).norm.weight.bfloat16())
