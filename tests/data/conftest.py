"""A tokenizer of one token a character, and writers of small files."""

import json
from pathlib import Path

import numpy as np
import pytest

from torchmask.messages import ROLES, Piece, Rendered, TokenKind

BOS, EOS, EOT, FIRST_CHAR = 1, 2, 3, 20


class CharTokenizer:
    """One token a character; `has_eot=False` is a chat format whose turns have no terminator."""

    def __init__(self, *, chat=True, bos_id=BOS, eos_id=EOS, eot_id=EOT, has_eot=True):
        self.adds_bos = bos_id is not None
        self.has_chat_format, self.bos_id, self.eos_id, self.eot_id = chat, bos_id, eos_id, eot_id
        self.has_eot = has_eot
        self.num_encoded = 0

    def encode_with_offsets(self, text):
        self.num_encoded += 1
        places = np.arange(len(text), dtype=np.int32)
        return np.array([ord(c) + FIRST_CHAR for c in text], np.int32), places, places + 1

    def render(self, messages, tools=None, add_generation_prompt=False, edit=None):
        rows = [] if self.bos_id is None else [(self.bos_id, TokenKind.STRUCTURE, -1, "^")]
        for i, message in enumerate(messages):
            rows.append((10 + ROLES.index(message.role), TokenKind.STRUCTURE, i, "#"))
            ids = self.encode_with_offsets(message.text)[0].tolist()
            rows += [(id, TokenKind.CONTENT, i, char) for id, char in zip(ids, message.text)]
            if self.has_eot and message.eot:
                rows.append((self.eot_id, TokenKind.END_OF_TURN, i, "|"))
        if add_generation_prompt:
            rows.append((10 + ROLES.index("assistant"), TokenKind.STRUCTURE, -1, "#"))
        ids, kinds, turns, chars = zip(*rows)
        places = np.arange(len(rows), dtype=np.int32)
        first = {i: turns.index(i) + 1 for i in range(len(messages))}
        pieces = [
            Piece(char, kind, turn, kind != TokenKind.CONTENT, k - first[turn] if kind == TokenKind.CONTENT else -1)
            for k, (kind, turn, char) in enumerate(zip(kinds, turns, chars))
        ]
        columns = np.array(ids, np.int32), np.array(kinds, np.uint8), np.array(turns, np.int32)
        return Rendered(*columns, pieces=pieces, starts=places, ends=places + 1)

    def id_to_piece(self, id):
        return self.text([id])

    def text(self, ids):
        return "".join(
            chr(i - FIRST_CHAR) if i >= FIRST_CHAR else {BOS: "^", EOS: "$", EOT: "|"}.get(int(i), "#") for i in ids
        )


@pytest.fixture(scope="session")
def char_tokenizer():
    """The class, so that a test can choose its special tokens."""
    return CharTokenizer


@pytest.fixture
def write(tmp_path):
    """`write(name, content)`: bytes and text as they are; a list as JSON Lines or, for `.json`, as one JSON list."""

    def write_file(name, content):
        path = Path(tmp_path / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_bytes(content.encode())
        elif name.endswith(".json"):
            path.write_text(json.dumps(content), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return str(path)

    return write_file
