"""Adapters on a CUDA device: run with `pytest -m gpu`."""

import copy
from pathlib import Path

import pytest
import torch

from torchmask.lora import LoRA
from torchmask.models import adapt, from_config, read_config
from torchmask.modules import linear_cross_entropy
from torchmask.modules.lora import is_adapter

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", ["llama_gqa", "gemma2_usual", "mixtral_top2"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradients_of_adapters_are_those_of_the_cpu(case, compiled):
    config = read_config(Path(__file__).parent / "configs" / f"{case}.json")
    model = from_config({key: value for key, value in config.items() if key != "_note"}, seed=3)
    adapt(model, LoRA(rank=4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_adapter(name):
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    on_gpu = copy.deepcopy(model).cuda()
    if compiled:
        for layer in on_gpu.layers:
            layer.compile()
    model.double()
    tokens = torch.randint(0, model.spec.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    for each, inputs in ((model, tokens), (on_gpu, tokens.cuda())):
        linear_cross_entropy(each(inputs), each.lm_head, inputs.roll(-1, 1)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, p in on_gpu.named_parameters():
        assert (p.grad is not None) == (name in expected), name
        if name in expected:
            torch.testing.assert_close(p.grad.cpu().double(), expected[name], rtol=1e-2, atol=1e-3)
