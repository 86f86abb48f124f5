"""Adapters to folders in PEFT's layout (see `adapter_layout`)."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchmask.models.adapter_layout import (
    BASE,
    CONFIG_FILE,
    EMBEDDING,
    HEAD,
    PREFIX,
    WEIGHTS_FILE,
    A,
    B,
    Module,
    layout_of,
    modules_of,
    weights_fingerprint,
)
from torchmask.models.adapters import linear_layers
from torchmask.models.conversions import Layout, hub_tensors, whole_tensor
from torchmask.models.export import make_folder
from torchmask.models.weight_files import new_name
from torchmask.models.weights import write_tensors
from torchmask.modules.decoder import Decoder
from torchmask.modules.lora import LoRALinear, adapted_layers, is_adapter


def save_adapter(
    model: Decoder, folder: str | Path, *, base: str | Path | None = None, fingerprint: str | None = None
) -> None:
    """Writes a model's adapters, and the modules that are trained whole, as PEFT reads them; collective if sharded.

    Args:
        base: the folder of the weights below the adapters, noted for whoever loads them.
        fingerprint: of these weights, see `weights_fingerprint`; None = it is taken now.

    Raises:
        ValueError: the model has no adapters.
        WeightsError: the weights of `base` are missing or damaged, and there is no fingerprint.
        EnvironmentFault: K05, the folder cannot be made, as where there is a file of its name.
    """
    layers = dict(adapted_layers(model))
    if not layers:
        raise ValueError("the model has no adapters: save_pretrained writes all of it")
    make_folder(folder := Path(folder))
    layout = layout_of(model)
    modules = modules_of(layout, layers)
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, module in modules.items():
        a, b = _joined(module, layers)
        tensors |= {f"{PREFIX}{name}{A}": a, f"{PREFIX}{name}{B}": b}
        ranks[name], alphas[name] = len(a), layers[module.parts[0].name].scale * len(a)
    saved_whole = _trained_whole(model, layout)
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in saved_whole.items()}
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    rank, alpha = _most_common(list(ranks.values())), _most_common(list(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": next(iter(layers.values())).dropout,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: _plain(a) for name, a in alphas.items() if a != alpha},
        "target_modules": _shortest(list(modules), list(modules_of(layout, linear_layers(model)))),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved_whole}) or None,
        "fan_in_fan_out": any(p.transposed for part in next(iter(modules.values())).parts for p in part.pieces),
        "bias": "none",
        "use_rslora": False,  # the scale is in lora_alpha
    }
    if fingerprint is None and base is not None:
        fingerprint = weights_fingerprint(base)
    noted = {} if fingerprint is None else {BASE: fingerprint}
    files = {name: folder / new_name(name) for name in (WEIGHTS_FILE, CONFIG_FILE)}
    write_tensors(files[WEIGHTS_FILE], {name: tensor.contiguous() for name, tensor in tensors.items()}, noted)
    files[CONFIG_FILE].write_text(json.dumps(config, indent=2) + "\n")
    for name, file in files.items():
        file.replace(folder / name)


def _joined(module: Module, layers: dict[str, LoRALinear]) -> tuple[Tensor, Tensor]:
    """A and B of a module from those of the layers in it."""
    own = [layers[part.name] for part in module.parts]
    a = [whole_tensor(layer.lora_a).cpu() for layer in own]
    b = [whole_tensor(layer.lora_b).cpu() * (layer.scale / own[0].scale) for layer in own]
    is_shared = all(other.equal(a[0]) for other in a[1:])  # as where it was loaded from such a module
    joined_a = a[0] if is_shared else torch.cat(a)
    joined_b = b[0].new_zeros(module.num_rows, len(joined_a))
    column = 0
    for part, own_b in zip(module.parts, b):
        columns = slice(column, column + own_b.shape[1])
        for ours, theirs in part.rows():
            joined_b[theirs, columns] = own_b[ours]
        column += 0 if is_shared else own_b.shape[1]
    return joined_a, joined_b


def _trained_whole(model: Decoder, layout: Layout) -> dict[str, Tensor]:
    """What is trained beside the adapters, by the names of transformers' modules."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and not is_adapter(name)}
    if model.spec.tie_embeddings and EMBEDDING in trained:  # PEFT copies what it trains, which unties it
        trained[HEAD] = trained[EMBEDDING]
    return {name: tensor.cpu().clone() for name, tensor in hub_tensors(layout, trained)}


def _shortest(modules: list[str], known: list[str]) -> list[str]:
    """Names that PEFT matches by their ends: the last part, where all modules that have it are meant."""
    by_leaf: dict[str, set[str]] = {}
    for name in known:
        by_leaf.setdefault(name.rpartition(".")[2], set()).add(name)
    every = {leaf for leaf, names in by_leaf.items() if names <= set(modules)}
    return sorted({leaf if (leaf := name.rpartition(".")[2]) in every else name for name in modules})


def _most_common(values: list[Any]) -> Any:
    return max(values, key=values.count)


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number
