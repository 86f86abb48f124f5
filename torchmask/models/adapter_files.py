"""Adapters to folders in PEFT's layout and back: adapter_config.json and adapter_model.safetensors.

Where a family's files hold several of our layers in one tensor (Phi-3's qkv_proj, GPT-2's c_attn), so does the adapter:
its A is theirs one under the other, its B has each one's rows in its own columns, which is the same sum of products.
The family's table of conversions says which rows those are. On the way in, each layer gets the whole A and its rows of
B, whichever program made them.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchmask.errors import WeightsError
from torchmask.models.adapters import attach, linear_layers, whole
from torchmask.models.conversions import Layout, Piece, hub_shapes, hub_tensors
from torchmask.models.folder import family_of
from torchmask.models.meta_llama import checkpoint_files, is_meta_folder
from torchmask.models.resize import resize_embeddings
from torchmask.models.weight_files import FileTensor, new_name, open_files, open_folder, open_safetensors
from torchmask.models.weights import FLOATS, copy_into, fill, not_finite, not_finite_in, write_tensors
from torchmask.modules.decoder import Decoder
from torchmask.modules.lora import LoRALinear, adapted_layers, is_adapter

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B, _WEIGHT = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".weight"
_BASE = "base_fingerprint"  # in the metadata of the weights
_TABLES = ("embed_tokens.weight", "lm_head.weight")  # have a row a token
_SAMPLE = 512
_MAX_NAMES = 5
_OTHER_MODEL = f"load it onto the model it belongs to (base_model_name_or_path in {CONFIG_FILE})"
_UNKNOWN_KINDS = {
    "use_dora": "DoRA",
    "target_parameters": "adapters of the matrices of experts",
    "lora_bias": "adapters with biases",
    "alora_invocation_tokens": "aLoRA",
    "trainable_token_indices": "trained rows of the embedding",
}
"""Keys of adapter_config.json that make an adapter of a kind not known here, if they are set."""


@dataclass(frozen=True)
class _Part:
    """One of our layers in a module of the Hub's.

    Attributes:
        name: ours.
        pieces: where in the module's weight it lies.
    """

    name: str
    pieces: tuple[Piece, ...]

    def rows(self) -> Iterator[tuple[slice, slice]]:
        """Rows of ours, and the module's rows that are the same."""
        for piece in self.pieces:
            ours, (theirs, columns) = piece.ours[0], piece.theirs
            assert theirs is not None and columns == piece.ours[1], "a module holds layers one after the other"
            yield slice(ours.start, ours.stop), slice(theirs.start, theirs.stop, theirs.step)


@dataclass(frozen=True)
class _Module:
    """A module of the Hub's that holds linear layers of ours.

    Attributes:
        name: the Hub's.
        parts: the layers.
        num_rows: of its weight, which are its results; other layers may make some of them.
    """

    name: str
    parts: tuple[_Part, ...]
    num_rows: int


def weights_fingerprint(folder: str | Path) -> str:
    """What tells a model's weights from another's: a sha256 of every tensor's name, type, shape and first numbers.

    Not of all numbers, which would take as long as loading; two trained models differ everywhere.

    Raises:
        WeightsError: the folder's weights are missing or damaged.
    """
    folder = Path(folder).expanduser()
    each = (
        [open_files([file]) for file in checkpoint_files(folder)] if is_meta_folder(folder) else [open_folder(folder)]
    )
    digest = hashlib.sha256()
    for name, tensor in (named for tensors in each for named in sorted(tensors.items())):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        *before, last = tensor.shape or (1,)
        first = (*(slice(0, 1) for _ in before), slice(0, min(last, _SAMPLE)))
        values = tensor.read(first if tensor.shape else ())
        digest.update(values.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _modules(layout: Layout, layers: Iterable[str]) -> dict[str, _Module]:
    """The Hub's modules that hold linear layers of ours, by name."""
    num_rows: dict[str, int] = {}
    for piece in (piece for pieces in layout.values() for piece in pieces if len(piece.ours) == 2):
        rows = piece.theirs[0]
        if rows is not None:
            num_rows[piece.hub] = max(num_rows.get(piece.hub, 0), rows[-1] + 1)
    parts: dict[str, list[_Part]] = {}
    for name in layers:
        pieces = layout[f"{name}{_WEIGHT}"]
        for hub in dict.fromkeys(piece.hub for piece in pieces):
            parts.setdefault(hub, []).append(_Part(name, tuple(piece for piece in pieces if piece.hub == hub)))
    names = {hub: hub.removesuffix(_WEIGHT) for hub in parts}
    return {names[hub]: _Module(names[hub], tuple(held), num_rows[hub]) for hub, held in parts.items()}


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
    """
    layers = dict(adapted_layers(model))
    if not layers:
        raise ValueError("the model has no adapters: save_pretrained writes all of it")
    layout = family_of(model.hub_config).layout(model)
    modules = _modules(layout, layers)
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, module in modules.items():
        a, b = _joined(module, layers)
        tensors |= {f"{_PREFIX}{name}{_A}": a, f"{_PREFIX}{name}{_B}": b}
        ranks[name], alphas[name] = len(a), layers[module.parts[0].name].scale * len(a)
    saved_whole = _trained_whole(model, layout)
    tensors |= {f"{_PREFIX}{name}": tensor for name, tensor in saved_whole.items()}
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    rank, alpha = (max(values, key=list(values).count) for values in (list(ranks.values()), list(alphas.values())))
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
        "target_modules": _shortest(list(modules), list(_modules(layout, linear_layers(model)))),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved_whole}) or None,
        "fan_in_fan_out": any(p.transposed for part in next(iter(modules.values())).parts for p in part.pieces),
        "bias": "none",
        "use_rslora": False,  # the scale is in lora_alpha
    }
    if fingerprint is None and base is not None:
        fingerprint = weights_fingerprint(base)
    noted = {} if fingerprint is None else {_BASE: fingerprint}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / new_name(WEIGHTS_FILE)
    write_tensors(new, {name: tensor.contiguous() for name, tensor in tensors.items()}, noted)
    new.replace(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _joined(module: _Module, layers: dict[str, LoRALinear]) -> tuple[Tensor, Tensor]:
    """A and B of a module from those of the layers in it."""
    own = [layers[part.name] for part in module.parts]
    a = [whole(layer.lora_a).cpu() for layer in own]
    b = [whole(layer.lora_b).cpu() * (layer.scale / own[0].scale) for layer in own]
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
    """What is trained beside the adapters, as the Hub's tensors."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and not is_adapter(name)}
    if model.spec.tie_embeddings and "embed_tokens.weight" in trained:  # PEFT copies what it trains, which unties it
        trained["lm_head.weight"] = trained["embed_tokens.weight"]
    return {name: tensor.cpu().clone() for name, tensor in hub_tensors(layout, trained)}


def _shortest(modules: list[str], known: list[str]) -> list[str]:
    """Names that PEFT matches by their ends: the last part, where all modules that have it are meant."""
    by_leaf: dict[str, set[str]] = {}
    for name in known:
        by_leaf.setdefault(name.rpartition(".")[2], set()).add(name)
    every = {leaf for leaf, names in by_leaf.items() if names <= set(modules)}
    return sorted({leaf if (leaf := name.rpartition(".")[2]) in every else name for name in modules})


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def load_adapter(model: Decoder, folder: str | Path, *, base: str | Path | None = None) -> int:
    """Puts adapters from a folder in PEFT's layout onto a model, and freezes all else; returns the number of layers.

    Modules that were trained whole replace the model's; where they have rows of added tokens, its vocabulary grows by
    them. The model is whole, with its weights.

    Args:
        base: the folder that the model's weights are from, compared with what the adapter was trained on.

    Raises:
        WeightsError: W03, no adapter in the folder; W05, one that does not fit the model; W08, NaN or Inf in it; W09,
            one of other weights; W10, one of a kind that is not known here.
    """
    folder = Path(folder).expanduser()
    config = _read_config(folder)
    tensors = {_own_name(name): tensor for name, tensor in open_files([folder / WEIGHTS_FILE]).items()}
    _check_base(folder, base)
    layout = family_of(model.hub_config).layout(model)
    tables = [tensors.get(layout[ours][0].hub) for ours in _TABLES]
    num_rows = max((table.shape[0] for table in tables if table is not None), default=0)
    if num_rows > model.spec.vocab_size:
        resize_embeddings(model, num_rows)  # as the model was before it was trained
        layout = family_of(model.hub_config).layout(model)
    modules = _modules(layout, linear_layers(model))
    _check_fits(model, tensors, modules, layout, str(folder))
    model.requires_grad_(False)
    num_layers, not_numbers = 0, Counter[tuple[str, str]]()
    for name in (name.removesuffix(_A) for name in tensors if name.endswith(_A)):
        a, b = (tensors[f"{name}{end}"].read((slice(None), slice(None))) for end in (_A, _B))
        for end, tensor in ((_A, a), (_B, b)):
            not_numbers.update({(f"{name}{end}", what): count for what, count in not_finite_in(tensor, tensor)})
        for part in modules[name].parts:
            layer = attach(model, part.name, rank=len(a), scale=_scale(config, name, len(a)))
            copy_into(layer.lora_a, a)
            copy_into(layer.lora_b, torch.cat([b[theirs] for _, theirs in part.rows()]))
            num_layers += 1
    for name, parameter in model.named_parameters():
        if any(piece.hub in tensors for piece in layout.get(name, ())):
            not_numbers += fill(parameter, layout[name], tensors)
            parameter.requires_grad_(True)
    if not_numbers:
        raise not_finite(str(folder), not_numbers)
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
        raise WeightsError("W05", f"describes no adapter: {what}", where=str(file), fix="get the file again") from error
    unknown = [what for key, what in _UNKNOWN_KINDS.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        unknown.append("trained biases")
    if kind != "LORA" or unknown:
        what = f"peft_type {kind!r}" if kind != "LORA" else " and ".join(unknown)
        fix = "merge it into the model with the library that made it, and load the result"
        raise WeightsError("W10", f"an adapter of a kind that is not known: {what}", where=str(file), fix=fix)
    return config


def _own_name(name: str) -> str:
    """A tensor's name without what PEFT puts around it."""
    return name.removeprefix(_PREFIX).replace(".modules_to_save.", ".")


def _check_base(folder: Path, base: str | Path | None) -> None:
    if base is None:
        return
    with open_safetensors(folder / WEIGHTS_FILE) as f:
        wanted = (f.metadata() or {}).get(_BASE)
    if wanted is not None and wanted != (found := weights_fingerprint(base)):
        raise WeightsError(
            "W09",
            f"the adapter was trained on other weights: fingerprint {wanted}, those of {base} have {found}",
            where=str(folder),
            fix=_OTHER_MODEL,
        )


def _check_fits(
    model: Decoder, tensors: dict[str, FileTensor], modules: dict[str, _Module], layout: Layout, where: str
) -> None:
    """Raises if an adapter has what the model lacks, or of another size."""
    wrong = [] if tensors else ["it holds no tensor"]
    wrong += [f"{name} is stored as {each.dtype}" for name, each in tensors.items() if each.dtype not in FLOATS]
    shapes = hub_shapes(layout)
    for name, tensor in tensors.items():
        module_name, end = next(((name.removesuffix(end), end) for end in (_A, _B) if name.endswith(end)), (name, ""))
        if not end:
            if shapes.get(name) != tensor.shape:
                wrong.append(f"{name}: the adapter has {list(tensor.shape)}, the model {list(shapes.get(name, ()))}")
        elif module_name not in modules:
            wrong.append(f"{module_name}: the model has no such linear layer")
        elif end == _A:
            module, rank = modules[module_name], tensor.shape[0]
            other = tensors.get(f"{module_name}{_B}")
            found = (tensor.shape, None if other is None else other.shape)
            layer = model.get_submodule(module.parts[0].name)
            assert isinstance(layer, torch.nn.Linear)
            if found != (wanted := ((rank, layer.in_features), (module.num_rows, rank))):
                wrong.append(f"{module_name}: A and B have shapes {found}, the model's layer takes {wanted}")
        elif f"{module_name}{_A}" not in tensors:
            wrong.append(f"{module_name}: the adapter has B and no A")
    tables = [tensors.get(layout[ours][0].hub) for ours in _TABLES]
    if model.spec.tie_embeddings and any(tables) and not _same(tables):
        wrong.append("the embedding and the head are trained apart; in the model they are one parameter")
    if wrong:
        shown = "\n    ".join(wrong[:_MAX_NAMES] + (["..."] if len(wrong) > _MAX_NAMES else []))
        raise WeightsError("W05", f"the adapter does not fit the model:\n    {shown}", where=where, fix=_OTHER_MODEL)


def _same(tables: list[FileTensor | None]) -> bool:
    one, other = (None if table is None else table.read((slice(None), slice(None))) for table in tables)
    return one is not None and other is not None and one.equal(other)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """What the product of a module's matrices is multiplied by; keys of the pattern are ends of names, as PEFT's."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
