"""Makes the optimizer of a run: which parameters decay, which kernels run, which settings are refused."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from torchmask.errors import ConfigError, TorchmaskError
from torchmask.training.bf16_updates import Entry, Optimizer
from torchmask.training.muon import HIDDEN

__all__ = ["BF16_UPDATES", "Bf16Updates", "Optimizer", "build_optimizer"]

Bf16Updates = Literal["master_weights", "stochastic_rounding"]
BF16_UPDATES = ("master_weights", "stochastic_rounding")

_FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


def build_optimizer(
    model: nn.Module,
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    *,
    weight_decay: float | None = None,
    bf16_updates: Bf16Updates = "master_weights",
    seed: int = 0,
) -> Optimizer:
    """Returns an optimizer over the parameters of `model` that require gradients.

    Call it after the weights' place is final (adapted, sharded, off the meta device); loading weights into the model
    afterwards, before the first step, is fine.

    Args:
        make: gives the torch optimizer for a list of parameter groups, `partial(torch.optim.AdamW, lr=3e-4)` say.
        weight_decay: of the matrices; None keeps what `make` says. Only matrices decay (two or more dimensions,
            embeddings among them, as in GPT-2's and Llama's training); norms and biases never do.
        bf16_updates: how half-precision parameters take small updates: `master_weights` or `stochastic_rounding`.
        seed: of the random rounding.

    Raises:
        ConfigError: C13 for a setting out of range, C09 when nothing is trainable or the choices do not go together.
    """
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trained:
        raise ConfigError("C09", "the model has no trainable parameter", where="optimizer", fix="unfreeze some of it")
    if bf16_updates not in BF16_UPDATES:
        raise ConfigError(
            "C09", f"no way of updating called {bf16_updates!r}", where="bf16_updates", fix=" or ".join(BF16_UPDATES)
        )
    _check_not_negative("weight_decay", 0.0 if weight_decay is None else weight_decay)
    entries = [_entry(name, param, bf16_updates) for name, param in trained]

    inner = _make(_groups(entries, _vocabulary_parameters(model), weight_decay), make)
    for part in getattr(inner, "parts", (inner,)):
        _use_fused_kernels(part)
    return Optimizer(inner, entries, seed=seed)


def _entry(name: str, param: nn.Parameter, bf16_updates: Bf16Updates) -> Entry:
    assert not param.is_meta, f"{name} is on the meta device: materialise the model before building its optimizer"
    if param.dtype not in (torch.bfloat16, torch.float16):
        return Entry(name, param, param, keeps_master=False)
    keeps_master = bf16_updates == "master_weights"
    if param.dtype == torch.float16 and not keeps_master:
        raise ConfigError(
            "C09",
            f"{name} is float16, stochastic rounding is for bfloat16",
            where="bf16_updates",
            fix="set dtype to bf16, or bf16_updates to master_weights",
        )
    return Entry(name, param, nn.Parameter(param.detach().to(torch.float32)), keeps_master)


def _groups(entries: list[Entry], of_vocabulary: set[int], weight_decay: float | None) -> list[dict[str, Any]]:
    """Matrices inside the layers, those of experts, those of the vocabulary, and what never decays.

    `role` tells optimizers which is which.
    """
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    matrices = [entry for entry in entries if _decays(entry)]
    vocabulary = [entry for entry in matrices if id(entry.param) in of_vocabulary]
    inside = [entry for entry in matrices if id(entry.param) not in of_vocabulary]
    groups = [
        {"params": [entry.work for entry in inside if entry.param.ndim == 2], "role": HIDDEN, **decay},
        {"params": [entry.work for entry in inside if entry.param.ndim != 2], "role": "experts", **decay},
        {"params": [entry.work for entry in vocabulary], "role": "embedding", **decay},
        {"params": [entry.work for entry in entries if not _decays(entry)], "role": "vector", "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _vocabulary_parameters(model: nn.Module) -> set[int]:
    """Ids of embeddings and output heads, whose rows are tokens."""
    chosen = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] == "lm_head"
    ]
    return {id(param) for module in chosen for param in module.parameters(recurse=False)}


def _decays(entry: Entry) -> bool:
    return entry.param.ndim >= 2 and not entry.name.endswith("bias")


def _make(
    groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    try:
        inner = make(groups)
    except TorchmaskError:
        raise
    except ValueError as error:  # torch's own range checks: "Invalid learning rate: -1"
        is_range = "Invalid" in str(error)
        raise ConfigError(
            "C13" if is_range else "C09",
            str(error),
            where="optimizer",
            fix="a learning rate is a finite number >= 0, 3e-4 for example"
            if is_range
            else "use an optimizer that takes parameter groups, such as torch.optim.AdamW",
        ) from error
    if not isinstance(inner, torch.optim.Optimizer):
        raise ConfigError(
            "C09", f"made a {type(inner).__name__}, not a torch optimizer", where="optimizer", fix="torch.optim.AdamW"
        )
    for group in inner.param_groups:
        for name in ("lr", "weight_decay"):
            _check_not_negative(name, float(group.get(name, 0.0)))
    return inner


def _check_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0.0):
        raise ConfigError("C13", f"{name} is {value!r}, expected a finite number >= 0", where=f"optimizer.{name}")


def _use_fused_kernels(inner: torch.optim.Optimizer) -> None:
    """Switch Adam and AdamW to their fused kernels, unless the configuration chose an implementation."""
    if not isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
        return
    for group in inner.param_groups:
        chosen = group["fused"] is not None or group["foreach"] is not None or group["differentiable"]
        supported = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in group["params"])
        if not chosen and supported:
            group["fused"] = True
