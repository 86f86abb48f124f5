"""Back end for tiktoken: byte sequences with ranks, a pattern that cuts text, and control tokens.

Meta ships Llama-3's ranks alone (`base64-token rank` lines in `tokenizer.model`), so their pattern and control tokens
are here. Mistral's tekken.json brings its own (see tekken.py).
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from torchmask.errors import ConfigError
from torchmask.tokenizers.backend import (
    Backend,
    Blanks,
    Encoded,
    EncodedTexts,
    byte_spans_to_char_spans,
    offsets_of,
    utf8,
)

NUM_LLAMA3_RANKS = 128_000
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The published numbering of Llama 3.1 to 3.3, which gives names to four of the tokens that Llama 3 reserved.
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)
# Meta's own tokenizer cuts runs of blanks or of non-blanks at this length: on much longer ones the pattern's
# backtracking overflows tiktoken's stack (a panic at a million blanks).
_LONGEST_RUN = 25_000
_LONG_RUN = re.compile(rf"\s{{{_LONGEST_RUN + 1},}}|\S{{{_LONGEST_RUN + 1},}}")
# Where a pattern always cuts: all that matches a line break and what is before it, in each of its alternatives, ends
# with the last line break, if no blank follows; nor a slash, which tekken's and o200k's take for a line break.
_END_OF_PARAGRAPH = re.compile(r"\n\n(?=[!-.0-~])")


class TiktokenRanks:
    """Ranks with their pattern and control tokens.

    Args:
        name: of the file, for tiktoken's messages.
        ranks: token to rank, from 0 on without holes.
        pattern: the regular expression that cuts text into words.
        control: control tokens and their ids.
        first_id: the id of rank 0.
        roles: the texts of BOS, EOS and padding.
        stops: further tokens at which generation stops.
        markers: those of `control` that decoding does not leave out.
        cuts_at_paragraphs: the pattern cuts at each end of a paragraph.
    """

    def __init__(
        self,
        name: str,
        ranks: Mapping[bytes, int],
        *,
        pattern: str,
        control: Mapping[str, int],
        roles: tuple[str | None, str | None, str | None],
        first_id: int = 0,
        stops: Sequence[str] = (),
        markers: Sequence[str] = (),
        cuts_at_paragraphs: bool = False,
    ) -> None:
        import tiktoken

        self.specials: Mapping[str, int] = {text: id for text, id in control.items() if text not in markers}
        self.markers: Mapping[str, int] = {text: control[text] for text in markers}
        self.swallows: Mapping[str, Blanks] = {}
        self.middle: Backend | None = None
        self.vocab_size = max([first_id + len(ranks), *(id + 1 for id in control.values())])
        self.bos, self.eos, self.pad = roles
        self.stops = stops
        self._names = {id: text for text, id in control.items()}
        self._first_id = first_id
        self._separators = {text: len(ranks) + i for i, text in enumerate(reversed(list(control)))}
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=self._separators
        )
        self._end_of_paragraph = _END_OF_PARAGRAPH if cuts_at_paragraphs else None
        self._token_bytes = np.zeros(self.vocab_size, np.int64)
        self._token_bytes[first_id + np.array(list(ranks.values()))] = [len(token) for token in ranks]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no text makes a control token."""
        utf8(text)
        if len(text) <= _LONGEST_RUN:
            ids = self._encoding.encode_ordinary(text)
        else:
            ids = [id for part in _cut_long_runs(text) for id in self._encoding.encode_ordinary(part)]
        return [id + self._first_id for id in ids] if self._first_id else ids

    def encode_with_offsets(self, text: str) -> Encoded:
        """The ids of `encode` with the characters each token covers."""
        ids = np.array(self.encode(text), dtype=np.int32)
        return Encoded(ids, *byte_spans_to_char_spans(utf8(text), np.cumsum(self._token_bytes[ids])))

    def encode_many(self, texts: Sequence[str], *, num_threads: int = 1, in_characters: bool = True) -> EncodedTexts:
        """What `encode_with_offsets` says of each text, by one call that does not hold Python's global lock.

        tiktoken cuts at control tokens that it is told to allow and encodes what is between two of them alone, so the
        texts are joined by one that is in none of them, which comes back as an id of its own. Paragraphs that return,
        as those of a prompt's template and of a shared passage do, are encoded once.
        """
        if not texts:
            return EncodedTexts.join([])
        parts, parts_until = _parts(texts, self._end_of_paragraph)
        distinct = {part: i for i, part in enumerate(dict.fromkeys(parts))}
        joined, separator = self._join(list(distinct))
        if separator is None:
            return EncodedTexts.join([self.encode_with_offsets(text) for text in texts])
        utf8(joined)
        found = self._encoding.encode_to_numpy(joined, allowed_special={separator}, disallowed_special=())
        is_separator = found == self._separators[separator]
        ends_of_parts = np.append(np.flatnonzero(is_separator), len(found)) - np.arange(len(distinct))
        ids, part_sizes = found[~is_separator].astype(np.int32), np.diff(ends_of_parts, prepend=0)
        if self._first_id:
            ids += np.int32(self._first_id)
        if len(distinct) < len(parts):
            chosen = np.fromiter(map(distinct.__getitem__, parts), np.int64, len(parts))
            begins, part_sizes = (ends_of_parts - part_sizes)[chosen], part_sizes[chosen]
            upto = np.cumsum(part_sizes)
            ids = ids[np.repeat(begins - upto + part_sizes, part_sizes) + np.arange(upto[-1])]
        offsets = offsets_of(part_sizes)[parts_until]
        sizes = self._token_bytes[ids]
        byte_offsets = offsets_of(sizes)
        if in_characters:
            starts, ends = byte_spans_to_char_spans(utf8("".join(parts)), byte_offsets[1:])
            base = offsets_of([len(text) for text in texts])[:-1]
        else:
            starts, ends = byte_offsets[:-1].astype(np.int32), byte_offsets[1:].astype(np.int32)
            base = byte_offsets[offsets[:-1]]
        base = np.repeat(base.astype(np.int32), np.diff(offsets))
        return EncodedTexts(ids, starts - base, ends - base, offsets)

    def _join(self, parts: Sequence[str]) -> tuple[str, str | None]:
        """The parts joined by a control token's text that can only be found between them, and that text."""
        for text in self._separators:
            joined = text.join(parts)
            if joined.count(text) == len(parts) - 1:
                return joined, text
        return "", None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that are no control tokens."""
        return self._encoding.decode([id - self._first_id for id in ids])

    def id_to_piece(self, id: int) -> str:
        """The token as the file spells it."""
        if id in self._names:
            return self._names[id]
        return self._encoding.decode_single_token_bytes(id - self._first_id).decode(errors="backslashreplace")

    def piece_to_id(self, piece: str) -> int | None:
        """The token that the file spells so, None where there is none."""
        try:
            return self._encoding.encode_single_token(piece.encode()) + self._first_id
        except KeyError:
            return None


def llama3_ranks(path: Path) -> TiktokenRanks:
    """Llama-3's `tokenizer.model`.

    Raises:
        ConfigError: C11, the file is damaged, or its ranks are not Llama-3's (their pattern is not in the file).
    """
    ranks = _read_ranks(path)
    if len(ranks) != NUM_LLAMA3_RANKS:
        raise ConfigError(
            "C11",
            f"tiktoken file with {len(ranks)} ranks; only Llama-3's with {NUM_LLAMA3_RANKS} is known here "
            "(the file does not say how text is split)",
            where=str(path),
            fix="download it again if it is damaged, else put the model's tokenizer.json next to it",
        )
    return TiktokenRanks(
        path.name,
        ranks,
        pattern=LLAMA3_PATTERN,
        control={text: len(ranks) + i for i, text in enumerate(LLAMA3_SPECIALS)},
        roles=("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        cuts_at_paragraphs=True,
    )


def is_tiktoken_file(head: bytes) -> bool:
    """Whether the first bytes of a file are tiktoken's: `base64 rank` on the first line."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\s*\n", head) is not None


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line:
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise ConfigError(
                    "C11",
                    "not a line of a tiktoken file, which has a token in base64 and its rank",
                    where=f"{path}:{number}",
                    excerpt=line[:80].decode(errors="replace"),
                ) from None
    return ranks


def _parts(texts: Sequence[str], end_of_paragraph: re.Pattern[str] | None) -> tuple[list[str], list[int]]:
    """Stretches of the texts that are encoded apart, and how many there are up to each text's beginning and end.

    A part's ids are the same wherever it stands.
    """
    parts: list[str] = []
    until = [0]
    for text in texts:
        if len(text) > _LONGEST_RUN:
            parts += _cut_long_runs(text)
        else:
            start = 0
            for end in end_of_paragraph.finditer(text) if end_of_paragraph else ():
                parts.append(text[start : end.end()])
                start = end.end()
            parts.append(text[start:])
        until.append(len(parts))
    return parts, until


def _cut_long_runs(text: str) -> Iterator[str]:
    start = 0
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]
