"""What Ministral 3 has of its own, and how it is told of; its numbers are compared in `test_families`."""

import dataclasses

import pytest
import torch

from torchmask.errors import WeightsError
from torchmask.models import from_config, read_config
from torchmask.models.ministral3 import spec_from_config

CONFIG = {"model_type": "ministral3", "vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
CONFIG = {**CONFIG, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}


@torch.no_grad()
def test_queries_grow_from_the_first_length_on_and_not_before():
    growing, plain = (
        from_config({**CONFIG, "rope_parameters": {**ROPE, "llama_4_scaling_beta": beta}}) for beta in (2.0, 0.0)
    )
    for model in (growing, plain):
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    tokens = torch.arange(20)[None]
    differ = (growing(tokens) != plain(tokens)).any(-1)[0]
    assert not differ[:8].any()
    assert differ[8:].all()


def test_without_a_growth_there_is_none_and_without_rope_parameters_that_of_the_published_models():
    assert spec_from_config({**CONFIG, "rope_parameters": ROPE}).query_growth == 0
    published = spec_from_config(CONFIG)
    assert (published.query_growth, published.query_growth_length) == (0.1, 16_384)


def test_the_old_spelling_is_read_too():
    table = {**ROPE, "llama_4_scaling_beta": 0.3}
    old = {**CONFIG, "rope_theta": table.pop("rope_theta"), "rope_scaling": table}
    assert spec_from_config(old) == spec_from_config({**CONFIG, "rope_parameters": {**table, "rope_theta": 1e4}})


def test_a_growth_that_is_no_number_is_refused_with_its_key():
    with pytest.raises(WeightsError, match="llama_4_scaling_beta") as refused:
        from_config({**CONFIG, "rope_parameters": {**ROPE, "llama_4_scaling_beta": "much"}})
    assert refused.value.id == "W05"


def test_queries_that_do_not_rotate_as_a_whole_cannot_grow():
    spec = spec_from_config(CONFIG)
    for change in ({"rope_dim": 4}, {"rope_pattern": (False,)}, {"query_growth_length": None}):
        with pytest.raises(ValueError, match="query_growth"):
            dataclasses.replace(spec, **change)


def test_the_published_folder_with_its_image_encoder_is_told_which_model_of_text_is_known():
    published = {"model_type": "mistral3", "text_config": {**CONFIG}, "vision_config": {}}
    with pytest.raises(WeightsError, match="its text part alone, saved as a 'ministral3', is within it"):
        from_config(read_config(published))
