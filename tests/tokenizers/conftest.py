import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from torchmask import Message
from torchmask.tokenizers import Tokenizer, from_pretrained

Load = Callable[..., Tokenizer]


@cache
def _load(folder: Path, chat_format: str | None) -> Tokenizer:
    return from_pretrained(folder, chat_format)


@pytest.fixture(scope="session")
def load(assets: Path) -> Load:
    """A tokenizer of the assets by its folder's name, loaded once."""
    return lambda name, chat_format=None: _load(assets / "tokenizers" / name, chat_format)


@pytest.fixture(scope="session")
def golden_cases(assets: Path) -> Callable[[str], list[dict[str, Any]]]:
    """The cases of a golden file, with `messages` as Message."""

    def cases(name: str) -> list[dict[str, Any]]:
        loaded = json.loads((assets / "goldens" / f"{name}.json").read_text())["cases"]
        return [{**case, "messages": as_messages(case["messages"])} for case in loaded if "messages" in case]

    return cases


def as_messages(rows: list[dict[str, Any]]) -> list[Message]:
    keys = ("name", "tool_call_id")
    return [
        Message(
            row["role"], row["content"], tool_calls=row.get("tool_calls") or [], **{key: row.get(key) for key in keys}
        )
        for row in rows
    ]


@pytest.fixture(scope="session")
def folder_with(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A new folder with some files of a tokenizer in the assets and a chat template of one's own."""

    def make(name: str, files: list[str], **config: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        for file in files:
            (folder / file).symlink_to(assets / "tokenizers" / name / file)
        if config:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="session")
def make_tiny_tokenizer() -> Callable[..., None]:
    """Writes a small byte-level BPE with ChatML's control tokens into a folder, as the embedded default has one."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the answer is in the context of the question"] * 3, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=False) for text in ("<answer>", "<think>", "</think>")])
    text = tokenizer.to_str()

    def make(folder: Path, **config: Any) -> None:
        (folder / "tokenizer.json").write_text(text)
        roles = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**roles, **config}))

    return make


@pytest.fixture
def folder_of(assets, tmp_path):
    """A folder with files of the assets and of one's own: `folder_of("llama2", ["tokenizer.model"], **files)`."""

    def make(name, files, **jsons):
        for file in files:
            shutil.copyfile(assets / "tokenizers" / name / file, tmp_path / file)
        for stem, content in jsons.items():
            (tmp_path / f"{stem}.json").write_text(json.dumps(content))
        return tmp_path

    return make
