"""Optimizers over bf16 or fp32 parameters, with a state that is a flat table of tensors.

A bf16 weight has 8 significant bits: adding 1e-3 of its size to it changes nothing, so plain bf16 training silently
loses small updates. Two ways out are offered. `master_weights` (the default) keeps an fp32 copy that is updated and
rounded to bf16 after each step: as good as fp32 training, 4 bytes more a parameter. `stochastic_rounding` keeps no
copy: the bf16 weight is widened, updated in fp32 and rounded up or down at random, right on average. Moments are fp32
in both. Parameters that are fp32 already are updated in place.

Any torch optimizer does the arithmetic; `Optimizer` only decides what it sees. That is chosen over an AdamW of our own
because fused kernels and DTensors (FSDP2) come for free.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchmask.errors import ConfigError, WeightsError

_MAX_WIDENED_ELEMENTS = 2**27  # fp32 gradients of one chunk at a time: 0.5 GiB, where all of an 8B model's are 30


@dataclass(eq=False)
class Entry:
    """A trained parameter and the tensor that the torch optimizer updates for it."""

    name: str
    param: nn.Parameter
    work: nn.Parameter  # the parameter itself if it is fp32 or wider, else an fp32 tensor of its shape
    keeps_master: bool  # whether `work` outlives the step
    num_updates: int = 0

    @property
    def is_widened(self) -> bool:
        """Whether the torch optimizer updates an fp32 counterpart instead of the parameter."""
        return self.work is not self.param


def _plain_tensors(name: str, value: Tensor) -> dict[str, Tensor]:
    """The state under its name; a quantised one (torchao's 8 bits) as the plain tensors it is made of, live too."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if not is_traceable_wrapper_subclass(local):
        return {name: value}
    if isinstance(value, DTensor):
        raise ConfigError(
            "C09",
            f"{type(local).__name__} states of sharded parameters cannot be saved",
            where="optimizer",
            fix="use torch.optim.AdamW, or one process",
        )
    parts, _ = local.__tensor_flatten__()
    return {f"{name}.{part}": getattr(local, part) for part in parts}


class Optimizer:
    """A torch optimizer over the fp32 counterparts of a model's parameters; made by `build_optimizer`.

    `step` reads `param.grad` and writes `param`, as a torch optimizer does. `set_lr` takes the schedule's factor.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        entries: list[Entry],
        *,
        seed: int = 0,
        max_widened_elements: int = _MAX_WIDENED_ELEMENTS,
    ) -> None:
        self.inner = inner
        self._entries = entries
        self._seed = seed
        self._chunks = list(_chunked(entries, max_widened_elements))
        for entry in entries:
            if entry.is_widened and not entry.keeps_master:
                _release(entry.work)
        self._base_lrs = [float(group["lr"]) for group in inner.param_groups]
        # Adagrad and its like allocate their state when they are made, the others in their first step.
        self._state_is_lazy = not inner.state

    @property
    def lr(self) -> float:
        """The learning rate of the next step (that of the first group)."""
        return float(self.inner.param_groups[0]["lr"])

    def set_lr(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times what the configuration says."""
        for group, base_lr in zip(self.inner.param_groups, self._base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(factor * base_lr)  # a captured graph reads the tensor, so it must stay the same one
            else:
                group["lr"] = factor * base_lr

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for entry in self._entries:
            entry.param.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient; gradients stay until `zero_grad`."""
        grads = {entry.name: entry.param.grad for entry in self._entries if entry.param.grad is not None}
        for entry in self._entries:
            entry.work.grad = None  # the torch optimizer sees one chunk's gradients at a time
        for chunk in self._chunks:
            active = [entry for entry in chunk if entry.name in grads]
            for entry in active:
                self._open(entry)
                entry.work.grad = grads[entry.name].to(entry.work.dtype)
            if active:
                self.inner.step()
            for entry in active:
                entry.work.grad = None
                self._close(entry)
                entry.num_updates += 1
        for entry in self._entries:
            entry.param.grad = grads.get(entry.name)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """All state as `{"{parameter}.{quantity}": tensor}`; DTensors where the parameters are.

        The keys are complete before the first step too, with zeros in place of moments, so a new optimizer's table is
        the template for loading a checkpoint. The moments and masters are the live tensors, not copies: a
        checkpointer may read into them, but `load_state_dict` must then be called with the table to make them count.

        `num_updates` counts a parameter's updates; at 0 its other tensors mean nothing yet.
        """
        for entry in self._entries:
            if entry.keeps_master and entry.num_updates == 0:  # weights may have been loaded since it was made
                entry.work.copy_(entry.param)
        return self._table()

    def _table(self) -> dict[str, Tensor]:
        self._allocate([e for e in self._entries if e.num_updates == 0 and not self.inner.state.get(e.work)])
        table: dict[str, Tensor] = {}
        for entry in self._entries:
            table[f"{entry.name}.num_updates"] = torch.tensor(entry.num_updates, dtype=torch.int64)
            if entry.keeps_master:
                table[f"{entry.name}.master"] = entry.work.detach()
            for quantity, value in self.inner.state.get(entry.work, {}).items():
                if not isinstance(value, Tensor):
                    raise ConfigError(
                        "C09",
                        f"{type(self.inner).__name__} keeps {quantity!r} as {type(value).__name__}, not as a tensor: "
                        "it cannot be saved",
                        where="optimizer",
                        fix="use an optimizer whose state is tensors, such as torch.optim.AdamW",
                    )
                table |= _plain_tensors(f"{entry.name}.{quantity}", value)
        return table

    @torch.no_grad()
    def load_state_dict(self, table: Mapping[str, Tensor]) -> None:
        """Take over a table made by `state_dict` of an optimizer over the same parameters; values are copied.

        Load the model's own weights as well: only the masters are in the table.

        Raises:
            WeightsError: W05 when keys are missing, unexpected or of another shape; nothing is changed then.
        """
        own = self._table()  # not state_dict: masters may have been read in place and must stay
        _check_same_keys(own, table)
        for key, value in own.items():
            if value is not table[key]:
                value.copy_(table[key])
        for entry in self._entries:
            entry.num_updates = int(table[f"{entry.name}.num_updates"])

    def describe(self) -> str:
        """One line for people: `AdamW (fused), lr 0.0003, weight decay 0.1 on 2 of 3 tensors, fp32 master weights`."""
        groups = self.inner.param_groups
        fused = " (fused)" if groups[0].get("fused") else ""
        parts = [f"{type(self.inner).__name__}{fused}, lr {self._base_lrs[0]:g}"]
        decayed = [group for group in groups if group.get("weight_decay")]
        if decayed:
            num_decayed = sum(len(group["params"]) for group in decayed)
            parts.append(
                f"weight decay {decayed[0]['weight_decay']:g} on {num_decayed} of {len(self._entries)} tensors"
            )
        if any(entry.keeps_master for entry in self._entries):
            parts.append("fp32 master weights")
        if any(entry.is_widened and not entry.keeps_master for entry in self._entries):
            parts.append("bf16 stochastic rounding")
        return ", ".join(parts)

    def _open(self, entry: Entry) -> None:
        if entry.num_updates == 0 and self._state_is_lazy:
            self.inner.state.pop(entry.work, None)  # zeros of a template; the optimizer makes its own beginning
        if not entry.is_widened:
            return
        if not entry.keeps_master:
            _materialise(entry.work)
        if not entry.keeps_master or entry.num_updates == 0:  # weights may have been loaded since the master was made
            entry.work.copy_(entry.param)

    def _close(self, entry: Entry) -> None:
        if not entry.is_widened:
            return
        if entry.keeps_master:
            entry.param.copy_(entry.work)
            return
        local_param, local_work = _local(entry.param), _local(entry.work)
        generator = torch.Generator(device=local_param.device).manual_seed(self._noise_seed(entry))
        local_param.copy_(round_stochastically(local_work, generator=generator))
        _release(entry.work)

    def _noise_seed(self, entry: Entry) -> int:
        # Of (seed, parameter, update, shard) and not from torch's stream, so that it needs no saving, ranks that hold
        # the same shard round alike (else replicas drift apart), and dropout's numbers do not depend on this choice.
        shard: tuple[int, ...] = ()
        if isinstance(entry.param, DTensor):
            coordinate = entry.param.device_mesh.get_coordinate() or ()
            shard = tuple(i for i, placement in zip(coordinate, entry.param.placements) if placement.is_shard())
        text = repr((self._seed, entry.name, entry.num_updates, shard))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

    def _allocate(self, entries: list[Entry]) -> None:
        """Make the torch optimizer allocate the state of `entries`, and leave all else as it was."""
        grads = [entry.param.grad for entry in self._entries]
        for entry in self._entries:
            entry.work.grad = None
        for entry in entries:  # one at a time: a copy of every parameter at once might not fit
            if entry.is_widened and not entry.keeps_master:
                _materialise(entry.work)
            before = entry.work.detach().clone()
            entry.work.grad = torch.zeros_like(entry.work)
            self.inner.step()
            entry.work.grad = None
            entry.work.copy_(before)
            for value in self.inner.state.get(entry.work, {}).values():
                if isinstance(value, Tensor) and not is_traceable_wrapper_subclass(_local(value)):
                    value.zero_()  # a quantised state is zero after a step with zero gradients, and knows no zero_
            if entry.is_widened and not entry.keeps_master:
                _release(entry.work)
        for entry, grad in zip(self._entries, grads, strict=True):
            entry.param.grad = grad


def round_stochastically(values: Tensor, *, generator: torch.Generator) -> Tensor:
    """Rounds fp32 to bf16, up or down with the odds of the distance, so that the mean is `values`.

    bf16 is the upper half of fp32: adding 16 random bits below it and cutting them off is exactly that. The magnitude
    is rounded, so the sign does not matter. Infinities and NaN stay what they are.

    Args:
        values: any shape, float32.
        generator: on the device of `values`.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = (values.view(torch.int32) + noise) & -(1 << 16)
    rounded = torch.where(torch.isfinite(values), bits.view(torch.float32), values)
    return rounded.to(torch.bfloat16)  # exact: the lower half is zero


def _chunked(entries: list[Entry], max_widened_elements: int) -> Iterator[list[Entry]]:
    chunk: list[Entry] = []
    num_widened = 0
    for entry in entries:
        size = _local(entry.work).numel() if entry.is_widened else 0
        if chunk and num_widened + size > max_widened_elements:
            yield chunk
            chunk, num_widened = [], 0
        chunk.append(entry)
        num_widened += size
    yield chunk


def _check_same_keys(own: Mapping[str, Tensor], table: Mapping[str, Tensor]) -> None:
    problems = [f"{key}: missing" for key in own if key not in table]
    problems += [f"{key}: unexpected" for key in table if key not in own]
    problems += [
        f"{key}: shape {list(table[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in table and table[key].shape != own[key].shape
    ]
    if problems:
        more = f"\n    and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise WeightsError(
            "W05",
            "the saved optimizer state is for other parameters\n    " + "\n    ".join(problems[:10]) + more,
            where="optimizer",
            fix="resume with the model, the optimizer and bf16_updates of the saved run",
        )


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory: of a DTensor its shard, else the tensor."""
    tensor = tensor.detach()
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _release(tensor: Tensor) -> None:
    # Between steps the fp32 counterpart holds no memory but stays the same object, which is what the torch optimizer's
    # state hangs on. FSDP2 frees its unsharded parameters in the same way.
    _local(tensor).untyped_storage().resize_(0)


def _materialise(tensor: Tensor) -> None:
    local = _local(tensor)
    local.untyped_storage().resize_(local.numel() * local.element_size())
