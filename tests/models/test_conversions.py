"""Names and layouts of a checkpoint's tensors, into whole parameters and back, against plain torch code for each."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torchmask.models.conversions import Split, StackExperts, hub_shapes, hub_tensors, kv_heads, make_layout
from torchmask.models.weight_files import PlainTensor, open_folder
from torchmask.models.weights import load_weights

SPEC = SimpleNamespace(num_kv_heads=3, width=4)


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def renamed(fused):
    return {"hub.one": fused}, {"one": fused}, (Split("hub.one", ("one",)),)


def side_by_side(fused):
    q, k, v = fused.split((6, 3, 3))
    return {"hub.qkv": fused}, {"q": q, "k": k, "v": v}, (Split("hub.qkv", ("q", "k", "v")),)


def in_layers():
    hub = {f"h.{i}.w": randn(4 + i, 3) for i in (0, 11)}
    ours = {"layers.0.w.a": hub["h.0.w"][:2], "layers.0.w.b": hub["h.0.w"][2:]}
    ours |= {"layers.11.w.a": hub["h.11.w"][:5], "layers.11.w.b": hub["h.11.w"][5:]}
    return hub, ours, (Split("h.{}.w", ("layers.{}.w.a", "layers.{}.w.b")),)


def grouped_heads(fused):
    """Falcon 40B: 3 kv heads of 2 queries, a key and a value each; heads of 2."""
    heads = fused.view(3, 4, 2, *fused.shape[1:])
    ours = {"q": heads[:, :2].flatten(0, 2), "k": heads[:, 2].flatten(0, 1), "v": heads[:, 3].flatten(0, 1)}
    return {"hub.qkv": fused}, ours, (Split("hub.qkv", ("q", "k", "v"), groups=kv_heads),)


def interleaved_heads(fused):
    """Bloom and GPT-NeoX: query, key and value of each of 3 heads."""
    heads = fused.view(3, 3, -1, *fused.shape[1:])
    ours = {name: heads[:, i].flatten(0, 1) for i, name in enumerate("qkv")}
    return {"hub.qkv": fused}, ours, (Split("hub.qkv", ("q", "k", "v"), groups=kv_heads),)


def one_key(fused):
    """Falcon 7B: 4 queries, then one key and one value; heads of 3."""
    ours = {"q": fused[:12], "k": fused[12:15], "v": fused[15:]}
    return {"hub.qkv": fused}, ours, (Split("hub.qkv", ("q", "k", "v"), groups=lambda spec: 1),)


def transposed_and_split(fused):
    """GPT-2's c_attn, [in, out]."""
    ours = dict(zip("qkv", fused.T.chunk(3)))
    return {"hub.qkv": fused}, ours, (Split("hub.qkv", ("q", "k", "v"), transposed=True),)


def stacked():
    """A matrix an expert; w1 and w3 in two tensors, down in one."""
    hub = {f"h.0.experts.{e}.{w}": randn(*shape) + e for e in range(5) for w, shape in SHAPES.items()}
    ours = {
        f"layers.0.experts.{name}": torch.stack([hub[f"h.0.experts.{e}.{w}"] for e in range(5)])
        for name, w in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    }
    table = [StackExperts(f"h.{{}}.experts.{{expert}}.{w}", (f"layers.{{}}.experts.{n}",)) for n, w in NAMES]
    return hub, ours, tuple(table)


SHAPES = {"w1": (4, 3), "w2": (3, 4), "w3": (4, 3)}
NAMES = (("gate", "w1"), ("down", "w2"), ("up", "w3"))


def stacked_and_split():
    hub = {f"experts.{e}.gate_up": randn(8, 3) + e for e in range(3)}
    both = torch.stack(list(hub.values()))
    return hub, {"gate": both[:, :4], "up": both[:, 4:]}, (StackExperts("experts.{expert}.gate_up", ("gate", "up")),)


def row_by_row(fused):
    """GPT-OSS: [E, D, 2 F], gate and up by turns, against our [E, F, D]; biases [E, 2 F]."""
    whole = fused.mT if fused.ndim == 3 else fused
    ours = {"gate": whole[:, 0::2], "up": whole[:, 1::2]}
    by_turns = Split("hub", ("gate", "up"), groups=lambda spec: spec.width, dim=1, transposed=fused.ndim == 3)
    return {"hub": fused}, ours, (by_turns,)


CASES = {
    "renamed": renamed(randn(7, 5)),
    "side by side": side_by_side(randn(12, 5)),
    "in layers": in_layers(),
    "grouped heads": grouped_heads(randn(24, 5)),
    "grouped heads' biases": grouped_heads(randn(24)),
    "interleaved heads": interleaved_heads(randn(45, 4)),
    "interleaved heads of one row": interleaved_heads(randn(9, 4)),
    "interleaved heads' biases": interleaved_heads(randn(45)),
    "one key": one_key(randn(18, 4)),
    "transposed": ({"w": randn(3, 7)}, {"o": randn(3, 7).T}, (Split("w", ("o",), transposed=True),)),
    "transposed and split": transposed_and_split(randn(5, 21)),
    "stacked": stacked(),
    "stacked and split": stacked_and_split(),
    "row by row, transposed": row_by_row(randn(5, 6, 8)),
    "row by row": row_by_row(randn(5, 8)),
}


class Bag(nn.Module):
    """Parameters by their dotted names."""

    def __init__(self, shapes, dtype=torch.float32):
        super().__init__()
        for name, shape in shapes.items():
            module, *path = self, *name.split(".")
            for part in path[:-1]:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(path[-1], nn.Parameter(torch.full(shape, torch.nan, dtype=dtype)))


def layout_of(ours, table):
    return make_layout(table, {name: tuple(tensor.shape) for name, tensor in ours.items()}, SPEC)


def load(model, folder, table, **more):
    load_weights(model, open_folder(folder), layout_of(dict(model.named_parameters()), table), where="here", **more)
    return dict(model.named_parameters())


@pytest.mark.parametrize("case", CASES)
def test_tensors_arrive_where_plain_code_puts_them(case, tmp_path):
    hub, ours, table = CASES[case]
    save_file({name: tensor.contiguous() for name, tensor in hub.items()}, tmp_path / "model.safetensors")
    loaded = load(Bag({name: tensor.shape for name, tensor in ours.items()}), tmp_path, table)
    for name, tensor in ours.items():
        assert loaded[name].equal(tensor), name


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_gives_the_very_tensors(case):
    hub, ours, table = CASES[case]
    layout = layout_of(ours, table)
    back = dict(hub_tensors(layout, ours))
    assert back.keys() == hub.keys()
    assert hub_shapes(layout) == {name: tuple(tensor.shape) for name, tensor in hub.items()}
    for name, tensor in hub.items():
        assert back[name].equal(tensor), name


@pytest.mark.parametrize("case", CASES)
def test_no_more_is_read_than_the_parameters_hold_and_a_bounded_part_at_a_time(case, tmp_path, monkeypatch):
    hub, ours, table = CASES[case]
    save_file({name: tensor.contiguous() for name, tensor in hub.items()}, tmp_path / "model.safetensors")
    sizes, read = [], PlainTensor.read

    def counted(self, index):
        block = read(self, index)
        sizes.append(block.numel())
        return block

    monkeypatch.setattr(PlainTensor, "read", counted)
    monkeypatch.setattr("torchmask.models.weights._MAX_COPY", 10)
    loaded = load(Bag({name: tensor.shape for name, tensor in ours.items()}), tmp_path, table)
    assert sum(sizes) == sum(tensor.numel() for tensor in ours.values())
    assert max(sizes) <= max(10, *(tensor[0].numel() for tensor in ours.values()))
    assert all(loaded[name].equal(tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_files_of_any_float_become_the_parameters_dtype(dtype, stored, tmp_path):
    fused = randn(12, 5).to(stored)
    save_file({"hub.qkv": fused}, tmp_path / "model.safetensors")
    table = side_by_side(fused)[2]
    loaded = load(Bag({"q": (6, 5), "k": (3, 5), "v": (3, 5)}, dtype), tmp_path, table)
    assert torch.cat([loaded[name] for name in "qkv"]).equal(fused.to(dtype))


def test_exports_may_have_another_dtype():
    hub, ours, table = CASES["grouped heads"]
    [(_, fused)] = hub_tensors(layout_of(ours, table), ours, dtype=torch.bfloat16)
    assert fused.equal(hub["hub.qkv"].bfloat16())


def test_what_does_not_fit_is_told_by_the_files_names(tmp_path):
    save_file(
        {"hub.qkv": randn(13, 5), "h.0.experts.0.w1": randn(4, 3), "extra.bias": randn(1)},
        tmp_path / "model.safetensors",
    )
    ours = {"q": (6, 5), "k": (3, 5), "v": (3, 5), "layers.0.experts.gate": (2, 4, 3), "unheard_of": (1,)}
    table = (Split("hub.qkv", ("q", "k", "v")), StackExperts("h.{}.experts.{expert}.w1", ("layers.{}.experts.gate",)))
    with pytest.raises(ValueError, match="4 tensors do not fit") as caught:
        load(Bag(ours), tmp_path, table)
    for line in (
        "hub.qkv: the file has [13, 5], the model [12, 5]",
        "missing: h.0.experts.1.w1",
        "missing: unheard_of",
        "unexpected: extra.bias",
    ):
        assert f"    {line}\n" in str(caught.value)


def test_derived_buffers_are_skipped(tmp_path):
    tensors = {"h.0.w": randn(4, 3), "h.0.attn.masked_bias": randn(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    model = Bag({"layers.0.w": (4, 3)})
    loaded = load(model, tmp_path, (Split("h.{}.w", ("layers.{}.w",)),), derived=("attn.bias", "attn.masked_bias"))
    assert loaded["layers.0.w"].equal(randn(4, 3))


def test_a_parameter_on_several_files_is_put_together(tmp_path):
    hub, ours, table = CASES["stacked"]
    from torchmask.models.weights import save_weights

    assert len(save_weights(tmp_path, hub.items(), max_shard_bytes=200)) > 2
    loaded = load(Bag({name: tensor.shape for name, tensor in ours.items()}), tmp_path, table)
    assert all(loaded[name].equal(tensor) for name, tensor in ours.items())
