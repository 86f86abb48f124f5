"""Weights into parameters, whole or sharded, and out into the Hub's layout: one file, or shards and an index.

Reading copies block after block from the mapped files straight into the parameters, so next to nothing is held beyond
the model, and a rank reads only what it holds. Names and layouts are a family's table; nothing here knows a family.
"""

import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchmask.errors import WeightsError
from torchmask.models.conversions import Box, Layout, Piece, hub_shapes
from torchmask.models.weight_files import INDEX_FILE, SINGLE_FILE, FileTensor, new_name
from torchmask.modules.lora import is_adapter
from torchmask.modules.norm import OffsetRMSNorm

MAX_SHARD_BYTES = 5 * 2**30
_MAX_ROWS = 10
_ROWS_COMPARED = 1024
FLOATS = ("F64", "F32", "F16", "BF16")
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_NOT_NUMBERS = ("NaN", "Inf")
_MAX_COPY = 2**24
"""Elements copied at a time: a bound on what is held where a block has to be computed."""


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, FileTensor],
    layout: Layout,
    *,
    where: str,
    derived: tuple[str, ...] = (),
    config_file: str = "config.json",
) -> None:
    """Fills the model's parameters, whole or sharded (FSDP2), casting to each one's dtype.

    What was copied is looked at once, while it is in the caches, for numbers that are none.

    Args:
        tensors: of the checkpoint, by name.
        layout: where the checkpoint keeps each parameter.
        where: the folder, for messages.
        derived: endings of the checkpoint's names that are computed, not learned, and are skipped.
        config_file: which says what the model is, for messages.

    Raises:
        WeightsError: W05 for missing, unexpected or mis-shaped tensors (all listed, by the file's names), W11 for
            quantised ones, W08 for NaN and Inf in the files or where a number is beyond the parameter's dtype.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # A tied head is the embedding: some checkpoints write it out, some do not.
    own = {name for name, _ in model.named_parameters() if not is_adapter(name)}
    layout = {ours: pieces for ours, pieces in layout.items() if ours in parameters}
    wanted = {ours: pieces for ours, pieces in layout.items() if ours in own}
    shapes = hub_shapes(wanted)
    _refuse_quantised([tensors[name] for name in shapes if name in tensors], where)
    problems = [
        f"{name}: the file has {list(tensors[name].shape)}, the model {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    known = {piece.hub for pieces in layout.values() for piece in pieces}
    problems += [f"missing: {name}" for name in sorted((own - wanted.keys()) | (shapes.keys() - tensors.keys()))]
    problems += [f"unexpected: {name}" for name in tensors if name not in known and not name.endswith(derived)]
    if problems:
        held, asked = (_num_layers(names) for names in (tensors, known))
        guess = f"the weights have {held} layers, {config_file} says {asked}" if held not in (0, asked) else ""
        raise _wrong_tensors(where, problems, guess=guess, config_file=config_file)
    order = {file: i for i, file in enumerate(dict.fromkeys(tensor.file for tensor in tensors.values()))}
    found: Counter[tuple[str, str]] = Counter()
    for ours, pieces in sorted(wanted.items(), key=lambda item: order[tensors[item[1][0].hub].file]):
        found += fill(parameters[ours], pieces, tensors)
    if found:
        raise not_finite(where, found)


def not_finite(where: str, found: Mapping[tuple[str, str], int]) -> WeightsError:
    """The error that says how many numbers of which tensors are none; see `not_finite_in`."""
    rows = [f"{name}: {count:,} {what}" for (name, what), count in found.items()]
    shown = rows[:_MAX_ROWS] + (["..."] if len(rows) > _MAX_ROWS else [])
    fix = "get the file again (`torchmask download REPO --force` replaces it); a model that diverged cannot be mended"
    if any(what not in _NOT_NUMBERS for _, what in found):
        fix = "load it in bf16 or fp32, which have room for them"
    rows_found = "\n    ".join(shown)
    return WeightsError("W08", f"weights that are not finite numbers:\n    {rows_found}", where=where, fix=fix)


def _refuse_quantised(tensors: Iterable[FileTensor], where: str) -> None:
    quantised = [f"{tensor.name} ({tensor.dtype})" for tensor in tensors if tensor.dtype not in FLOATS]
    if quantised:
        raise WeightsError(
            "W11",
            f"{len(quantised)} weights are quantised, such as {quantised[0]}; read are {', '.join(FLOATS)} and MXFP4",
            where=where,
            fix="get the checkpoint from before it was quantised, or dequantise it with the library that made it",
        )


def _num_layers(names: Iterable[str]) -> int:
    """One more than the highest of the first numbers in the names of tensors, which are those of the layers."""
    numbers = ([int(part) for part in name.rpartition(": ")[2].split(".") if part.isdigit()] for name in names)
    return 1 + max((first for first, *_ in filter(None, numbers)), default=-1)


def _wrong_tensors(where: str, problems: list[str], *, guess: str, config_file: str) -> WeightsError:
    shown = problems[:_MAX_ROWS] + (["..."] if len(problems) > _MAX_ROWS else [])
    told = f"{len(problems)} tensors do not fit the model" + (f" ({guess})" if guess else "")
    return WeightsError(
        "W05",
        f"{told}:\n    " + "\n    ".join(shown),
        where=where,
        fix=f"use the {config_file} that belongs to these weights",
    )


def heads_differ(head: FileTensor | None, embedding: FileTensor | None) -> bool:
    """Whether a checkpoint's head is another than its embedding; rows are compared up to the first that differs.

    Where one of them is not there it is not; nor where one is quantised, which whoever loads it is told.
    """
    if head is None or embedding is None or not {head.dtype, embedding.dtype} <= set(FLOATS):
        return False
    if head.shape != embedding.shape:
        return True
    for start in range(0, head.shape[0], _ROWS_COMPARED):
        rows = (slice(start, min(start + _ROWS_COMPARED, head.shape[0])), slice(None))
        one, other = (tensor.read(rows[: len(tensor.shape)]) for tensor in (head, embedding))
        if not (one.equal(other) if one.dtype == other.dtype else one.double().equal(other.double())):
            return True
    return False


@torch.no_grad()
def fill(parameter: Tensor, pieces: Iterable[Piece], tensors: Mapping[str, FileTensor]) -> Counter[tuple[str, str]]:
    """Copies pieces of a checkpoint's tensors into a parameter; of a DTensor, only what this rank holds is read.

    Returns:
        how many numbers that are not finite there are now, by the checkpoint's tensor and what they are.
    """
    held, part = _held_part(parameter)
    found: Counter[tuple[str, str]] = Counter()
    for piece in pieces:
        cut = piece.cut(part)
        for block in _slabs(cut) if cut is not None else ():
            source = tensors[block.hub].read(block.in_theirs())
            filled = held[block.in_ours(part)]
            filled.copy_(block.as_ours(source))
            # The least and the greatest are NaN if any is, at a tenth of what `isfinite` on all of them takes.
            if not torch.stack(filled.aminmax()).isfinite().all():
                for what, count in not_finite_in(source, filled):
                    found[block.hub, what] += count
    return found


def not_finite_in(source: Tensor, filled: Tensor) -> Iterator[tuple[str, int]]:
    """What a block of a file, and what became of it, hold that is no number; with how often, if ever."""
    not_a_number, infinite, all_of_them = (int(x.sum()) for x in (source.isnan(), source.isinf(), ~filled.isfinite()))
    dtype = str(filled.dtype).removeprefix("torch.")
    counts = {**dict(zip(_NOT_NUMBERS, (not_a_number, infinite))), f"too large for {dtype}": all_of_them}
    counts[f"too large for {dtype}"] -= not_a_number + infinite
    yield from ((what, count) for what, count in counts.items() if count)


def _held_part(parameter: Tensor) -> tuple[Tensor, Box]:
    """The tensor that this rank holds of a parameter, and which part of the whole it is."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(range(size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(range(start, start + size) for start, size in zip(offset, shape))


def _slabs(piece: Piece) -> Iterator[Piece]:
    """The piece cut along its first dimension."""
    first, *rest = piece.ours
    rows = max(1, _MAX_COPY // math.prod(map(len, rest)))
    for start in range(first.start, first.stop, rows):
        slab = piece.cut((range(start, start + rows), *rest))
        assert slab is not None
        yield slab


@torch.no_grad()
def copy_into(parameter: Tensor, source: Tensor) -> None:
    """Copies a whole tensor into a parameter; into a DTensor, only this rank's part."""
    held, part = _held_part(parameter)
    held.copy_(source[tuple(slice(r.start, r.stop) for r in part)])


def init_weights(model: nn.Module, *, seed: int, std: float = 0.02) -> None:
    """Random weights: matrices and embeddings normal with `std`, norms 1 in all, biases and attention sinks 0.

    Adapters are left as they are.

    Each tensor has its own generator, seeded by its name, so that every world size starts from the same weights.
    """
    with_offset = {name for name, module in model.named_modules() if isinstance(module, OffsetRMSNorm)}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if is_adapter(name):
            continue
        if leaf.endswith("bias") or leaf == "sinks" or owner in with_offset:
            whole = torch.zeros(parameter.shape)
        elif parameter.ndim == 1:
            whole = torch.ones(parameter.shape)
        else:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
            whole = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
        copy_into(parameter, whole)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one file of safetensors, equal bytes for equal tensors; who may read new files may read it."""
    save_file(dict(tensors), file, metadata={"format": "pt", **(metadata or {})})
    if metadata:
        _sort_metadata(file)
    mask = os.umask(0)  # it cannot be asked for without being set
    os.umask(mask)
    file.chmod(0o666 & ~mask)  # safetensors makes files that only their owner may read


def _sort_metadata(file: Path) -> None:
    """Puts a file's metadata in the order of their names: safetensors writes them in another order each time."""
    with file.open("r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "only the order changes; blanks fill the end"
        f.seek(8)
        f.write(text.ljust(length))


def save_weights(
    folder: Path | str,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes named tensors in the Hub's layout, one file or shards with an index; returns the file names.

    Tensors are taken from the iterable one by one and let go of when their shard is full. Files are written aside and
    renamed at the end. Then the safetensors of an earlier save are removed, which would be read in place of or beside
    the new ones; pickles stay, as every reader prefers safetensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    shard_bytes = total_bytes = 0

    def write_out() -> None:
        nonlocal shard, shard_bytes
        file = folder / new_name(f"part-{len(shards):05d}")
        write_tensors(file, shard, metadata)
        shards.append((file, list(shard)))
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            write_out()
        shard[name] = tensor.detach().cpu().contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    write_out()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    for (file, _), name in zip(shards, names):
        file.rename(folder / new_name(name))
    if len(shards) > 1:
        weight_map = {tensor: name for (_, held), name in zip(shards, names) for tensor in held}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / new_name(INDEX_FILE)).write_text(json.dumps(index, indent=2, sort_keys=True))
        names.append(INDEX_FILE)
    _put_in_place(folder, names)
    return names


def _put_in_place(folder: Path, names: list[str]) -> None:
    """Gives files that are written their names, in place of the weights of an earlier save.

    Whenever this is cut off, every new file is there under one of its names, and a reader finds the old weights, the
    new ones, or an index that names a missing file, but never some of each. So shards whose names come again go first,
    and the index last.
    """
    earlier = {file.name for file in folder.iterdir() if _OURS.fullmatch(file.name)}
    for name in earlier & set(names) - {SINGLE_FILE, INDEX_FILE}:
        (folder / name).unlink()
    for name in names:
        (folder / new_name(name)).replace(folder / name)
    stale = {file.name for file in folder.iterdir() if file.match(new_name("*"))} | (earlier - set(names))
    for name in sorted(stale, key=lambda name: name != INDEX_FILE):  # without the index nothing asks for its shards
        (folder / name).unlink()
