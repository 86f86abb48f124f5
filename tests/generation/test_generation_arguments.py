"""What `generate` may be given: other types and values are refused by the argument's name, a prompt by its number."""

import numpy as np
import pytest
import torch

from torchmask.errors import ConfigError, DataError
from torchmask.generation import generate
from torchmask.models import from_config


@pytest.fixture(scope="module")
def model():
    config = {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 256}
    return from_config({**config, "initializer_range": 0.4}, dtype=torch.float64, seed=3)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"max_new_tokens": -1},
        {"first_index": -1},
    ],
)
def test_options_out_of_range_are_refused_by_name(model, options):
    (name,) = options
    with pytest.raises(ConfigError, match=name) as caught:
        generate(model, [[5]], **{"max_new_tokens": 5, **options})
    assert caught.value.id == "C13"


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "1"},
        {"temperature": None},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_p": "0.5"},
        {"seed": 1.5},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": None},
        {"max_seq_len": 9.0},
        {"first_index": 0.5},
        {"prefix": "both"},
        {"stop_ids": [None]},
        {"stop_ids": 5},
        {"stop_ids": ["</s>"]},
        {"prompts": [1, 2]},
        {"prompts": "text"},
        {"prompts": ["text"]},
        {"prompts": [[1, 2.0]]},
        {"prompts": [[True]]},
        {"prompts": [torch.tensor([1.0])]},
        {"prompts": [torch.tensor([[1, 2]])]},
        {"prompts": 5},
    ],
    ids=str,
)
def test_arguments_of_the_wrong_type_are_refused_by_name(model, options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"^{name}: ") as caught:
        generate(model, **{"prompts": [[5]], "max_new_tokens": 5, "temperature": 1.0, **options})
    assert caught.value.id == "C03"


def test_arrays_and_tensors_of_integers_are_prompts(model):
    expected = generate(model, [[5, 9], [5, 9]], max_new_tokens=5)
    for prompts in ([torch.tensor([5, 9]), np.array([5, 9], dtype=np.int32)], torch.tensor([[5, 9], [5, 9]])):
        assert generate(model, prompts, max_new_tokens=np.int64(5)) == expected
    assert generate(model, [[np.int32(5), 9], (5, 9)], max_new_tokens=5) == expected
    assert generate(model, torch.zeros(0, 3, dtype=torch.int64), max_new_tokens=5) == []


@pytest.mark.parametrize(
    ("prompt", "id", "message"),
    [([], "D06", "no tokens"), ([5, 97], "D15", "97 .* 97")],
)
def test_prompts_that_cannot_be_completed_are_refused_by_number(model, prompt, id, message):
    with pytest.raises(DataError, match=message) as caught:
        generate(model, [[5], prompt], max_new_tokens=5)
    assert caught.value.id == id and caught.value.where == "prompt 2"
