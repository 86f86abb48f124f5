"""Back end for tiktoken's ranks (`base64-token rank` lines), as Meta ships Llama-3's `tokenizer.model`."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from torchmask.errors import ConfigError
from torchmask.tokenizers.backend import Encoded, byte_spans_to_char_spans, utf8

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


class TiktokenRanks:
    """Llama-3's ranks, pattern and special tokens.

    Raises:
        ConfigError: C11, the file is damaged, or its ranks are not Llama-3's (their pattern is not in the file).
    """

    def __init__(self, path: Path) -> None:
        import tiktoken

        ranks = _read_ranks(path)
        if len(ranks) != NUM_LLAMA3_RANKS:
            raise ConfigError(
                "C11",
                f"tiktoken file with {len(ranks)} ranks; only Llama-3's with {NUM_LLAMA3_RANKS} is known here "
                "(the file does not say how text is split)",
                where=str(path),
                fix="download it again if it is damaged, else put the model's tokenizer.json next to it",
            )
        self.specials: Mapping[str, int] = {text: len(ranks) + i for i, text in enumerate(LLAMA3_SPECIALS)}
        self.markers: Mapping[str, int] = {}
        self.vocab_size = len(ranks) + len(self.specials)
        self.bos: str | None = "<|begin_of_text|>"
        self.eos: str | None = "<|end_of_text|>"
        self.pad: str | None = "<|finetune_right_pad_id|>"
        self.stops: Sequence[str] = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=dict(self.specials)
        )
        self._token_bytes = np.zeros(self.vocab_size, np.int64)
        self._token_bytes[list(ranks.values())] = [len(token) for token in ranks]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no text makes a control token."""
        utf8(text)
        if len(text) <= _LONGEST_RUN:
            return self._encoding.encode_ordinary(text)
        return [id for part in _cut_long_runs(text) for id in self._encoding.encode_ordinary(part)]

    def encode_with_offsets(self, text: str) -> Encoded:
        """The ids of `encode` with the characters each token covers."""
        ids = np.array(self.encode(text), dtype=np.int32)
        return Encoded(ids, *byte_spans_to_char_spans(utf8(text), np.cumsum(self._token_bytes[ids])))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that are no control tokens."""
        return self._encoding.decode(list(ids))

    def id_to_piece(self, id: int) -> str:
        """The token as the file spells it."""
        return self._encoding.decode_single_token_bytes(id).decode(errors="backslashreplace")


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


def _cut_long_runs(text: str) -> Iterator[str]:
    start = 0
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]
