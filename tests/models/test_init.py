"""Random weights of every kind of parameter."""

import torch

from torchmask.models import from_config


def test_norms_begin_as_the_identity_and_biases_and_sinks_at_zero():
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    gemma = from_config({"model_type": "gemma2", **sizes, **heads})
    oss = from_config({"model_type": "gpt_oss", **sizes, **heads, **experts})
    bloom = from_config({"model_type": "bloom", "vocab_size": 31, "hidden_size": 32, "n_layer": 2, "n_head": 4})
    x = torch.tensor([3.0, -3.0] * 16)
    for model in (gemma, oss, bloom):
        torch.testing.assert_close(model.layers[1].attn_norm(x), x / 3)
        vectors = [p for n, p in model.named_parameters() if n.endswith(("bias", "sinks"))]
        assert all(not p.any() for p in vectors)
        matrices = [p for n, p in model.named_parameters() if "proj" in n and p.ndim >= 2 and not n.endswith("bias")]
        assert all(0.01 < p.std() < 0.03 for p in matrices)
    assert any(n.endswith("sinks") for n, _ in oss.named_parameters())
