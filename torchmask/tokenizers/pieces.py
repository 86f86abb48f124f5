"""A conversation as a chat format writes it, and its single tokenisation in context.

A chat format writes pieces: control tokens by name, and text that belongs to a message. All text between two control
tokens is tokenised in one go, and a token's kind and message follow from the characters it covers. Tokenising pieces
alone would give other ids at their edges, and searching for the ids of markers would find those that a user typed.
"""

from collections.abc import Callable, Sequence

import numpy as np

from torchmask.messages import Piece, Rendered, TokenKind
from torchmask.tokenizers.backend import Encoded, IntArray

__all__ = ["Piece", "assemble"]


def assemble(
    pieces: Sequence[Piece],
    *,
    encode: Callable[[str], Encoded],
    encode_structure: Callable[[str], Encoded],
    encode_control: Callable[[str], Encoded],
    encode_rest: Callable[[str], Encoded] | None = None,
    encode_first: Callable[[str], Encoded] | None = None,
) -> Rendered:
    """The rendering of `pieces`.

    Args:
        pieces: the conversation.
        encode: encodes a run of text.
        encode_structure: the same for runs without content, which return in every conversation and may be cached.
        encode_control: one control token by its text, covering all of it; may be cached too.
        encode_rest: encodes text that goes on after a cut (`Piece.apart`), as in the middle of a text; None = `encode`.
        encode_first: encodes text that the conversation begins with, where that differs; None = `encode`.
    """
    pieces = [piece for piece in pieces if piece.text]
    ids: list[IntArray] = []
    starts: list[IntArray] = []  # characters counted over the whole conversation, a control token being its text
    ends: list[IntArray] = []
    base = at = 0
    while at < len(pieces):
        piece = pieces[at]
        if piece.is_token:
            length = len(piece.text)
            encoded = encode_control(piece.text)
            at += 1
        else:
            run = [piece]
            goes_on = piece.apart and at > 0 and not pieces[at - 1].is_token
            while (at := at + 1) < len(pieces) and not pieces[at].is_token and not pieces[at].apart:
                run.append(pieces[at])
            text = "".join([piece.text for piece in run])
            length = len(text)
            if goes_on and encode_rest is not None:
                encoded = encode_rest(text)
            elif base == 0 and encode_first is not None:
                encoded = encode_first(text)
            else:
                is_constant = all(piece.kind == TokenKind.STRUCTURE for piece in run)
                encoded = encode_structure(text) if is_constant else encode(text)
        ids.append(encoded.ids)
        starts.append(
            np.minimum(encoded.starts, length - 1) + base
        )  # one that covers nothing at the end stays in its run
        ends.append(encoded.ends + base)
        base += length
    if not ids:
        none = np.zeros(0, np.int32)
        return Rendered(none, none.astype(np.uint8), none, 0, none, none, [], none, none)
    return _rendered(pieces, Encoded(*map(np.concatenate, (ids, starts, ends))))


def _rendered(pieces: Sequence[Piece], encoded: Encoded) -> Rendered:
    """Kinds and messages of tokens by the characters they share with pieces.

    A token over several pieces belongs to the last of them that is content.
    """
    piece_ends = np.cumsum([len(piece.text) for piece in pieces])
    kinds = np.array([piece.kind for piece in pieces], dtype=np.uint8)
    turns = np.array([piece.turn for piece in pieces], dtype=np.int32)
    offsets = np.array([piece.offset for piece in pieces])

    first = np.searchsorted(piece_ends, encoded.starts, side="right")
    last = np.maximum(np.searchsorted(piece_ends, encoded.ends - 1, side="right"), first)
    is_content = kinds == TokenKind.CONTENT
    last_content = np.maximum.accumulate(np.where(is_content, np.arange(len(pieces)), -1))[last]
    owner = np.where(last_content >= first, last_content, first)
    structure_until = np.concatenate(([0], np.cumsum(~is_content)))
    has_structure = structure_until[last + 1] > structure_until[first]

    known = offsets[owner] >= 0
    piece_starts = np.concatenate(([0], piece_ends[:-1]))[owner]
    shift = offsets[owner] - piece_starts
    content_starts = np.where(known, np.clip(encoded.starts, piece_starts, piece_ends[owner]) + shift, -1)
    content_ends = np.where(known, np.clip(encoded.ends, piece_starts, piece_ends[owner]) + shift, -1)
    return Rendered(
        encoded.ids,
        kinds[owner],
        turns[owner],
        int(np.count_nonzero(has_structure & is_content[owner])),
        content_starts.astype(np.int32),
        content_ends.astype(np.int32),
        pieces,
        encoded.starts,
        encoded.ends,
    )
