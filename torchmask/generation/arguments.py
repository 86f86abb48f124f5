"""What `generate` is given, checked before the model runs."""

from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
from torch import Tensor

from torchmask.errors import ConfigError, DataError

TokenIds = Sequence[int] | np.ndarray[tuple[int], np.dtype[np.integer]] | Tensor
"""Token ids of one text: a sequence of integers, or a 1-D array or tensor of them."""


def check_sampling(
    *, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> None:
    """Refuses options of the wrong type or out of their range.

    Raises:
        ConfigError: C03 or C13.
    """
    _check_number("max_new_tokens", max_new_tokens, Integral)
    _check_number("temperature", temperature, Real)
    _check_number("top_k", top_k, Integral, or_null=True)
    _check_number("top_p", top_p, Real, or_null=True)
    _check_number("seed", seed, Integral, or_null=True)
    checks = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (the most probable token) or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more, or null"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1, or null"),
        ("seed", seed, seed is None or seed >= 0, "0 or more, or null"),
    )
    for name, value, is_fine, allowed in checks:
        if not is_fine:
            raise ConfigError("C13", f"{name} is {value}", where=name, fix=f"{name} must be {allowed}")


def check_decoding(*, max_seq_len: int | None, stop_ids: Sequence[int], prefix: str, first_index: int) -> None:
    """Refuses what else `generate` takes, where it is of the wrong type or out of its range.

    Raises:
        ConfigError: C03 or C13.
    """
    _check_number("max_seq_len", max_seq_len, Integral, or_null=True)
    _check_number("first_index", first_index, Integral)
    if first_index < 0:
        raise ConfigError("C13", f"first_index is {first_index}", where="first_index", fix="count from 0")
    if prefix not in ("causal", "bidirectional"):
        raise ConfigError("C03", f"prefix is {prefix!r}", where="prefix", fix="choose causal or bidirectional")
    fix = "give a list of token ids, such as the tokenizer's stop_ids"
    try:
        wrong = [id for id in stop_ids if not _is_number(id, Integral)]
    except TypeError as e:
        raise ConfigError("C03", f"stop_ids is {stop_ids!r}, no sequence", where="stop_ids", fix=fix) from e
    if wrong:
        raise ConfigError("C03", f"{wrong[0]!r} in stop_ids is no token id", where="stop_ids", fix=fix)


def prompts_as_lists(prompts: Sequence[TokenIds], *, first_index: int = 0) -> list[list[int]]:
    """Every prompt as a list of integers.

    Raises:
        ConfigError: C03, something else than token ids.
    """
    fix = "give a list of prompts, each a list of token ids, as the tokenizer's encode returns them"
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__iter__"):
        raise ConfigError("C03", f"prompts is {prompts!r}, no list of prompts", where="prompts", fix=fix)
    lists = []
    for i, prompt in enumerate(prompts):
        ids = prompt.tolist() if isinstance(prompt, Tensor | np.ndarray) else prompt
        is_sequence = isinstance(ids, Sequence) and not isinstance(ids, str | bytes)
        if not is_sequence or not all(_is_number(id, Integral) for id in ids):
            shown = repr(prompt) if len(repr(prompt)) <= 60 else f"{repr(prompt)[:60]}..."
            message = f"prompt {first_index + i + 1} is not a sequence of token ids: {shown}"
            raise ConfigError("C03", message, where="prompts", fix=fix)
        lists.append([int(id) for id in ids])
    return lists


def check_prompts(prompts: Sequence[Sequence[int]], *, first_index: int, limit: int | None, vocab_size: int) -> None:
    """Refuses prompts that cannot be completed.

    Args:
        limit: tokens of prompt and completion together; None = any number.

    Raises:
        DataError: D06, D09 or D15.
    """
    for i, prompt in enumerate(prompts):
        where = f"prompt {first_index + i + 1}"
        if not prompt:
            raise DataError("D06", "the prompt has no tokens", where=where, fix="start it with the BOS token")
        if limit is not None and len(prompt) >= limit:
            message = f"{len(prompt)} tokens leave no room to answer; max_seq_len is {limit}"
            raise DataError("D09", message, where=where, fix="shorten the prompt")
        if max(prompt) >= vocab_size or min(prompt) < 0:
            token = next(token for token in prompt if not 0 <= token < vocab_size)
            message = f"token id {token} is not one of the model's {vocab_size}"
            raise DataError("D15", message, where=where, fix="use the tokenizer that belongs to the model")


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # True is an Integral


def _check_number(name: str, value: object, kind: type, *, or_null: bool = False) -> None:
    if _is_number(value, kind) or (or_null and value is None):
        return
    wanted = ("an integer" if kind is Integral else "a number") + (", or null" if or_null else "")
    raise ConfigError("C03", f"{name} is {value!r}", where=name, fix=f"{name} must be {wanted}")
