"""The layout of an adapter folder, PEFT's: which of the Hub's modules hold which of our linear layers.

Where a family's files hold several of our layers in one tensor (Phi-3's qkv_proj, GPT-2's c_attn), so does the adapter:
its A is theirs one under the other, its B has each one's rows in its own columns, which is the same sum of products.
The family's table of conversions says which rows those are. On the way in, each layer gets the whole A and its rows of
B, whichever program made them.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from torchmask.models.conversions import Layout, Piece
from torchmask.models.folder import family_of
from torchmask.models.meta_llama import checkpoint_files, is_meta_folder
from torchmask.models.weight_files import open_files, open_folder
from torchmask.modules.decoder import Decoder

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A, B, WEIGHT = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".weight"
BASE = "base_fingerprint"  # in the metadata of the weights
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_SAMPLE = 512


@dataclass(frozen=True)
class Part:
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
class Module:
    """A module of the Hub's that holds linear layers of ours.

    Attributes:
        name: the Hub's.
        parts: the layers.
        num_rows: of its weight, which are its results; other layers may make some of them.
    """

    name: str
    parts: tuple[Part, ...]
    num_rows: int


def layout_of(model: Decoder) -> Layout:
    """Where an adapter folder keeps each parameter, by the names of transformers' modules.

    They are those in the files, but for the head: it is `lm_head` everywhere, also GPT-NeoX's `embed_out`.
    """
    layout = family_of(model.hub_config).layout(model)
    return {**layout, HEAD: tuple(replace(piece, hub=HEAD) for piece in layout[HEAD])}


def modules_of(layout: Layout, layers: Iterable[str]) -> dict[str, Module]:
    """The Hub's modules that hold linear layers of ours, by name."""
    num_rows: dict[str, int] = {}
    for piece in (piece for pieces in layout.values() for piece in pieces if len(piece.ours) == 2):
        rows = piece.theirs[0]
        if rows is not None:
            num_rows[piece.hub] = max(num_rows.get(piece.hub, 0), rows[-1] + 1)
    parts: dict[str, list[Part]] = {}
    for name in layers:
        pieces = layout[f"{name}{WEIGHT}"]
        for hub in dict.fromkeys(piece.hub for piece in pieces):
            parts.setdefault(hub, []).append(Part(name, tuple(piece for piece in pieces if piece.hub == hub)))
    names = {hub: hub.removesuffix(WEIGHT) for hub in parts}
    return {names[hub]: Module(names[hub], tuple(held), num_rows[hub]) for hub, held in parts.items()}


def weights_fingerprint(folder: str | Path) -> str:
    """What tells a model's weights from another's: a sha256 of every tensor's name, shape and first numbers in bf16.

    Not of all numbers, which would take as long as loading; two trained models differ everywhere. In bf16, so that a
    copy in another dtype is the same model.

    Raises:
        WeightsError: the folder's weights are missing or damaged.
    """
    folder = Path(folder).expanduser()
    each = (
        [open_files([file]) for file in checkpoint_files(folder)] if is_meta_folder(folder) else [open_folder(folder)]
    )
    digest = hashlib.sha256()
    for name, tensor in (named for tensors in each for named in sorted(tensors.items())):
        digest.update(f"{name} {tensor.shape}".encode())
        *before, last = tensor.shape or (1,)
        first = (*(slice(0, 1) for _ in before), slice(0, min(last, _SAMPLE)))
        values = tensor.read(first if tensor.shape else ())
        digest.update(values.reshape(-1).to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
