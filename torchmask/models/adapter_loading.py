"""Adapters from folders in PEFT's layout, whoever made them (see `adapter_layout`).

Everything is checked before the model is touched, so a refused adapter leaves it as it was.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from torchmask.errors import WeightsError
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
from torchmask.models.adapters import attach, linear_layers, refuse_adapted
from torchmask.models.conversions import Layout, hub_shapes
from torchmask.models.folder import family_of
from torchmask.models.resize import resize_embeddings
from torchmask.models.weight_files import FileTensor, open_files, open_safetensors
from torchmask.models.weights import FLOATS, copy_into, fill, not_finite, not_finite_in
from torchmask.modules.decoder import Decoder

_MAX_NAMES = 5
_UNKNOWN_KINDS = {
    "use_dora": "DoRA",
    "target_parameters": "adapters of parameters that are no linear layers (experts, routers)",
    "lora_bias": "adapters with biases",
    "alora_invocation_tokens": "aLoRA",
    "trainable_token_indices": "trained rows of the embedding",
}
"""Keys of adapter_config.json that make an adapter of a kind not known here, if they are set."""
_OTHER_MODEL = f"load it onto the model it belongs to (base_model_name_or_path in {CONFIG_FILE})"
_MERGE = "merge it into the model with the library that made it, and load the result"
_OF_TABLES = re.compile(r".*\.lora_embedding_[AB]|(.*\.)?(lm_head|embed_out)\.lora_[AB]\.weight")


def load_adapter(model: Decoder, folder: str | Path, *, base: str | Path | None = None) -> int:
    """Puts adapters from a folder in PEFT's layout onto a model, and freezes all else; returns the number of layers.

    Modules that were trained whole replace the model's; where they have rows of added tokens, its vocabulary grows by
    them. The model is whole, with its weights, and has no adapters.

    Args:
        base: the folder that the model's weights are from, compared with what the adapter was trained on.

    Raises:
        ConfigError: C09, the model has adapters already.
        WeightsError: W03, no adapter in the folder; W05, one that does not fit the model; W06, a pickle; W08, NaN or
            Inf in it; W09, one of other weights; W10, one of a kind that is not known here.
    """
    folder = Path(folder).expanduser()
    refuse_adapted(model)
    config = _read_config(folder)
    head_in_files = family_of(model.hub_config).hub_name(HEAD)
    tensors = {_own_name(name, head_in_files): tensor for name, tensor in _open(folder).items()}
    _check_base(folder, base)
    layout = layout_of(model)
    tables = [tensors.get(layout[ours][0].hub) for ours in (EMBEDDING, HEAD)]
    num_rows = max([model.spec.vocab_size, *(table.shape[0] for table in tables if table is not None)])
    _check_fits(model, tensors, tables, layout, num_rows, str(folder))
    _check_finite(tensors, model.embed_tokens.weight.dtype, str(folder))
    resize_embeddings(model, num_rows)  # as the model was before it was trained
    layout = layout_of(model)
    modules = modules_of(layout, linear_layers(model))
    model.requires_grad_(False)
    num_layers = 0
    for name in (name.removesuffix(A) for name in tensors if name.endswith(A)):
        a, b = (tensors[f"{name}{end}"].read((slice(None), slice(None))) for end in (A, B))
        for part in modules[name].parts:
            layer = attach(model, part.name, rank=len(a), scale=_scale(config, name, len(a)))
            copy_into(layer.lora_a, a)
            copy_into(layer.lora_b, torch.cat([b[theirs] for _, theirs in part.rows()]))
            num_layers += 1
    for name, parameter in model.named_parameters():
        if any(piece.hub in tensors for piece in layout.get(name, ())):
            fill(parameter, layout[name], tensors)
            parameter.requires_grad_(True)
    return num_layers


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
        kind = config["peft_type"]
        if kind == "LORA":
            for key, alpha in {**(config.get("alpha_pattern") or {}), "": config["lora_alpha"]}.items():
                re.compile(key)
                float(alpha)
    except FileNotFoundError as error:
        fix = "name a folder with adapter_config.json, such as adapter/ of a run"
        raise WeightsError("W03", f"no {CONFIG_FILE}", where=str(folder.absolute()), fix=fix) from error
    except (KeyError, ValueError, TypeError, re.error) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        fix = "copy the folder again from where the adapter was made"
        raise WeightsError("W05", f"describes no adapter: {what}", where=str(file), fix=fix) from error
    unknown = [what for key, what in _UNKNOWN_KINDS.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        unknown.append("trained biases")
    if kind != "LORA":
        unknown = [f"peft_type {kind!r}"]
    if unknown:
        raise _unknown_kind(" and ".join(unknown), str(file))
    return config


def _unknown_kind(what: str, where: str) -> WeightsError:
    return WeightsError("W10", f"an adapter of a kind that is not known: {what}", where=where, fix=_MERGE)


def _open(folder: Path) -> dict[str, FileTensor]:
    pickle = folder / "adapter_model.bin"
    if pickle.exists() and not (folder / WEIGHTS_FILE).exists():
        fix = f"save it again with PEFT's save_pretrained, which writes {WEIGHTS_FILE}"
        raise WeightsError("W06", "an adapter in a pickle, which could run code", where=str(pickle), fix=fix)
    tensors = open_files([folder / WEIGHTS_FILE])
    of_tables = [name for name in tensors if _OF_TABLES.fullmatch(name)]
    if of_tables:
        raise _unknown_kind(f"adapters of the embedding or the head ({of_tables[0]})", str(folder))
    return tensors


def _own_name(name: str, head_in_files: str) -> str:
    """A tensor's name without what PEFT puts around it."""
    name = name.removeprefix(PREFIX).replace(".modules_to_save.", ".")
    return HEAD if name == head_in_files else name


def _check_base(folder: Path, base: str | Path | None) -> None:
    if base is None:
        return
    with open_safetensors(folder / WEIGHTS_FILE) as f:
        wanted = (f.metadata() or {}).get(BASE)
    if wanted is not None and wanted != (found := weights_fingerprint(base)):
        message = f"the adapter was trained on other weights: fingerprint {wanted}, those of {base} have {found}"
        raise WeightsError("W09", message, where=str(folder), fix=_OTHER_MODEL)


def _check_fits(
    model: Decoder,
    tensors: dict[str, FileTensor],
    tables: list[FileTensor | None],
    layout: Layout,
    num_rows: int,
    where: str,
) -> None:
    """Raises if an adapter has what the model lacks, or of another size; its vocabulary may be larger."""
    wrong = [] if tensors else ["it holds no tensor"]
    wrong += [f"{name} is stored as {each.dtype}" for name, each in tensors.items() if each.dtype not in FLOATS]
    shapes = hub_shapes(layout)
    shapes |= {layout[ours][0].hub: (num_rows, model.spec.embed_dim) for ours in (EMBEDDING, HEAD)}
    modules = modules_of(layout, linear_layers(model))
    for name, tensor in tensors.items():
        module_name, end = next(((name.removesuffix(end), end) for end in (A, B) if name.endswith(end)), (name, ""))
        if not end:
            if name not in shapes:
                wrong.append(f"{name}: the model has no such tensor")
            elif shapes[name] != tensor.shape:
                wrong.append(f"{name}: the adapter has {list(tensor.shape)}, the model {list(shapes[name])}")
        elif module_name not in modules:
            wrong.append(f"{module_name}: the model has no such linear layer")
        elif end == A:
            wrong += _wrong_shapes(model, modules[module_name], tensors)
        elif f"{module_name}{A}" not in tensors:
            wrong.append(f"{module_name}: the adapter has B and no A")
    fix = _OTHER_MODEL
    if not wrong and model.spec.tie_embeddings and any(tables) and not _same(tables):
        wrong, fix = ["the embedding and the head are trained apart; in the model they are one parameter"], _MERGE
    if wrong:
        shown = "\n    ".join(wrong[:_MAX_NAMES] + (["..."] if len(wrong) > _MAX_NAMES else []))
        raise WeightsError("W05", f"the adapter does not fit the model:\n    {shown}", where=where, fix=fix)


def _wrong_shapes(model: Decoder, module: Module, tensors: dict[str, FileTensor]) -> list[str]:
    """What is wrong with the matrices of a module, if anything."""
    a, b = tensors[f"{module.name}{A}"], tensors.get(f"{module.name}{B}")
    layer = model.get_submodule(module.parts[0].name)
    assert isinstance(layer, torch.nn.Linear)
    found = (a.shape, None if b is None else b.shape)
    wanted = ((a.shape[0], layer.in_features), (module.num_rows, a.shape[0]))
    return [] if found == wanted else [f"{module.name}: A and B have shapes {found}, the model's layer takes {wanted}"]


def _check_finite(tensors: dict[str, FileTensor], dtype: torch.dtype, where: str) -> None:
    found: Counter[tuple[str, str]] = Counter()
    for name, tensor in tensors.items():
        values = tensor.read(tuple(slice(None) for _ in tensor.shape))
        found.update({(name, what): count for what, count in not_finite_in(values, values.to(dtype))})
    if found:
        raise not_finite(where, found)


def _same(tables: list[FileTensor | None]) -> bool:
    one, other = (None if table is None else table.read((slice(None), slice(None))) for table in tables)
    return one is not None and other is not None and one.equal(other)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """What the product of a module's matrices is multiplied by; keys of the pattern are ends of names, as PEFT's."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
