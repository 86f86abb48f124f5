"""GPT-OSS's packed experts: numbers as transformers makes them, read in blocks, and a folder from end to end."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchmask.models import from_config, from_pretrained, save_pretrained
from torchmask.models.mxfp4 import dequantise
from torchmask.models.weight_files import PlainTensor, open_folder

GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 41,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}


def packed(*shape, seed=0, exponents=(0, 255)):
    """Random blocks and scales; the scale 255, which is no number, does not occur."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(*exponents, shape, dtype=torch.uint8, generator=generator)


@pytest.fixture
def folders(tmp_path):
    """A GPT-OSS with packed experts, and the same with the numbers that transformers unpacks from them."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    save_pretrained(from_config(GPT_OSS, seed=1), tmp_path / "plain", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "plain/model.safetensors")
    as_packed = dict(tensors)
    for i, name in enumerate(name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))):
        experts, before, after = tensors[name].shape
        blocks, scales = packed(experts, after, before // 32, seed=i, exponents=(118, 125))
        as_packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        del as_packed[name]
        tensors[name] = mxfp4.convert_moe_packed_tensors(blocks, scales).contiguous()
    assert len(as_packed) == len(tensors) + 4
    save_file(tensors, tmp_path / "plain/model.safetensors")
    (tmp_path / "packed").mkdir()
    save_file(as_packed, tmp_path / "packed/model.safetensors")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    return tmp_path / "plain", tmp_path / "packed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_numbers_are_those_of_transformers_to_the_bit(dtype):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = packed(3, 6, 2)
    blocks[0, 0, 0] = torch.arange(16) * 16 + torch.arange(16).flip(0)  # every number in both places
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    ours = dequantise(blocks, scales).mT.to(dtype)
    assert ours.equal(theirs) and ours.signbit().equal(theirs.signbit())


def test_packed_tensors_are_read_in_blocks_as_if_they_were_plain(tmp_path):
    blocks, scales = packed(3, 6, 2)
    save_file({"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}, tmp_path / "model.safetensors")
    [(name, tensor)] = open_folder(tmp_path).items()
    whole = dequantise(blocks, scales).mT
    assert (name, tensor.shape, tensor.dtype) == ("experts.down_proj", (3, 64, 6), "BF16")
    for index in [
        3 * (slice(None),),
        (slice(1, 3), slice(5, 40), slice(1, 6, 2)),
        (slice(0, 1), slice(64), slice(5, 6)),
    ]:
        assert tensor.read(index).equal(whole[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_experts_become_the_parameters_that_the_plain_ones_do(folders, dtype):
    plain, of_packed = (from_pretrained(folder, dtype=dtype).state_dict() for folder in folders)
    assert all(tensor.equal(of_packed[name]) for name, tensor in plain.items())


def test_packed_experts_are_unpacked_a_few_at_a_time_and_each_once(folders, monkeypatch):
    sizes, read = [], PlainTensor.read

    def counted(self, index):
        block = read(self, index)
        if self.dtype == "U8":
            sizes.append(block.numel())
        return block

    monkeypatch.setattr(PlainTensor, "read", counted)
    monkeypatch.setattr("torchmask.models.weights._MAX_COPY", 1)
    from_pretrained(folders[1])
    held = load_file(folders[1] / "model.safetensors")
    assert sum(sizes) == sum(tensor.numel() for tensor in held.values() if tensor.dtype is torch.uint8)
    assert max(sizes) == 32 * 64 // 2  # one expert's gates, or its way down


def test_exports_are_plain_and_load_in_transformers(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = from_pretrained(folders[1])
    save_pretrained(model, tmp_path / "export")
    assert "quantization_config" not in json.loads((tmp_path / "export/config.json").read_text())
    written, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "export", folders[0]))
    assert written.keys() == plain.keys() and all(written[name].equal(plain[name].float()) for name in plain)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager").eval()
    tokens = torch.randint(0, 41, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(model(tokens)), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
