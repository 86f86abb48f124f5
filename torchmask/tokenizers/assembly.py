"""Many conversations tokenised in one go: what `pieces.assemble` says of each, with numpy's loops in place of Python's.

Every stretch of text is still encoded alone and in its own context; what is shared is the call into the library, and
the arithmetic from tokens to pieces. The pieces of all conversations lie on one axis of characters, a control token
being its text, so that one pass over flat arrays finds the owners of all tokens. Rendering conversations one after the
other spends four times as long on small arrays as the library does on the text.

Legend: C conversations, P pieces, S segments (a control token, or text up to the next one), n tokens.
"""

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.messages import Piece, RenderedBatch, TokenKind
from torchmask.tokenizers.backend import Encoded, EncodedTexts, IntArray, offsets_of

_Ints = npt.NDArray[np.int64]


def assemble_many(
    conversations: Sequence[Sequence[Piece]],
    *,
    encode_many: Callable[[Sequence[str]], EncodedTexts],
    encode_structure: Callable[[str], Encoded],
    encode_control: Callable[[str], Encoded],
    encode_rest: Callable[[str], Encoded] | None = None,
    encode_first: Callable[[str], Encoded] | None = None,
    with_characters: bool = True,
) -> RenderedBatch:
    """The renderings of conversations, each equal to what `assemble` makes of it.

    Args:
        conversations: the pieces of each; fewer than 2**31 characters together.
        encode_many: encodes runs of text, each alone.
        encode_structure, encode_control, encode_rest, encode_first: see `assemble`.
        with_characters: fill in `content_starts` and `content_ends`; else they are -1.
    """
    kept = [[piece for piece in pieces if piece.text] for pieces in conversations]
    flat = [piece for pieces in kept for piece in pieces]
    piece_offsets = offsets_of([len(pieces) for pieces in kept])
    if not flat:
        none = np.zeros(0, np.int32)
        zeros = np.zeros(len(kept) + 1, np.int64)
        bases = np.zeros(len(kept), np.int32)
        return RenderedBatch(none, none.astype(np.uint8), none, none, none, zeros, zeros[1:], kept, none, none, bases)
    columns = _Columns(flat)
    firsts, is_fresh, goes_on = _segments(columns, piece_offsets)
    is_first = np.isin(firsts, piece_offsets[:-1]) if encode_first is not None else np.zeros_like(goes_on)
    encoded = _encode_segments(
        columns,
        firsts,
        goes_on,
        is_first,
        encode_many=encode_many,
        encode_structure=encode_structure,
        encode_control=encode_control,
        encode_rest=encode_rest,
        encode_first=encode_first,
    )
    # Where each conversation's segments begin, then its tokens.
    segment_of_piece = np.cumsum(is_fresh) - 1
    first_segments = np.append(segment_of_piece, len(firsts))[piece_offsets]
    offsets = encoded.offsets[first_segments]
    return _with_owners(columns, encoded, kept, piece_offsets, offsets, with_characters=with_characters)


class _Columns:
    """Pieces as arrays: `texts` [P]; `kinds`, `turns`, `is_token`, `offsets`, `apart` [P]; `begins`, `ends` [P]."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        texts, kinds, turns, is_token, offsets, apart, _ = zip(*pieces)
        self.texts: tuple[str, ...] = texts
        # By way of bytes and arrays, which is several times as fast as numpy on tuples.
        self.kinds = np.frombuffer(bytes(kinds), np.uint8)
        self.turns = np.frombuffer(array("i", turns), np.int32)
        self.is_token = np.frombuffer(bytes(is_token), np.bool_)
        self.offsets = np.frombuffer(array("i", offsets), np.int32)
        self.apart = np.frombuffer(bytes(apart), np.bool_)
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        self.lengths = lengths
        self.ends = np.cumsum(lengths).astype(np.int32)
        self.begins = (self.ends - lengths).astype(np.int32)


def _segments(columns: _Columns, piece_offsets: _Ints) -> tuple[_Ints, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """First piece of each segment [S], whether a piece begins one [P], whether a segment goes on after a cut [S]."""
    follows_text = np.concatenate(([False], ~columns.is_token[:-1]))
    follows_text[piece_offsets[:-1][piece_offsets[:-1] < len(follows_text)]] = False
    is_fresh = columns.is_token | ~follows_text | columns.apart
    firsts = np.flatnonzero(is_fresh)
    goes_on = (columns.apart & follows_text & ~columns.is_token)[firsts]
    return firsts, is_fresh, goes_on


def _encode_segments(
    columns: _Columns,
    firsts: _Ints,
    goes_on: npt.NDArray[np.bool_],
    is_first: npt.NDArray[np.bool_],
    *,
    encode_many: Callable[[Sequence[str]], EncodedTexts],
    encode_structure: Callable[[str], Encoded],
    encode_control: Callable[[str], Encoded],
    encode_rest: Callable[[str], Encoded] | None,
    encode_first: Callable[[str], Encoded] | None,
) -> EncodedTexts:
    """The tokens of all segments, with characters counted over all pieces."""
    stops = np.append(firsts[1:], len(columns.texts))
    texts = [
        columns.texts[a] if b - a == 1 else "".join(columns.texts[a:b]) for a, b in zip(firsts.tolist(), stops.tolist())
    ]
    is_token = columns.is_token[firsts]
    has_own_words = np.logical_or.reduceat(columns.kinds != TokenKind.STRUCTURE, firsts)
    is_rest = goes_on if encode_rest is not None else np.zeros_like(goes_on)
    is_first = is_first & ~is_token
    is_run = ~is_token & ~is_rest & ~is_first & has_own_words
    runs = np.flatnonzero(is_run)
    found = encode_many([texts[i] for i in runs.tolist()])

    # Segments that return in every conversation are encoded once and referred to.
    others = np.flatnonzero(~is_run)
    ways = (is_token.astype(np.int8) + 2 * is_rest + 3 * is_first)[others].tolist()
    keys = list(zip(ways, [texts[i] for i in others.tolist()]))
    constants = {key: len(runs) + i for i, key in enumerate(dict.fromkeys(keys))}
    unit = np.empty(len(texts), np.int64)
    unit[runs] = np.arange(len(runs))
    unit[others] = list(map(constants.__getitem__, keys))
    encoders: list[Any] = [encode_structure, encode_control, encode_rest, encode_first]
    units = [encoders[way](text) for way, text in constants]

    sizes = np.concatenate([np.diff(found.offsets), [len(u.ids) for u in units]]).astype(np.int64)
    unit_firsts = np.cumsum(sizes) - sizes
    counts = sizes[unit]
    offsets = offsets_of(counts)
    segment = np.repeat(np.arange(len(texts)), counts)  # [n], of each token
    places = np.arange(int(offsets[-1])) + (unit_firsts[unit] - offsets[:-1])[segment]
    ids, starts, ends = (
        np.concatenate([column, *of_units])[places]
        for column, of_units in zip(found[:3], zip(*units) if units else ([], [], []))
    )
    begins = columns.begins[firsts]
    # A token that covers nothing at the end stays in its segment.
    last = (columns.ends[stops - 1] - 1 - begins)[segment]
    base = begins[segment]
    return EncodedTexts(ids, np.minimum(starts, last) + base, ends + base, offsets)


def _with_owners(
    columns: _Columns,
    encoded: EncodedTexts,
    kept: Sequence[Sequence[Piece]],
    piece_offsets: _Ints,
    offsets: _Ints,
    *,
    with_characters: bool,
) -> RenderedBatch:
    """Kinds and messages of tokens by the characters they share with pieces, as in `pieces.assemble`."""
    piece_of_char = np.repeat(np.arange(len(columns.texts), dtype=np.int32), columns.lengths)
    first = piece_of_char[encoded.starts]
    last = np.maximum(piece_of_char[np.maximum(encoded.ends - 1, 0)], first)
    is_content = columns.kinds == TokenKind.CONTENT
    last_content = np.maximum.accumulate(np.where(is_content, np.arange(len(is_content)), -1))[last]
    owner = np.where(last_content >= first, last_content, first)
    structure_until = offsets_of(~is_content)
    is_straddler = (structure_until[last + 1] > structure_until[first]) & is_content[owner]

    content_starts = content_ends = np.broadcast_to(np.int32(-1), encoded.ids.shape)
    if with_characters:
        known = columns.offsets[owner] >= 0
        owner_begins, owner_ends = columns.begins[owner], columns.ends[owner]
        shift = columns.offsets[owner] - owner_begins
        content_starts = _relative(encoded.starts, owner_begins, owner_ends, shift, known)
        content_ends = _relative(encoded.ends, owner_begins, owner_ends, shift, known)
    straddlers_until = offsets_of(is_straddler)
    bases = np.append(columns.begins, columns.ends[-1])[piece_offsets[:-1]]
    return RenderedBatch(
        tokens=encoded.ids,
        kinds=columns.kinds[owner],
        turns=columns.turns[owner],
        content_starts=content_starts,
        content_ends=content_ends,
        offsets=offsets,
        num_straddlers=np.diff(straddlers_until[offsets]),
        pieces=kept,
        starts=encoded.starts,
        ends=encoded.ends,
        bases=bases,
    )


def _relative(
    chars: IntArray, begins: IntArray, ends: IntArray, shift: IntArray, known: npt.NDArray[np.bool_]
) -> IntArray:
    """Characters counted in their message's own text; -1 where they are not of it."""
    return np.where(known, np.minimum(np.maximum(chars, begins), ends) + shift, -1).astype(np.int32)
