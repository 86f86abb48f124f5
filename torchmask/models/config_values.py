"""Values of a config.json as transformers takes them: defaults for absent keys, second names, and what is refused."""

from collections.abc import Iterable, Mapping
from typing import Any

from torchmask.errors import WeightsError
from torchmask.modules.mlp import Activation

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "tanh": "tanh",
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
"""The Hub's names of activations, those that differ in rounding alone under one name of ours."""
WRONG_VALUE = "correct it if the published model has another value; if it has this one, use another model"


def with_defaults(
    config: Mapping[str, Any], defaults: Mapping[str, Any], *, aliases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """All values of a config.json.

    Args:
        config: its content.
        defaults: what absent keys stand for, which also says of what type values are; keys with null stay null.
        aliases: second names of keys, each with the first.

    Raises:
        WeightsError: W05, a value of another type, a size below 1, or null where something is needed.

    >>> with_defaults({"n_layer": 3, "head_dim": None}, {"layers": 2, "head_dim": 64}, aliases={"n_layer": "layers"})
    {'layers': 3, 'head_dim': None, 'n_layer': 3}
    """
    given_as = {name: alias for alias, name in (aliases or {}).items() if alias in config and name not in config}
    values = {**defaults, **{name: config[alias] for name, alias in given_as.items()}, **config}
    for key, default in {**_SIZES, **defaults}.items():
        value = values.get(key, default)
        if default is None or (value is None and key in _MAY_BE_NULL):
            continue
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise refusal(values, given_as.get(key, key), f"{_TYPE_NAMES[type(default)]} is wanted")
    for key in (key for key in (*_SIZES, *defaults) if values.get(key) is not None):
        value = values[key]
        if key in _LEAST and (type(value) is not int or value < _LEAST[key]):
            raise refusal(values, given_as.get(key, key), f"a whole number of at least {_LEAST[key]} is wanted")
        if key in _ABOVE_ZERO and not value > 0:
            raise refusal(values, given_as.get(key, key), "a number above 0 is wanted")
    return values


_SIZES = {"hidden_size": 1, "num_hidden_layers": 1}  # which have no default in most families
_LEAST = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "n_embd", "n_head", "n_positions"), 1),
    **dict.fromkeys(("n_inner", "moe_intermediate_size", "query_pre_attn_scalar"), 1),
    **dict.fromkeys(("sliding_window_pattern", "no_rope_layer_interval", "decoder_sparse_step"), 1),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 0),
}
_ABOVE_ZERO = (
    "rms_norm_eps",
    "layer_norm_epsilon",
    "layer_norm_eps",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logits_scaling",
)
_MAY_BE_NULL = (
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}


def activation_of(config: Mapping[str, Any], key: str) -> Activation:
    """Our name of the activation that a key names.

    Raises:
        WeightsError: W05, one that the decoder does not have.
    """
    if config[key] not in ACTIVATIONS:
        raise refusal(config, key, f"known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config[key]]


def head_dim_of(config: Mapping[str, Any], embed_key: str, heads_key: str) -> int:
    """The embedding's width divided by the number of heads.

    Raises:
        WeightsError: W05, it cannot be divided.
    """
    if config[embed_key] % config[heads_key]:
        raise refusal(config, embed_key, f"it is no multiple of {heads_key}, {config[heads_key]}")
    return int(config[embed_key] // config[heads_key])


def experts_per_token_of(config: Mapping[str, Any], key: str, num_experts_key: str) -> int:
    """How many experts a token goes through.

    Raises:
        WeightsError: W05, more than there are.
    """
    if not 1 <= config[key] <= config[num_experts_key]:
        raise refusal(config, key, f"{num_experts_key} is {config[num_experts_key]}")
    return int(config[key])


def refusal(config: Mapping[str, Any], key: str, why: str) -> WeightsError:
    """A W05 that names key and value."""
    return WeightsError("W05", f"{key} is {config[key]!r}; {why}", where="config.json", fix=WRONG_VALUE)


def shortest_pattern(of_layers: Iterable[bool]) -> tuple[bool, ...]:
    """What repeats over the layers, as `DecoderSpec` has its patterns.

    >>> shortest_pattern([True, False, True, False, True]), shortest_pattern([True, True]), shortest_pattern([])
    ((True, False), (True,), (True,))
    """
    every = tuple(of_layers)
    for size in range(1, len(every)):
        if all(value == every[i % size] for i, value in enumerate(every)):
            return every[:size]
    return every or (True,)
