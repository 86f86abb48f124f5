"""Files of weights as tensors that are read block by block: safetensors, and pickles that torch reads as plain data.

A `FileTensor` knows name, shape and dtype; `read` takes a block out of the mapped file. Nothing here knows a family.
Every fault of a file is told with the file's name, what was found and the way out, since the libraries' own messages
name no file.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchmask.errors import WeightsError
from torchmask.models.mxfp4 import dequantise

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLED_FILE, PICKLED_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLES = (".bin", ".pt", ".pth")
_GET_AGAIN = "get the file again; `torchmask download REPO --force` replaces it"
_SAFER = "get the safetensors version of the model, or convert it where you trust the source"
_MAX_ROWS = 10
_MAX_READ_BYTES = 256 * 2**20
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class FileTensor(Protocol):
    """A tensor in a file."""

    @property
    def name(self) -> str:
        """In the file."""

    @property
    def file(self) -> Path:
        """Which file holds it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    @property
    def dtype(self) -> str:
        """By safetensors' name, such as `F32`; of pickled tensors of other dtypes, torch's."""

    def read(self, index: tuple[slice, ...]) -> Tensor:
        """A block, one slice of positive step a dimension; a view of the mapped file where it can be."""


@dataclass
class _OpenFile:
    """The one file that is open; the next one closes it.

    Pages of a mapped file count as this process's memory until it is closed, so it is opened anew every now and then.
    """

    path: Path | None = None
    content: Any = None
    num_bytes: int = 0

    def read(self, path: Path, name: str, index: tuple[slice, ...]) -> Tensor:
        pickled = path.suffix in PICKLES
        if path != self.path or (self.num_bytes > _MAX_READ_BYTES and not pickled):  # an old pickle is read as a whole
            self.content = None
            self.path, self.content, self.num_bytes = path, load_pickle(path) if pickled else open_safetensors(path), 0
        block: Tensor = self.content[name][index] if pickled else self.content.get_slice(name)[index]
        self.num_bytes += block.nbytes
        return block


@dataclass(frozen=True)
class PlainTensor:
    """A tensor as it lies in a file; see `FileTensor`."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    opened: _OpenFile = field(repr=False, compare=False)

    def read(self, index: tuple[slice, ...]) -> Tensor:
        """See `FileTensor`."""
        return self.opened.read(self.file, self.name, index)


@dataclass(frozen=True)
class PackedTensor:
    """A tensor in MXFP4, which two tensors of the file hold; what is read of it is bf16, which is exact.

    Attributes:
        blocks: [..., R, G, 16] uint8, two numbers a byte.
        scales: [..., R, G] uint8, a power of two for 32 numbers.
    """

    blocks: FileTensor
    scales: FileTensor

    @property
    def name(self) -> str:
        """See `FileTensor`."""
        return self.blocks.name.removesuffix("_blocks")

    @property
    def file(self) -> Path:
        """See `FileTensor`."""
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., 32 G, R]: packed along what is the second last dimension of the tensor itself."""
        *before, rows, groups, num_bytes = self.blocks.shape
        return (*before, groups * num_bytes * 2, rows)

    @property
    def dtype(self) -> str:
        """See `FileTensor`."""
        return "BF16"

    def read(self, index: tuple[slice, ...]) -> Tensor:
        """See `FileTensor`; whole rows are unpacked."""
        *before, column, row = index
        at = (*before, row, slice(None))
        rows = dequantise(self.blocks.read((*at, slice(None))), self.scales.read(at))
        return rows[..., column].mT


def check_folder(folder: Path) -> Path:
    """The folder, if it is no file.

    Raises:
        WeightsError: W03, it is.
    """
    if folder.is_file():
        fix = f"name the folder that holds it, {folder.parent}"
        raise WeightsError("W03", "this is a file; a model is a folder", where=str(folder.absolute()), fix=fix)
    return folder


def open_folder(folder: Path) -> dict[str, FileTensor]:
    """The tensors of a folder in Hugging Face layout, by name; safetensors if there are any, else pickles.

    Raises:
        WeightsError: no weights, a shard of the index is missing, a file is damaged, or a pickle is more than tensors.
    """
    if (folder / INDEX_FILE).exists():
        tensors = _open_indexed(folder / INDEX_FILE)
    elif files := [folder / SINGLE_FILE] if (folder / SINGLE_FILE).exists() else sorted(folder.glob("*.safetensors")):
        tensors = open_files(files)
    elif (folder / PICKLED_INDEX_FILE).exists():
        tensors = _open_indexed(folder / PICKLED_INDEX_FILE)
    elif (folder / PICKLED_FILE).exists():
        tensors = open_files([folder / PICKLED_FILE])
    else:
        raise _no_weights(folder)
    for name in [name for name in tensors if name.endswith("_blocks")]:
        scales = f"{name.removesuffix('_blocks')}_scales"
        if scales in tensors and tensors[name].dtype == "U8":
            packed = PackedTensor(tensors.pop(name), tensors.pop(scales))
            tensors[packed.name] = packed
    return tensors


def open_files(files: Iterable[Path]) -> dict[str, FileTensor]:
    """The tensors of some files, by name.

    Raises:
        WeightsError: W05, two files hold a tensor of the same name, and W01, W02, W03 or W06 as their readers say.
    """
    opened = _OpenFile()
    tensors: dict[str, FileTensor] = {}
    for tensor in (tensor for file in files for tensor in _tensors_of(file, opened)):
        other = tensors.setdefault(tensor.name, tensor)
        if other is not tensor:
            raise WeightsError(
                "W05",
                f"{tensor.name} is in {other.file.name} and in {tensor.file.name}, and no index says which counts",
                where=str(tensor.file.parent),
                fix="remove the file that does not belong to the model, or download the folder again",
            )
    return tensors


def _tensors_of(file: Path, opened: _OpenFile) -> Iterator[FileTensor]:
    if file.suffix in PICKLES:
        for name, held in load_pickle(file).items():
            yield PlainTensor(name, file, tuple(held.shape), _DTYPES.get(held.dtype, str(held.dtype)), opened)
        return
    with open_safetensors(file) as f:
        for name in f.keys():  # noqa: SIM118
            piece = f.get_slice(name)
            yield PlainTensor(name, file, tuple(piece.get_shape()), piece.get_dtype(), opened)


def _open_indexed(index: Path) -> dict[str, FileTensor]:
    weight_map, folder = _read_index(index), index.parent
    missing = sorted({name for name in weight_map.values() if not (folder / name).exists()})
    if missing:
        fix = "download the folder again; `torchmask download` fetches only what is missing"
        if any((folder / new_name(name)).exists() for name in missing):
            fix = f"a save was cut off here: save again, or rename the files it left ({new_name(missing[0])}, ...)"
        shown = ", ".join(missing)
        raise WeightsError("W03", f"shards named in {index.name} are missing: {shown}", where=str(folder), fix=fix)
    opened = _OpenFile()
    files = (folder / name for name in sorted(set(weight_map.values())))
    tensors = {
        tensor.name: tensor
        for file in files
        for tensor in _tensors_of(file, opened)
        if folder / weight_map.get(tensor.name, "") == file
    }
    lost = sorted(weight_map.keys() - tensors.keys())
    if lost:
        message = f"{index.name} says that {lost[0]} is in {weight_map[lost[0]]}, and it is not"
        raise WeightsError("W03", message, where=str(folder), fix="download the folder again")
    return {name: tensors[name] for name in weight_map}


def new_name(name: str) -> str:
    """What a file is called while the save that makes it is under way; no reader takes it for weights."""
    return f".{name}.new"


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map is not a table of file names")
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError("W01", f"not a valid index: {error}", where=str(file), fix=_GET_AGAIN) from error
    return weight_map


def open_safetensors(file: Path) -> Any:
    """`safe_open(file)`; a damaged file is a `WeightsError` that names it (W01 truncated, W02 something else)."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _not_weights(file) or _damaged(file, error) from error


def load_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file, memory-mapped, or read into memory where the format is that of before 2020.

    Torch's unpickler for weights makes tensors and plain containers and runs nothing else.

    Raises:
        WeightsError: W06 if it refuses the file or there is more than named tensors; W01, W02 or W03 if it is none.
    """
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            content = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        inner = str(error.__context__ or error).strip()  # torch wraps it in advice
        reason = inner.partition("\n")[0].partition(". ")[0]
        if _is_cut_off(file, inner):
            raise _not_weights(file) or _damaged(file, UnpicklingError(reason)) from error
        refused = f"torch refuses these pickled weights, as they are more than tensors and could run code: {reason}"
        raise _not_weights(file) or WeightsError("W06", refused, where=str(file), fix=_SAFER) from error
    except Exception as error:  # what an unpickler makes of rubbish can be any
        raise _not_weights(file) or _damaged(file, error) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        what = f"keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else type(content).__name__
        raise WeightsError(
            "W06", f"pickled weights must be named tensors; this has {what}", where=str(file), fix=_SAFER
        )
    return content


def _is_cut_off(file: Path, refusal: str) -> bool:
    """Whether the unpickler only stumbles over a name that ends with the file, or over what never was a pickle."""
    name = re.match(r"Unsupported global: GLOBAL (\S*)", refusal)
    with file.open("rb") as f:
        if name is None:
            return refusal.startswith("Unsupported operand") and f.read(1) != b"\x80"  # which all of torch's begin with
        f.seek(max(0, file.stat().st_size - len(name[1]) - 2))
        tail = f.read()[:-1].replace(b"\n", b".")  # it takes the last byte for the line's end
    return tail.rstrip(b".").endswith(name[1].rstrip(".").encode())


def _not_weights(file: Path) -> WeightsError | None:
    """What to tell of a file that plainly is something else; None if it may be weights."""
    if not file.exists():
        return WeightsError("W03", "no such file", where=str(file), fix=_GET_AGAIN)
    if file.is_dir():
        return WeightsError("W02", "this is a folder, not weights", where=str(file), fix=_GET_AGAIN)
    with file.open("rb") as f:
        head = f.read(128)
    if head.startswith(b"version https://git-lfs"):
        return WeightsError(
            "W02", "this is a git-lfs pointer, not weights", where=str(file), fix=f"`git lfs pull`, or {_GET_AGAIN}"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return WeightsError("W02", "this is an HTML page, not weights", where=str(file), fix=_GET_AGAIN)
    return None


def _damaged(file: Path, error: BaseException) -> WeightsError:
    size = file.stat().st_size
    wanted = _bytes_wanted(file, size)
    found = f"the file is truncated or damaged: {size:,} bytes found"
    if wanted is not None and wanted != size:
        found += f", its header asks for {wanted:,}"
    reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    return WeightsError("W01", f"{found} ({reason})", where=str(file), fix=_GET_AGAIN)


def _bytes_wanted(file: Path, size: int) -> int | None:
    with file.open("rb") as f:
        header_bytes = int.from_bytes(f.read(8), "little")
        if size < 8 or header_bytes > min(size, 100 * 2**20):
            return None
        try:
            header = json.loads(f.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return 8 + header_bytes + int(max(ends, default=0))
        except (ValueError, LookupError, TypeError, AttributeError):  # a pickle, or no header of tensors
            return None


def _no_weights(folder: Path) -> WeightsError:
    if not folder.is_dir():
        return WeightsError("W03", "no such folder", where=str(folder.absolute()), fix="check the path")
    found = sorted(p.name for p in folder.iterdir())
    pickles = [name for name in found if name.endswith(PICKLES)]
    if pickles:
        return WeightsError(
            "W06",
            f"only pickled weights here ({', '.join(pickles[:3])}), and none is named {PICKLED_FILE}",
            where=str(folder),
            fix=f"{_SAFER}; or rename a file of named tensors to {PICKLED_FILE}",
        )
    listing = ", ".join(found[:_MAX_ROWS]) or "nothing"
    return WeightsError(
        "W03",
        f"no {SINGLE_FILE} or {INDEX_FILE}; the folder holds {listing}",
        where=str(folder),
        fix="name a folder in Hugging Face layout; `torchmask download` makes one",
    )
