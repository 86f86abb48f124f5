"""Where a checkpoint keeps each of our parameters, as data that loading and exporting both follow.

A family's table says how its files name and lay out our parameters: `Split` for a tensor that holds several of ours (or
one under another name, or transposed), `StackExperts` for many tensors that make one of ours. Either gives `Piece`s: a
block of a parameter, and the block of a file's tensor that holds it. Loading copies the pieces in, exporting copies the
same pieces out, so the two directions cannot disagree; a sharded parameter cuts the pieces to what its rank holds.
Rejected: a pair of functions on whole tensors for each layout, which would have to be kept each other's inverse, and
would hold whole tensors.

Legend: E experts, K kv heads, H heads, C head_dim, D embed_dim, F intermediate_dim.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Shape = tuple[int, ...]
Box = tuple[range, ...]

Layout = dict[str, tuple["Piece", ...]]
"""Our parameters' names, each with the pieces that make it up."""


@dataclass(frozen=True)
class Piece:
    """A block of one of our parameters and the block of a checkpoint's tensor with the same values.

    Attributes:
        hub: the tensor's name in the checkpoint.
        ours: the block in our parameter, one range of step 1 a dimension.
        theirs: the block in the checkpoint's tensor, in the order of our dimensions; None where it lacks the dimension.
        transposed: the checkpoint's tensor has its last two dimensions the other way round.
    """

    hub: str
    ours: Box
    theirs: tuple[range | None, ...]
    transposed: bool = False

    def cut(self, part: Box) -> "Piece | None":
        """What of the piece lies in a part of our parameter; None if nothing does."""
        ours = tuple(range(max(o.start, p.start), min(o.stop, p.stop)) for o, p in zip(self.ours, part))
        if not all(ours):
            return None
        theirs = tuple(
            None if t is None else t[cut.start - own.start : cut.stop - own.start]
            for t, cut, own in zip(self.theirs, ours, self.ours)
        )
        return Piece(self.hub, ours, theirs, self.transposed)

    def in_ours(self, part: Box) -> tuple[slice, ...]:
        """Index of the block in a tensor that holds this part of our parameter."""
        return tuple(slice(o.start - p.start, o.stop - p.start) for o, p in zip(self.ours, part))

    def in_theirs(self) -> tuple[slice, ...]:
        """Index of the block in the checkpoint's tensor."""
        ranges = [t for t in self.theirs if t is not None]
        if self.transposed:
            ranges[-2:] = reversed(ranges[-2:])
        return tuple(slice(r.start, r.stop, r.step) for r in ranges)

    def as_ours(self, block: Tensor) -> Tensor:
        """A block of the checkpoint's tensor with our dimensions: a view, that can be read or written."""
        block = block.mT if self.transposed else block
        for dim, their in enumerate(self.theirs):
            block = block.unsqueeze(dim) if their is None else block
        return block


class Conversion(Protocol):
    """How a checkpoint keeps some of our parameters."""

    @property
    def ours(self) -> tuple[str, ...]:
        """Our names of them, `{}` standing for the layer's number."""

    def pieces(self, shapes: Sequence[Shape], spec: Any) -> list[list[Piece]]:
        """The pieces of each of ours, given their shapes; names still with `{}`."""


def _once(spec: Any) -> int:
    return 1


def kv_heads(spec: Any) -> int:
    """`groups` of a `Split` whose tensor holds queries, keys and values head by head."""
    return int(spec.num_kv_heads)


@dataclass(frozen=True)
class Split:
    """One tensor of the checkpoint that holds one or several of our parameters along a dimension.

    - side by side: `Split(hub, (q, k, v))`;
    - under another layout: `Split(hub, (o,), transposed=True)` for GPT-2's `Conv1D`, which keeps [in, out];
    - head by head: `Split(hub, (q, k, v), groups=kv_heads)` for [K, H / K + 2, C, ...]: a kv head's queries, its key,
      its value. With K = H that is [H, 3, C, ...] (Bloom, GPT-NeoX), with K = 1 [H + 2, C, ...] (Falcon 7B);
    - row by row: `groups` = the number of rows of each, for gate and up rows by turns (GPT-OSS).

    Weights and biases alike, as ours are split along `dim` and no other dimension matters.

    Attributes:
        hub: the checkpoint's name, `{}` standing for the layer's number.
        ours: our names, in the order in which they lie in the tensor (in each group).
        groups: how many times the order repeats, from the architecture.
        dim: the dimension of ours that is split.
        transposed: the checkpoint's tensor has its last two dimensions the other way round.
    """

    hub: str
    ours: tuple[str, ...]
    groups: Callable[[Any], int] = _once
    dim: int = 0
    transposed: bool = False

    def pieces(self, shapes: Sequence[Shape], spec: Any) -> list[list[Piece]]:
        """See `Conversion`."""
        groups = self.groups(spec)
        sizes = [shape[self.dim] // groups for shape in shapes]  # of each in a group
        assert [size * groups for size in sizes] == [shape[self.dim] for shape in shapes], (self.hub, shapes, groups)
        stride, start = sum(sizes), 0
        every = []
        for shape, size in zip(shapes, sizes):
            if size == 1:  # one range with a step, rather than a piece a row
                blocks = [(range(groups), range(start, start + groups * stride, stride))]
            else:
                blocks = [
                    (range(g * size, (g + 1) * size), range(g * stride + start, g * stride + start + size))
                    for g in range(groups)
                ]
            every.append([self._piece(shape, ours, theirs) for ours, theirs in blocks])
            start += size
        return every

    def _piece(self, shape: Shape, ours: range, theirs: range) -> Piece:
        whole = [range(size) for size in shape]
        before, after = whole[: self.dim], whole[self.dim + 1 :]
        return Piece(self.hub, (*before, ours, *after), (*before, theirs, *after), self.transposed)


@dataclass(frozen=True)
class StackExperts:
    """A tensor an expert in the checkpoint, one [E, ...] parameter of ours.

    Attributes:
        hub: the checkpoint's name, `{}` standing for the layer's number and `{expert}` for the expert's.
        ours: our name; or several, if an expert's tensor holds one after the other along its first dimension.
        transposed: the checkpoint's tensors have their dimensions the other way round.
    """

    hub: str
    ours: tuple[str, ...]
    transposed: bool = False

    def pieces(self, shapes: Sequence[Shape], spec: Any) -> list[list[Piece]]:
        """See `Conversion`."""
        of_one = Split(self.hub, self.ours, transposed=self.transposed).pieces([shape[1:] for shape in shapes], spec)
        return [
            [
                Piece(p.hub.replace("{expert}", str(e)), (range(e, e + 1), *p.ours), (None, *p.theirs), p.transposed)
                for e in range(shape[0])
                for p in pieces
            ]
            for shape, pieces in zip(shapes, of_one)
        ]


def fused_experts(router: str) -> tuple[Conversion, ...]:
    """Experts as transformers 5 has them in memory, where somebody wrote that to a file: [E, 2F, D] and [E, D, F].

    Args:
        router: its name there.
    """
    theirs, ours = "model.layers.{}.mlp.experts.", "layers.{}.mlp.experts."
    return (
        Split(router, ("layers.{}.mlp.router.weight",)),
        Split(f"{theirs}gate_up_proj", (f"{ours}gate_proj", f"{ours}up_proj"), dim=1),
        Split(f"{theirs}down_proj", (f"{ours}down_proj",)),
    )


def make_layout(conversions: Iterable[Conversion], shapes: Mapping[str, Shape], spec: Any) -> Layout:
    """Where a checkpoint keeps the parameters of a model.

    Args:
        shapes: of all our parameters, whole, by name.
        spec: the architecture, for conversions that depend on it.

    Returns:
        the pieces of every parameter that a conversion names; others are left out.
    """
    by_pattern = {ours: conversion for conversion in conversions for ours in conversion.ours}
    layout: Layout = {}
    for name in shapes:
        pattern, layer = pattern_of(name)
        if name in layout or pattern not in by_pattern:
            continue
        conversion = by_pattern[pattern]
        together = [ours.replace("{}", layer) for ours in conversion.ours]
        lacking = [ours for ours in together if ours not in shapes]
        assert not lacking, f"the model has {name} but not {lacking}, which lie in the same tensor"
        for ours, pieces in zip(together, conversion.pieces([tuple(shapes[o]) for o in together], spec)):
            layout[ours] = tuple(Piece(p.hub.replace("{}", layer), p.ours, p.theirs, p.transposed) for p in pieces)
    return layout


def without_prefix(layout: Layout, prefix: str) -> Layout:
    """The layout of a checkpoint whose names begin without this."""
    return {
        ours: tuple(replace(piece, hub=piece.hub.removeprefix(prefix)) for piece in pieces)
        for ours, pieces in layout.items()
    }


def pattern_of(name: str) -> tuple[str, str]:
    """A name with `{}` for the layer's number, and that number, empty if there is none.

    >>> pattern_of("layers.3.attn.q_proj.weight"), pattern_of("norm.weight")
    (('layers.{}.attn.q_proj.weight', '3'), ('norm.weight', ''))
    """
    layer = re.search(r"\.(\d+)\.", name)
    return (name, "") if layer is None else (name[: layer.start(1)] + "{}" + name[layer.end(1) :], layer[1])


def hub_shapes(layout: Layout) -> dict[str, Shape]:
    """Shape of every tensor of a checkpoint that the layout reads."""
    shapes: dict[str, Shape] = {}
    for piece in (p for pieces in layout.values() for p in pieces):
        ends = tuple(range(s.start, s.stop, s.step)[-1] + 1 for s in piece.in_theirs())
        shapes[piece.hub] = tuple(map(max, shapes.get(piece.hub, ends), ends))
    return shapes


def hub_tensors(
    layout: Layout,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors that our tensors make, one after the other.

    Sharded ones are gathered one at a time, on all ranks alike. Beyond that, what is held is the tensors of the
    checkpoint that the same parameters go into. A tensor without a place in the layout keeps its name.

    Args:
        layout: of the model.
        tensors: ours by name, whole or sharded; with a tensor, all that share one of the checkpoint's with it.
        dtype: of the result; None keeps each one's own.
        device: where they are put together; `meta` for ranks that only take part in the gathering.
    """
    shapes = hub_shapes(layout)
    layout = {name: layout[name] for name in tensors if name in layout}
    makers: dict[str, dict[str, None]] = {}  # of each of the checkpoint's tensors, in order
    for name, pieces in layout.items():
        for piece in pieces:
            makers.setdefault(piece.hub, {})[name] = None
    done: set[str] = set()
    for name in tensors:
        if name in done:
            continue
        together = list(dict.fromkeys(ours for p in layout.get(name, ()) for ours in makers[p.hub])) or [name]
        done.update(together)
        pieces = layout.get(name, ())
        if len(together) == 1 and (not pieces or _is_rename(pieces)):
            whole = whole_tensor(tensors[name])
            yield pieces[0].hub if pieces else name, whole.to(dtype) if dtype is not None else whole
            continue
        put_together: dict[str, Tensor] = {}
        num_written: Counter[str] = Counter()
        for ours in together:
            whole = whole_tensor(tensors[ours])
            everything = tuple(range(size) for size in whole.shape)
            for piece in layout[ours]:
                if piece.hub not in put_together:
                    put_together[piece.hub] = torch.empty(shapes[piece.hub], dtype=dtype or whole.dtype, device=device)
                piece.as_ours(put_together[piece.hub][piece.in_theirs()]).copy_(whole[piece.in_ours(everything)])
                num_written[piece.hub] += math.prod(map(len, piece.ours))
            del whole
        lacking = [name for name, tensor in put_together.items() if num_written[name] != tensor.numel()]
        assert not lacking, f"{lacking} hold more of our tensors than were given"
        yield from put_together.items()


def _is_rename(pieces: tuple[Piece, ...]) -> bool:
    """Whether one of the checkpoint's tensors, of which these are all there is, is one of ours as it is."""
    first, *more = pieces
    return not more and first.theirs == first.ours and not first.transposed


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, detached; collective where it is."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
