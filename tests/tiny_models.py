"""Tiny random models: of every family, from the configurations that the tests of families use, and one Llama."""

from pathlib import Path

import torch

from torchmask.lora import LoRA
from torchmask.models import adapt, from_config, from_pretrained, read_config, save_pretrained
from torchmask.modules import linear_cross_entropy
from torchmask.modules.lora import is_adapter

CONFIGS = Path(__file__).parent / "models" / "configs"
TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
"""A config.json for tests of what is not the model's business: its files, names and folders."""


def tiny(case, dtype=torch.float32):
    config = read_config(CONFIGS / f"{case}.json")
    config.pop("_note", None)
    model = from_config(config, dtype=dtype, seed=3)
    shake(model, 0.1, seed=7)
    return model


@torch.no_grad()
def shake(model, size, *, seed, only=lambda name: True):
    """Adds noise to parameters, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if only(name):
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * size)


def adapted(case, lora=None, dtype=torch.float32):
    model = tiny(case, dtype)
    adapt(model, lora or LoRA(rank=3, alpha=5.0))
    shake(model, 0.1, seed=8, only=is_adapter)
    return model


def tokens_of(model, *shape, seed=5):
    return torch.randint(0, model.spec.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens, *layout):
    with torch.no_grad():
        return model.lm_head(model(tokens, *layout))


def reload(model, folder):
    save_pretrained(model, folder)
    return from_pretrained(folder, dtype=model.norm.weight.dtype)


def loss_of(model, tokens, labels, *layout):
    return linear_cross_entropy(model(tokens, *layout), model.lm_head, labels)
