"""Decoding with a key-value cache: a batch of prompts of any lengths is read once, then grows by a token a step.

Prompts are padded on the left, so that all rows write the same slot and the last slot is everyone's newest token.
Nobody attends to padding (`visible_until` = slot + 1) and positions count from a prompt's own first token, so a row
computes what it would compute alone, to rounding. Paged caches and batches that take in new prompts on the way are left
to serving engines.

Legend: B rows, T slots of the longest prompt, N tokens to generate, V vocab_size.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchmask.errors import DivergedError
from torchmask.generation.arguments import TokenIds, check_decoding, check_prompts, check_sampling, prompts_as_lists
from torchmask.generation.sampling import sample, uniforms_of
from torchmask.modules import Decoder

NEVER_HIDDEN = 2**31 - 1
"""`visible_until` of a token that all later slots may attend to."""

OnToken = Callable[[int, int], bool | None]
"""Called with a prompt's index and its new token; True ends that prompt's completion, the token included."""


# no_grad, not inference_mode: FSDP2 keeps tensors of its first forward pass, and training could not use them afterwards
# ("Inference tensors do not track version counter", torch 2.13). It costs 0.2 ms a step for one row of a model of 1 M
# parameters (1.5 instead of 1.3 ms), nothing that can be measured for 50 rows.
@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[TokenIds],
    *,
    max_new_tokens: int,
    max_seq_len: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_ids: Sequence[int] = (),
    prefix: Literal["causal", "bidirectional"] = "causal",
    first_index: int = 0,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without the prompt and without the stop token that ended it.

    A completion ends before a stop token, after `max_new_tokens`, or where prompt and completion have `max_seq_len`
    tokens; one shorter than `num_new_tokens(...)` was stopped. Greedy or sampled, a prompt's completion does not depend
    on the prompts beside it (to rounding of the logits).

    Args:
        model: in any mode, which it is in again afterwards.
        prompts: token ids, at least one each, BOS included where the model wants one; lists, or 1-D arrays or tensors
            of integers. All are one batch.
        max_seq_len: of prompt and completion together; None = where learned positions end, else nowhere, though few
            models are of use far beyond `model.spec.max_seq_len`.
        temperature: 0 takes the most probable token each time; above 0 sampling divides the logits by it.
        top_k, top_p: see `sample`; they have no effect on the most probable token.
        seed: with a prompt's index it determines the prompt's random numbers; None takes one from the system.
        stop_ids: tokens that end a completion.
        prefix: `bidirectional` = all tokens of a prompt see the whole prompt, for models trained with such packs.
        first_index: the index of the first prompt, where the prompts are a part of a longer list.
        on_token: called for every new token in turn; costs a copy to the host each step.

    Raises:
        ConfigError: an option of the wrong type (C03) or out of its range (C13); prompts that are not token ids (C03).
        DataError: an empty prompt (D06), one that leaves no room in max_seq_len (D09), or ids that the
            model does not have (D15).
        DivergedError: the model's logits are not numbers (R01), at any step of a completion that still runs.
    """
    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    check_decoding(max_seq_len=max_seq_len, stop_ids=stop_ids, prefix=prefix, first_index=first_index)
    prompts = prompts_as_lists(prompts, first_index=first_index)
    limit = _length_limit(model, max_seq_len)
    check_prompts(prompts, first_index=first_index, limit=limit, vocab_size=model.spec.vocab_size)
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    device = model.embed_tokens.weight.device
    room = [num_new_tokens(model, len(prompt), max_new_tokens, max_seq_len) for prompt in prompts]
    budgets = torch.tensor(room, device=device)
    stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.int64, device=device)
    uniforms = None
    if temperature > 0:
        seed = secrets.randbits(64) if seed is None else seed
        draws = [uniforms_of(seed, first_index + i, max(room)) for i in range(len(prompts))]
        uniforms = torch.stack(draws).to(device)  # [B, N]
    choose = partial(_choose, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)

    running = _Running(model, prompts, num_steps=max(room), prefix=prefix)
    num_kept = torch.zeros_like(running.rows)
    finished = torch.zeros_like(running.rows, dtype=torch.bool)
    with _evaluating(model):
        for step in range(max(room)):
            logits = running.logits(step)
            broken = ~(finished | logits.amax(-1).isfinite())  # NaN is the largest of all; -inf is a token left out
            token = choose(logits, running.rows, step)
            finished |= torch.isin(token, stops)
            num_kept[running.rows] += ~finished
            if on_token is not None:
                finished |= _told(on_token, running.rows, token, finished, broken)
            finished |= budgets[running.rows] == step + 1
            running.add(token, step)
            num_running, num_broken = torch.stack(((~finished).sum(), broken.sum())).tolist()  # the host waits once
            if num_broken:
                raise _not_numbers()
            if num_running == 0:
                break
            if num_running <= len(finished) // 2:
                running.keep((~finished).nonzero()[:, 0])
                finished = torch.zeros_like(running.rows, dtype=torch.bool)
    return [row[:length] for row, length in zip(running.new_tokens.tolist(), num_kept.tolist())]


def _choose(uniforms: Tensor | None, logits: Tensor, rows: Tensor, step: int, **options: Any) -> Tensor:
    """[B'] tokens: the most probable ones, or drawn by each prompt's own random numbers ([B, N])."""
    return logits.argmax(-1) if uniforms is None else sample(logits, uniforms[rows, step], **options)


class _Running:
    """The completions that go on: their cache and what the model reads next.

    Attributes:
        rows: [B'] int64, the prompt that each row of the cache belongs to.
        new_tokens: [B, N] int64, of every prompt.
    """

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], *, num_steps: int, prefix: str) -> None:
        self._model, self._prompts, self._num_steps, self._prefix = model, prompts, num_steps, prefix
        device = model.embed_tokens.weight.device
        self.rows = torch.arange(len(prompts), device=device)
        self.new_tokens = self.rows.new_zeros(len(prompts), num_steps)
        self._read(prompts, left=num_steps)
        self._last_position = model.spec.max_seq_len - 1 if model.spec.learned_positions else NEVER_HIDDEN
        after = model.spec.rope_switches_after
        self._switches = {length + 1 - len(prompt) for length in after for prompt in prompts}

    def _read(self, texts: Sequence[Sequence[int]], *, left: int) -> None:
        """Begins a cache that has room for `left` more tokens; the last of them is not read again."""
        device = self.rows.device
        self._tokens, self._positions, self._visible_until = left_padded(texts, device)
        self._cache = self._model.new_cache(len(texts), self._tokens.shape[1] + left - 1)
        self._visible_from = None
        if self._prefix == "bidirectional":
            lengths = torch.tensor([[len(self._prompts[row])] for row in self.rows.tolist()], device=device)
            slots = torch.arange(self._tokens.shape[1], device=device)
            starts = len(slots) - torch.tensor([[len(text)] for text in texts], device=device)
            in_prompt = (slots >= starts) & (slots < starts + lengths)
            self._visible_from = torch.where(in_prompt, starts, slots)

    def logits(self, step: int) -> Tensor:
        """[B', V] of the next tokens."""
        if step > 0 and step in self._switches:  # a text is long now, so all its tokens rotate by other frequencies
            new = self.new_tokens[self.rows, :step].tolist()
            texts = [[*self._prompts[row], *tokens] for row, tokens in zip(self.rows.tolist(), new)]
            self._read(texts, left=self._num_steps - step)
        hidden = self._model(self._tokens, self._positions, self._visible_until, self._visible_from, cache=self._cache)
        logits: Tensor = self._model.lm_head(hidden[:, -1])
        return logits

    def add(self, token: Tensor, step: int) -> None:
        """Appends the [B'] new tokens of a step."""
        self.new_tokens[self.rows, step] = token
        # A row that has ended may be carried along beyond the last learned position; nobody reads what it says there.
        self._tokens, self._positions = token[:, None], (self._positions[:, -1:] + 1).clamp(max=self._last_position)
        self._visible_until = self._visible_from = None

    def keep(self, chosen: Tensor) -> None:
        """Drops all rows but these, [B''] int64."""
        self.rows, self._tokens, self._positions = self.rows[chosen], self._tokens[chosen], self._positions[chosen]
        self._cache.keep_rows(chosen)


def num_new_tokens(model: Decoder, prompt_length: int, max_new_tokens: int, max_seq_len: int | None = None) -> int:
    """How many tokens can follow a prompt: `max_new_tokens`, or fewer where `max_seq_len` ends before."""
    limit = _length_limit(model, max_seq_len)
    return max_new_tokens if limit is None else min(max_new_tokens, limit - prompt_length)


def _length_limit(model: Decoder, max_seq_len: int | None) -> int | None:
    learned = model.spec.max_seq_len if model.spec.learned_positions else None
    limits = [limit for limit in (learned, max_seq_len) if limit is not None]
    return min(limits) if limits else None


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """`tokens`, `positions` and `visible_until` (None where nothing is padded) of prompts that end in the same slot.

    >>> tokens, positions, visible_until = left_padded([[7, 8, 9], [5]], torch.device("cpu"))
    >>> tokens.tolist(), positions.tolist()
    ([[7, 8, 9], [0, 0, 5]], [[0, 1, 2], [0, 0, 0]])
    >>> visible_until[1].tolist() == [1, 2, NEVER_HIDDEN]
    True
    """
    longest = max(len(prompt) for prompt in prompts)
    num_pads = torch.tensor([[longest - len(prompt)] for prompt in prompts])  # [B, 1]
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    slots = torch.arange(longest)
    positions = (slots - num_pads).clamp(min=0)
    visible_until = torch.where(slots < num_pads, slots + 1, NEVER_HIDDEN)
    if not num_pads.any():
        return tokens.to(device), positions.to(device), None
    return tokens.to(device), positions.to(device), visible_until.to(device)


def _told(on_token: OnToken, rows: Tensor, token: Tensor, finished: Tensor, broken: Tensor) -> Tensor:
    """[B'] bool: which rows the callback has ended, told of those that still ran; R01 if one of these is broken."""
    states = torch.stack((rows, token, finished, broken), dim=1).tolist()
    if any(is_broken for *_, is_broken in states):
        raise _not_numbers()
    ended = [not is_finished and bool(on_token(row, new)) for row, new, is_finished, _ in states]
    return torch.tensor(ended, device=finished.device)


def _not_numbers() -> DivergedError:
    return DivergedError("R01", "the model's logits are not numbers", fix="check the checkpoint's weights")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
