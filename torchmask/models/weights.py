"""Safetensors in and out: streaming, one tensor in memory at a time, straight into whole or sharded parameters.

The Hub's layout (`model.safetensors`, or shards with `model.safetensors.index.json`) is read and written. Names are
mapped by a family's table; nothing here knows a family. Every fault of a file is told with the file's name, what was
found and the way out, since the library's own messages name no file.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchmask.errors import WeightsError

MAX_SHARD_BYTES = 5 * 2**30
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_MAX_ROWS = 10


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name to the file that holds it.

    Raises:
        WeightsError: no safetensors, a shard of the index is missing, or a file is damaged.
    """
    if (folder / INDEX_FILE).exists():
        weight_map = _read_index(folder / INDEX_FILE)
        missing = sorted({name for name in weight_map.values() if not (folder / name).exists()})
        if missing:
            raise WeightsError(
                "W03",
                f"shards named in {INDEX_FILE} are missing: {', '.join(missing)}",
                where=str(folder),
                fix="download the folder again; `torchmask download` fetches only what is missing",
            )
        for name in sorted(set(weight_map.values())):
            held = set(tensor_names(folder / name))
            lost = sorted(tensor for tensor, file in weight_map.items() if file == name and tensor not in held)
            if lost:
                message = f"{INDEX_FILE} says that {lost[0]} is in {name}, and it is not"
                raise WeightsError("W03", message, where=str(folder), fix="download the folder again")
        return {name: folder / file for name, file in weight_map.items()}
    files = [folder / SINGLE_FILE] if (folder / SINGLE_FILE).exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise _no_weights(folder)
    return {name: file for file in files for name in tensor_names(file)}


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map is not a table of file names")
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError("W01", f"not a valid index: {error}", where=str(file), fix="get the file again") from error
    return weight_map


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a file, whose header and length are checked on the way."""
    with open_checked(file) as f:
        return list(f.keys())


def open_checked(file: Path) -> Any:
    """`safe_open(file)`; a damaged file is a `WeightsError` that names it (W01 truncated, W02 something else)."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise damaged_file(file, error) from error


def damaged_file(file: Path, error: Exception) -> WeightsError:
    """What to tell of a file that safetensors cannot open."""
    again = "get the file again; `torchmask download REPO --force` replaces it"
    if not file.exists():
        return WeightsError("W03", "no such file", where=str(file), fix=again)
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(128)
    if head.startswith(b"version https://git-lfs"):
        return WeightsError(
            "W02", "this is a git-lfs pointer, not weights", where=str(file), fix=f"`git lfs pull`, or {again}"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return WeightsError("W02", "this is an HTML page, not weights", where=str(file), fix=again)
    wanted = _bytes_wanted(file, size)
    found = f"the file is truncated or damaged: {size:,} bytes found"
    if wanted is not None and wanted != size:
        found += f", its header asks for {wanted:,}"
    return WeightsError("W01", f"{found} ({error})", where=str(file), fix=again)


def _bytes_wanted(file: Path, size: int) -> int | None:
    with file.open("rb") as f:
        header_bytes = int.from_bytes(f.read(8), "little")
        if size < 8 or header_bytes > min(size, 100 * 2**20):
            return None
        try:
            header = json.loads(f.read(header_bytes))
        except ValueError:
            return None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + header_bytes + max(ends, default=0)


def _no_weights(folder: Path) -> WeightsError:
    if not folder.is_dir():
        return WeightsError("W03", "no such folder", where=str(folder.absolute()), fix="check the path")
    found = sorted(p.name for p in folder.iterdir())
    pickles = [name for name in found if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return WeightsError(
            "W06",
            f"only pickled weights here ({', '.join(pickles[:3])}), and unpickling can run code",
            where=str(folder),
            fix="get the safetensors version of the model, or convert it where you trust the source",
        )
    listing = ", ".join(found[:_MAX_ROWS]) or "nothing"
    return WeightsError(
        "W03",
        f"no {SINGLE_FILE} or {INDEX_FILE}; the folder holds {listing}",
        where=str(folder),
        fix="name a folder in Hugging Face layout; `torchmask download` makes one",
    )


def load_weights(model: nn.Module, folder: Path | str, to_ours: Callable[[str], str | None]) -> None:
    """Fills the model's parameters from a folder, whole or sharded (FSDP2), casting to each parameter's dtype.

    At most one tensor is in memory beyond the model; a rank reads only its own part of each.

    Args:
        to_ours: the Hub's tensor name to ours; None for tensors that are derived or not used.

    Raises:
        WeightsError: damaged or missing files; missing, unexpected or mis-shaped tensors (all listed).
    """
    folder = Path(folder)
    files = weight_files(folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    renamed = {name: to_ours(name) for name in files}
    # A tied head is the embedding: some checkpoints write it out, some do not.
    canonical = {id(p): name for name, p in model.named_parameters()}
    tied = {name for name, p in parameters.items() if canonical[id(p)] != name}
    unexpected = [name for name, ours in renamed.items() if ours is not None and ours not in parameters]
    missing = sorted(parameters.keys() - set(renamed.values()) - tied)
    problems = [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in unexpected]

    by_file: dict[Path, list[str]] = {}
    for name, file in files.items():
        by_file.setdefault(file, []).append(name)
    wrong_shapes: list[str] = []
    for file, names in by_file.items():
        with open_checked(file) as f:
            for name in names:
                ours = renamed[name]
                if ours is None or ours not in parameters or ours in tied:
                    continue
                source, parameter = f.get_slice(name), parameters[ours]
                if tuple(source.get_shape()) != tuple(parameter.shape):
                    shapes = f"the file has {list(source.get_shape())}, the model {list(parameter.shape)}"
                    wrong_shapes.append(f"{name}: {shapes}")
                elif not problems and not wrong_shapes:
                    copy_into(parameter, source)
    if problems or wrong_shapes:
        raise _wrong_tensors(folder, wrong_shapes + problems)


def _wrong_tensors(folder: Path, problems: list[str]) -> WeightsError:
    shown = problems[:_MAX_ROWS] + (["..."] if len(problems) > _MAX_ROWS else [])
    return WeightsError(
        "W05",
        f"{len(problems)} tensors do not fit the model:\n    " + "\n    ".join(shown),
        where=str(folder),
        fix="use the config.json that belongs to these weights",
    )


@torch.no_grad()
def copy_into(parameter: Tensor, source: Any) -> None:
    """Copies a tensor or a safetensors slice into a parameter; of a DTensor, only this rank's part is read."""
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        part = tuple(slice(start, start + size) for start, size in zip(offset, shape))
        if all(size > 0 for size in shape):
            parameter.to_local().copy_(source[part])
    else:
        parameter.copy_(source[...] if not isinstance(source, Tensor) else source)


def init_weights(model: nn.Module, *, seed: int, std: float = 0.02) -> None:
    """Random weights: matrices and embeddings normal with `std`, norms 1, biases 0.

    Each tensor has its own generator, seeded by its name, so that every world size starts from the same weights.
    """
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "bias":
            whole = torch.zeros(parameter.shape)
        elif parameter.ndim == 1:
            whole = torch.ones(parameter.shape)
        else:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
            whole = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
        copy_into(parameter, whole)


def _umask() -> int:
    mask = os.umask(0)  # it cannot be asked for without being set
    os.umask(mask)
    return mask


def save_weights(
    folder: Path | str,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes named tensors in the Hub's layout, one file or shards with an index; returns the file names.

    Tensors are taken from the iterable one by one and let go of when their shard is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    shard_bytes = total_bytes = 0

    def write_out() -> None:
        nonlocal shard, shard_bytes
        file = folder / f".part-{len(shards):05d}.safetensors"
        save_file(shard, file, metadata={"format": "pt", **(metadata or {})})
        file.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read
        shards.append((file, list(shard)))
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            write_out()
        shard[name] = tensor.detach().cpu().contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    write_out()
    if len(shards) == 1:
        shards[0][0].rename(folder / SINGLE_FILE)
        return [SINGLE_FILE]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for (file, _), name in zip(shards, names):
        file.rename(folder / name)
    weight_map = {tensor: name for (_, held), name in zip(shards, names) for tensor in held}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True))
    return [*names, INDEX_FILE]
