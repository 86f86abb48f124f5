"""Vocabularies of another size: rows of the embedding and of the head, in memory or when weights are read.

A recipe builds its model on the meta device, shards it and reads the weights last. There are no values then to take a
mean of when the size changes, so a model on the meta device only notes what is new, and reading makes the rows from
the file's own (`with_new_rows`): every rank finds the same ones, and none holds a whole embedding.

Legend: V rows of the file or model, D embed_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchmask.errors import ConfigError
from torchmask.models.conversions import Layout
from torchmask.models.weight_files import FileTensor
from torchmask.modules.decoder import Decoder

Init = Literal["mean", "noise"]
_TABLES = ("embed_tokens.weight", "lm_head.weight")
_NOTE = "new_rows"  # attribute of a model on the meta device
_BLOCK_ROWS = 8192
_NOISE = 0.02  # of the trained rows' standard deviation: enough to tell new tokens apart, too little to move their mean


@dataclass(frozen=True)
class NewRows:
    """Rows of a model that a checkpoint does not have.

    Attributes:
        num_held: rows of the checkpoint.
        num_trained: how many of these are worth something; rows from here on are new.
        init: how new ones are made.
    """

    num_held: int
    num_trained: int
    init: Init


def resize_embeddings(
    model: Decoder,
    vocab_size: int,
    *,
    multiple_of: int | None = None,
    init: Init = "mean",
    num_trained: int | None = None,
) -> int:
    """Makes the embedding and the head as long as a vocabulary; returns the number of rows.

    Before sharding and adapters. A model on the meta device gets its new rows when `load_pretrained` fills it.

    Args:
        vocab_size: rows that are needed.
        multiple_of: the next multiple of this many rows is made, for even shards or faster products.
        init: `mean` of the trained rows, so that a new token is neither likely nor unlikely; `noise` adds a little,
            always the same, so that new tokens differ from the start.
        num_trained: rows from here on are made anew also where there are some, as behind Qwen's own tokens; None keeps
            all that there are.

    Raises:
        ConfigError: C13, a size below 1; C09, a sharded model, or rows to be cut off that hold something.
    """
    if vocab_size < 1 or (multiple_of is not None and multiple_of < 1):
        raise ConfigError("C13", f"vocab_size {vocab_size}, multiple_of {multiple_of}: both must be at least 1")
    if init not in ("mean", "noise"):
        raise ConfigError("C09", f"init is {init!r}", where="init", fix="choose mean or noise")
    tables: list[nn.Module] = [model.embed_tokens] if model.spec.tie_embeddings else [model.embed_tokens, model.lm_head]
    if any(isinstance(table.weight, DTensor) for table in tables):
        raise ConfigError("C09", "a sharded model cannot be resized", fix="resize it before it is sharded")
    held = model.spec.vocab_size
    size = vocab_size if multiple_of is None else -(-vocab_size // multiple_of) * multiple_of
    trained = min(held, size) if num_trained is None else num_trained
    if not 1 <= trained <= min(held, size):
        raise ConfigError("C13", f"num_trained is {trained}, of {held} rows", where="num_trained")
    if size < held:
        _refuse_to_cut(tables, size)
    if size == held == trained:
        return size
    if model.embed_tokens.weight.is_meta:
        earlier: NewRows | None = vars(model).get(_NOTE)
        in_file, before = (held, held) if earlier is None else (earlier.num_held, earlier.num_trained)
        vars(model)[_NOTE] = NewRows(in_file, min(trained, before), init)
    for table in tables:
        table.weight = _resized(table.weight, size, trained, init)
    model.embed_tokens.num_embeddings = model.lm_head.out_features = size
    model.spec = replace(model.spec, vocab_size=size)
    model.tie_weights()
    model.hub_config = {**model.hub_config, "vocab_size": size}
    return size


def has_new_rows(model: Decoder) -> bool:
    """Whether the vocabulary was enlarged on the meta device, and the new rows are not made yet."""
    return _NOTE in vars(model)


def _refuse_to_cut(tables: list[nn.Module], size: int) -> None:
    """Rows that are all 0, or several that are all the same, were never trained."""
    for table in tables:
        weight = table.weight
        assert isinstance(weight, Tensor)
        num_cut = weight.shape[0] - size
        if not weight.is_meta:
            cut = weight[size:]
            if not cut.any() or (num_cut > 1 and bool((cut == cut[0]).all())):
                continue
        raise ConfigError(
            "C09",
            f"vocab_size {size} would cut {num_cut} of {weight.shape[0]} rows off that hold something",
            where="vocab_size",
            fix="keep the size: rows that no token uses do no harm",
        )


@torch.no_grad()
def _resized(weight: Tensor | nn.Module, size: int, num_trained: int, init: Init) -> nn.Parameter:
    assert isinstance(weight, Tensor)
    whole = weight.new_empty(size, weight.shape[1])
    if not weight.is_meta:
        kept = weight[:num_trained]
        whole[:num_trained] = kept
        whole[num_trained:] = _new_rows(kept.split(_BLOCK_ROWS), size - num_trained, init).to(whole)
    return nn.Parameter(whole, requires_grad=weight.requires_grad)


def _new_rows(blocks: Iterator[Tensor] | tuple[Tensor, ...], num_new: int, init: Init) -> Tensor:
    """[num_new, D] in fp64 from blocks [.., D] of the trained rows; the sums are in fp64, whatever the rows are in."""
    total = squares = torch.zeros((), dtype=torch.float64)
    count = 0
    for block in blocks:
        block = block.to("cpu", torch.float64)
        total, squares, count = total + block.sum(0), squares + block.square().sum(0), count + len(block)
    mean = total / count
    rows = mean.expand(num_new, -1).clone()
    if init == "noise":
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        generator = torch.Generator().manual_seed(num_new)
        rows += _NOISE * std * torch.randn(rows.shape, dtype=torch.float64, generator=generator)
    return rows


@dataclass(frozen=True)
class _Grown:
    """A tensor of a file with other rows behind some of its own; see `FileTensor`."""

    tensor: FileTensor
    shape: tuple[int, ...]
    num_trained: int
    new: Tensor

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def file(self) -> Path:
        return self.tensor.file

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def read(self, index: tuple[slice, ...]) -> Tensor:
        rows, columns = index
        start, stop, _ = rows.indices(self.shape[0])
        parts = []
        if start < self.num_trained:
            parts.append(self.tensor.read((slice(start, min(stop, self.num_trained)), columns)))
        if stop > self.num_trained:
            first = max(start, self.num_trained) - self.num_trained
            new = self.new[first : stop - self.num_trained, columns]
            parts.append(new.to(parts[0].dtype) if parts else new)
        return torch.cat(parts)


def with_new_rows(model: Decoder, tensors: dict[str, FileTensor], layout: Layout) -> dict[str, FileTensor]:
    """The tensors of a checkpoint with the rows that `resize_embeddings` noted, if they lack them; once a model.

    Args:
        model: any; of one that was not resized, the tensors come back as they are.
        tensors: of the checkpoint, by name.
        layout: where the checkpoint keeps each parameter.
    """
    note: NewRows | None = vars(model).get(_NOTE)
    if note is None:
        return tensors
    del vars(model)[_NOTE]
    size, grown = model.spec.vocab_size, dict(tensors)
    for ours in _TABLES:
        for hub in {piece.hub for piece in layout.get(ours, ())} & tensors.keys():
            tensor = tensors[hub]
            if tensor.shape[0] == note.num_held and len(tensor.shape) == 2:
                new = _new_rows(_blocks(tensor, note.num_trained), size - note.num_trained, note.init)
                grown[hub] = _Grown(tensor, (size, tensor.shape[1]), note.num_trained, new)
    return grown


def _blocks(tensor: FileTensor, num_rows: int) -> Iterator[Tensor]:
    for start in range(0, num_rows, _BLOCK_ROWS):
        yield tensor.read((slice(start, min(start + _BLOCK_ROWS, num_rows)), slice(None)))
