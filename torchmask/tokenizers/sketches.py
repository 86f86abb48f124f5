"""Conversations in a native format that differ in their texts only, tokenised together without writing any out.

What such a format puts around texts depends on roles and flags alone. So that part is written, tokenised and owned once
for each shape of conversation (a skeleton), and a conversation is its skeleton and its texts (a sketch). A batch of
sketches is one call into the library and a few gathers; tests hold it to what `Tokenizer.render` says of each alone.

Legend: C conversations, U units (constant blocks and runs of text), n tokens.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from threading import Lock
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchmask.messages import Message, Piece, RenderedBatch, TokenKind
from torchmask.tokenizers.backend import Encoded, EncodedTexts, IntArray, offsets_of
from torchmask.tokenizers.encoders import Encoders
from torchmask.tokenizers.formats import ChatFormat

_RUN = -1
_STAND_IN = "x"


class Skeleton(NamedTuple):
    """All but the texts of a conversation.

    Attributes:
        units: numbers of constant blocks in their order; -1 for each run of text.
        prefixes: what the format writes in front of each run's text.
        prefix_lengths: its characters.
        prefix_kinds: what its tokens are: structure, or content where the model has to produce it.
        turns: the message of each run.
    """

    units: tuple[int, ...]
    prefixes: tuple[str, ...]
    prefix_lengths: tuple[int, ...]
    prefix_kinds: tuple[int, ...]
    turns: tuple[int, ...]


class Sketch(NamedTuple):
    """A conversation as its skeleton and the runs of text in it, prefixes included."""

    skeleton: Skeleton
    runs: list[str]


class Sketcher:
    """Sketches conversations of one native format, and tokenises sketches.

    Args:
        native: a format that writes each text by itself (`ChatFormat.shown`).
        encode_structure, encode_control: see `assemble`.
        markers: texts in an assistant's message that are tokens; conversations with one are not sketched.
    """

    def __init__(
        self,
        native: ChatFormat,
        encoders: Encoders,
        *,
        markers: Sequence[str],
    ) -> None:
        assert native.shown is not None
        self._native, self._shown, self._markers = native, native.shown, tuple(markers)
        self._encoders = encoders
        self._skeletons: dict[tuple[tuple[str, bool, bool, bool], ...], Skeleton | None] = {}
        self._blocks: list[tuple[IntArray, npt.NDArray[np.uint8], IntArray]] = []  # ids, kinds, turns
        self._lock = Lock()

    def sketch(self, messages: Sequence[Message]) -> Sketch | None:
        """The conversation; None where it has to be written out.

        Raises:
            DataError: D07, as `Tokenizer.render`.
        """
        if any(message.tool_calls or message.reasoning for message in messages):
            return None
        texts: list[str] = []
        for message in messages:
            text = self._shown(message)
            if text is None:
                return None
            texts.append(text)
        shape = tuple([(m.role, m.eot, m.ipython, text != "") for m, text in zip(messages, texts)])
        if self._markers and any(marker in text for text in texts for marker in self._markers):
            return None
        if shape not in self._skeletons:
            with self._lock:
                self._skeletons[shape] = self._skeleton(shape)
        skeleton = self._skeletons[shape]
        if skeleton is None:
            return None
        return Sketch(skeleton, [prefix + texts[turn] for prefix, turn in zip(skeleton.prefixes, skeleton.turns)])

    def _skeleton(self, shape: tuple[tuple[str, bool, bool, bool], ...]) -> Skeleton | None:
        messages = [
            Message(role, _STAND_IN if is_text else "", eot=eot, ipython=ipython)
            for role, eot, ipython, is_text in shape
        ]
        pieces = [piece for piece in self._native.write(messages, None, False) if piece.text]
        if any(piece.apart for piece in pieces):
            return None
        units: list[int] = []
        runs: list[tuple[str, int, int]] = []  # prefix, its kind and turn
        block: list[tuple[Encoded, Piece]] = []
        at = 0
        while at < len(pieces):
            run = [pieces[at]]
            at += 1
            while not run[0].is_token and at < len(pieces) and not pieces[at].is_token:
                run.append(pieces[at])
                at += 1
            prefix = "".join([piece.text for piece in run[:-1]])
            if run[0].is_token:
                block.append((self._encoders.control(run[0].text), run[0]))
            elif len({piece.turn for piece in run}) > 1:
                return None
            elif len({piece.kind for piece in run}) == 1 and all(piece.offset < 0 for piece in run):
                block.append((self._encoders.structure(prefix + run[-1].text), run[0]))
            elif _is_prefix_and_text(run) and prefix.isascii():
                units += self._keep(block)
                units.append(_RUN)
                runs.append((prefix, run[0].kind, run[0].turn))
                block = []
            else:
                return None
        units += self._keep(block)
        prefixes, kinds, turns = zip(*runs) if runs else ((), (), ())
        return Skeleton(tuple(units), prefixes, tuple(map(len, prefixes)), kinds, turns)

    def _keep(self, block: Sequence[tuple[Encoded, Piece]]) -> list[int]:
        """The number of a block of constant tokens, if there are any."""
        if not block:
            return []
        sizes = [len(encoded.ids) for encoded, _ in block]
        self._blocks.append(
            (
                np.concatenate([encoded.ids for encoded, _ in block]),
                np.repeat(np.array([piece.kind for _, piece in block], np.uint8), sizes),
                np.repeat(np.array([piece.turn for _, piece in block], np.int32), sizes),
            )
        )
        return [len(self._blocks) - 1]

    def assemble(
        self, sketches: Sequence[Sketch], encode_many: Callable[[Sequence[str]], EncodedTexts]
    ) -> RenderedBatch:
        """The renderings, without pieces and characters.

        Args:
            sketches: C conversations.
            encode_many: encodes runs of text, each alone; characters may be counted in bytes.
        """
        blocks = self._blocks[:]  # another thread may add to them
        skeletons = [sketch.skeleton for sketch in sketches]
        units = np.fromiter(chain.from_iterable(s.units for s in skeletons), np.int64)
        is_run = units == _RUN
        found = encode_many(list(chain.from_iterable(sketch.runs for sketch in sketches)))
        run_sizes = np.diff(found.offsets)
        run_turns = np.fromiter(chain.from_iterable(s.turns for s in skeletons), np.int32)
        prefix = np.repeat(
            np.fromiter(chain.from_iterable(s.prefix_lengths for s in skeletons), np.int32), run_sizes
        )  # [tokens of runs]
        prefix_kinds = np.repeat(
            np.fromiter(chain.from_iterable(s.prefix_kinds for s in skeletons), np.uint8), run_sizes
        )  # [tokens of runs]
        in_prefix = found.starts < prefix
        crosses = in_prefix & (found.ends > prefix)
        is_straddler = crosses & (prefix_kinds == TokenKind.STRUCTURE)
        run_kinds = np.where(in_prefix & ~crosses, prefix_kinds, TokenKind.CONTENT).astype(np.uint8)

        units[is_run] = len(blocks) + np.arange(len(run_sizes))
        sizes = np.concatenate([np.array([len(ids) for ids, _, _ in blocks], np.int64), run_sizes])
        firsts = np.cumsum(sizes) - sizes
        counts = sizes[units]
        unit_offsets = offsets_of(counts)
        places = np.arange(int(unit_offsets[-1])) + np.repeat(firsts[units] - unit_offsets[:-1], counts)
        ids, kinds, turns = (
            np.concatenate([*constant, own])[places]
            for constant, own in zip(
                zip(*blocks) if blocks else ((), (), ()),
                (found.ids, run_kinds, np.repeat(run_turns, run_sizes)),
                strict=True,
            )
        )
        units_until = offsets_of([len(s.units) for s in skeletons])
        runs_until = offsets_of([len(s.turns) for s in skeletons])
        straddlers = offsets_of(is_straddler)[found.offsets][runs_until]
        nothing = np.broadcast_to(np.int32(-1), ids.shape)
        return RenderedBatch(
            tokens=ids,
            kinds=kinds,
            turns=turns,
            content_starts=nothing,
            content_ends=nothing,
            offsets=unit_offsets[units_until],
            num_straddlers=np.diff(straddlers),
            pieces=[()] * len(sketches),
            starts=nothing,
            ends=nothing,
            bases=np.zeros(len(sketches), np.int32),
        )


def _is_prefix_and_text(run: Sequence[Piece]) -> bool:
    """Whether a run is what the format writes, all of one kind, then a message's text and nothing else."""
    *before, last = run
    return (
        len({piece.kind for piece in before}) <= 1
        and all(piece.offset < 0 for piece in before)
        and last.kind == TokenKind.CONTENT
        and last.text == _STAND_IN
    )
