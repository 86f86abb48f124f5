from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from torchmask.modules import Decoder, DecoderSpec, MoESpec
from torchmask.training.muon import MuonAdamW
from torchmask.training.optim import build_optimizer

SPEC = DecoderSpec(
    vocab_size=13,
    embed_dim=8,
    intermediate_dim=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_seq_len=16,
)


def decoder():
    torch.manual_seed(0)
    return Decoder(SPEC)


def backward(model):
    tokens = torch.arange(12)[None]
    logits = model.lm_head(model(tokens))
    nn.functional.cross_entropy(logits[0], (tokens[0] * 5) % 13).backward()


def test_matrices_of_the_layers_take_torchs_muon_and_all_else_takes_torchs_adamw():
    ours, reference = decoder(), decoder()
    optimizer = build_optimizer(ours, partial(MuonAdamW, lr=1e-2, weight_decay=0.1))
    layers = [p for name, p in reference.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    vocabulary = [reference.embed_tokens.weight, reference.lm_head.weight]
    norms = [p for p in reference.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(layers, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": vocabulary}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    for _ in range(3):
        backward(ours)
        backward(reference)
        for each in (optimizer, muon, adamw):
            each.step()
            each.zero_grad()
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_the_schedule_reaches_both_parts():
    optimizer = build_optimizer(decoder(), partial(MuonAdamW, lr=1e-2))
    optimizer.set_lr(0.5)
    assert [group["lr"] for part in optimizer.inner.parts for group in part.param_groups] == [5e-3] * 3


def test_a_tied_head_is_adamws():
    model = Decoder(SPEC.__class__(**{**SPEC.__dict__, "tie_embeddings": True}))
    optimizer = build_optimizer(model, partial(MuonAdamW, lr=1e-2))
    (muon, adamw) = optimizer.inner.parts
    in_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    assert id(model.embed_tokens.weight) not in in_muon
    assert len(in_muon) == 2 * 7
    assert any(p is model.embed_tokens.weight for group in adamw.param_groups for p in group["params"])


def test_a_model_without_hidden_matrices_is_adamws_alone():
    optimizer = build_optimizer(nn.Embedding(5, 4), partial(MuonAdamW, lr=1e-2))
    assert [type(part) for part in optimizer.inner.parts] == [torch.optim.AdamW]


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"momentum": -0.1}])
def test_settings_out_of_range_are_configuration_errors(options):
    from torchmask.errors import ConfigError

    with pytest.raises(ConfigError):
        build_optimizer(decoder(), partial(MuonAdamW, **options))


def test_experts_are_adamws_and_their_router_is_muons():
    spec = replace(SPEC, moe=MoESpec(num_experts=4, experts_per_token=2, expert_dim=8, bias=True))
    torch.manual_seed(0)
    model = Decoder(spec)
    for name, p in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(p, std=0.1)
    optimizer = build_optimizer(model, partial(MuonAdamW, lr=1e-2))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["role"]: {names[id(p)] for p in g["params"]} for g in optimizer.inner.param_groups}
    assert groups["experts"] == {
        name for name in names.values() if name.endswith(("gate_proj", "up_proj", "down_proj"))
    }
    routers = {name for name in groups["hidden"] if "mlp" in name}
    assert routers == {"layers.0.mlp.router.weight", "layers.1.mlp.router.weight"}
    assert any(name.endswith("_bias") for name in groups["vector"])
    before = model.layers[0].mlp.experts.up_proj.clone()
    backward(model)
    optimizer.step()
    assert not torch.equal(before, model.layers[0].mlp.experts.up_proj)
