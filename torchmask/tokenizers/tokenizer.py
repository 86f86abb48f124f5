"""The tokenizer that the rest of torchmask sees: a back end, the roles of its tokens and a chat format."""

import difflib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from torchmask.errors import ConfigError, DataError
from torchmask.messages import Message, Rendered, RenderedBatch, TokenKind, default_mask
from torchmask.tokenizers.assembly import assemble_many
from torchmask.tokenizers.backend import Backend, Encoded
from torchmask.tokenizers.folder import Roles, open_backend, read_json, read_roles
from torchmask.tokenizers.formats import NATIVE_FORMATS, ChatFormat, Tools
from torchmask.tokenizers.pieces import Piece, assemble
from torchmask.tokenizers.sketches import Sketch, Sketcher
from torchmask.tokenizers.template_format import TemplateFormat, read_templates

# Added tokens, not flagged special, that a model writes inside its own turn: in the assistant's text they are tokens.
ASSISTANT_MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


CONFIG_FILE, CHAT_FORMAT_KEY = "tokenizer_config.json", "torchmask_chat_format"


def from_pretrained(folder: str | Path, chat_format: str | None = None) -> "Tokenizer":
    """The tokenizer of a folder.

    Read are tokenizer.json, else tokenizer.model (sentencepiece or tiktoken ranks), else vocab.json with merges.txt.

    Args:
        folder: a Hugging Face or Meta folder; its configuration files say which tokens are BOS, EOS and padding.
        chat_format: `llama2`, `llama3` or `chatml`; None takes the format that `save` noted in the folder, else the
            folder's own chat template, if it has one.

    Raises:
        ConfigError: C11, no tokenizer there or a damaged one; C06, an unknown chat format, or one whose control tokens
            the tokenizer lacks.
    """
    folder = Path(folder)
    backend, files = open_backend(folder)
    chat_format = chat_format or read_json(folder / CONFIG_FILE).get(CHAT_FORMAT_KEY)
    return Tokenizer(folder, backend, read_roles(folder, backend), chat_format=chat_format, files=files)


class Tokenizer:
    """Text and conversations to ids and back.

    Attributes:
        folder: where it came from.
        chat_format: the native format in use, None for the folder's own template.
        vocab_size: one more than the largest id.
        bos_id, eos_id, pad_id: ids, None where the tokenizer has no such token.
        control_tokens: every token that is never made from text, by its text.
    """

    def __init__(
        self, folder: Path, backend: Backend, roles: Roles, *, chat_format: str | None, files: Sequence[Path]
    ) -> None:
        self.folder, self.chat_format = folder, chat_format
        self.vocab_size = backend.vocab_size
        self.bos_id, self.eos_id, self.pad_id = roles.bos, roles.eos, roles.pad
        self.control_tokens: Mapping[str, int] = {**backend.specials, **backend.markers}
        self._backend, self._files, self._roles = backend, list(files), roles
        self._control_texts = {id: text for text, id in self.control_tokens.items()}
        self._special_ids = frozenset(backend.specials.values())
        self._encode_structure = lru_cache(maxsize=1024)(backend.encode_with_offsets)
        self._encode_control = lru_cache(maxsize=1024)(self._one_control_token)
        self._has_dummy_prefix = backend.id_to_piece(backend.encode("a")[0]).startswith("\u2581")
        self._writable = [text for text in ASSISTANT_MARKERS if text in backend.markers]
        self._split_writable = re.compile("(" + "|".join(map(re.escape, self._writable)) + ")")
        self._native = None if chat_format is None else self._find_native(chat_format)
        self._template = self._find_template() if chat_format is None else None
        self._sketcher: Sketcher | None = None
        if self._native is not None and self._native.shown is not None:
            self._sketcher = Sketcher(
                self._native,
                encode_structure=self._encode_structure,
                encode_control=self._encode_control,
                markers=self._writable,
            )

    def _one_control_token(self, text: str) -> Encoded:
        if text not in self.control_tokens:
            raise ConfigError(
                "C06",
                f"chat_format {self.chat_format!r} writes {text!r} here, which the tokenizer does not have",
                where=str(self.folder),
            )
        return Encoded(*(np.array([value], np.int32) for value in (self.control_tokens[text], 0, len(text))))

    def _find_native(self, name: str) -> ChatFormat:
        if name not in NATIVE_FORMATS:
            near = difflib.get_close_matches(name, NATIVE_FORMATS, n=1)
            raise ConfigError(
                "C06",
                f"unknown chat_format {name!r}; there are {', '.join(NATIVE_FORMATS)}",
                fix=f"did you mean {near[0]!r}?" if near else "leave chat_format out for the folder's own template",
            )
        missing = [text for text in NATIVE_FORMATS[name].control if text not in self.control_tokens]
        if missing:
            raise ConfigError(
                "C06",
                f"chat_format {name!r} needs the control tokens {', '.join(missing)}, which this tokenizer lacks; "
                f"it has {', '.join(list(self.control_tokens)[:12])}",
                where=str(self.folder),
                fix="use the format that the model was made with",
            )
        return NATIVE_FORMATS[name]

    def _find_template(self) -> TemplateFormat | None:
        templates = read_templates(self.folder)
        if not templates:
            return None
        names: Mapping[int | None, str] = dict(self._control_texts.items())
        return TemplateFormat(
            templates,
            bos=names.get(self.bos_id, ""),
            eos=names.get(self.eos_id, ""),
            control=list(self.control_tokens),
            writable=self._writable,
            stops=[names[id] for id in self._roles.stops if id in names],
            where=str(self.folder),
        )

    def __reduce__(self) -> tuple[Callable[..., "Tokenizer"], tuple[Path, str | None]]:
        return from_pretrained, (self.folder, self.chat_format)

    def identity(self) -> dict[str, Any]:
        """Everything that determines its ids: its files, the chat format and the libraries, as a key for caches."""
        names = ("tokenizers", "tiktoken", "sentencepiece")
        return {
            "files": list(self._files),
            "chat_format": self.chat_format,
            "templates": read_templates(self.folder) if self.chat_format is None else {},
            "ids": [self.bos_id, self.eos_id, self.pad_id, *self._roles.stops],
            "versions": {name: version(name) for name in names},
        }

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.folder)!r}, chat_format={self.chat_format!r}, vocab_size={self.vocab_size})"

    @property
    def has_chat_format(self) -> bool:
        """Whether conversations can be tokenised."""
        return self._native is not None or self._template is not None

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: EOS, what the configuration names, and the chat format's end of turn."""
        ends = list(self._native.stops) if self._native else []
        if self._template is not None and self._template.end_of_turn is not None:
            ends.append(self._template.end_of_turn)
        return tuple(
            dict.fromkeys([*self._roles.stops, *(self.control_tokens[t] for t in ends if t in self.control_tokens)])
        )

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Ids of plain text; what looks like a control token in it is text.

        Args:
            text: any text.
            add_bos: put BOS in front, where the tokenizer has one (Qwen's has none).
            add_eos: put EOS at the end, where the tokenizer has one.
        """
        ids = self._backend.encode(text)
        if add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_with_offsets(self, text: str, *, goes_on: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of plain text and the characters each covers: ids, starts, ends, [n] int32 each.

        Args:
            text: any text.
            goes_on: encode it as in the middle of a text, where sentencepiece puts no blank in front.
        """
        if goes_on:
            return self._encode_rest(text)
        return self._backend.encode_with_offsets(text)

    def _encode_rest(self, text: str) -> Encoded:
        """Ids of text as it is in the middle of a text: without the blank that sentencepiece puts in front.

        A line break is no part of longer pieces in the vocabularies that have this blank, so it stands in for the text
        before, and what it is made of is taken off again.
        """
        if self._has_dummy_prefix:
            ids, starts, ends = self._backend.encode_with_offsets("\n" + text)
            own = int(np.count_nonzero(ends <= 1))
            if own == len(ids) or starts[own] >= 1:
                return Encoded(ids[own:], starts[own:] - 1, ends[own:] - 1)
        return self._backend.encode_with_offsets(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids; special tokens are left out or written as their text."""
        kept = [int(id) for id in ids]
        if skip_special:
            kept = [id for id in kept if id not in self._special_ids]
        outside = next((id for id in kept if not 0 <= id < self.vocab_size), None)
        if outside is not None:
            raise DataError(
                "D15",
                f"token id {outside} is outside this tokenizer's vocabulary of {self.vocab_size}",
                where=str(self.folder),
            )
        runs = groupby(kept, key=self._control_texts.__contains__)
        return "".join(
            "".join(self._control_texts[id] for id in run) if is_control else self._backend.decode(list(run))
            for is_control, run in runs
        )

    def id_to_piece(self, id: int) -> str:
        """The token as its file spells it (`▁the`, `Ġthe`, `<0x0A>`)."""
        return self._backend.id_to_piece(id)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        *,
        edit: Callable[[list[Piece]], list[Piece]] | None = None,
    ) -> Rendered:
        """The conversation as the chat format writes it, tokenised once, with each token's kind and message.

        Args:
            messages: the conversation.
            tools: JSON schemas of the functions that the assistant may call, for templates that take them.
            add_generation_prompt: end with the header after which the assistant's next message begins.
            edit: changes the written pieces before they are tokenised, to cut them where tokens must not reach over.

        Raises:
            ConfigError: C06, the tokenizer has no chat format.
            DataError: D07, roles in an order that the format does not take; D14, a template whose turns cannot be
                located.
        """
        pieces = self.write(messages, tools, add_generation_prompt)
        return assemble(
            pieces if edit is None else edit(pieces),
            encode=self._backend.encode_with_offsets,
            encode_structure=self._encode_structure,
            encode_control=self._encode_control,
            encode_rest=self._encode_rest,
        )

    def write(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[Piece]:
        """The conversation as the chat format writes it, not yet tokenised: the first half of `render`."""
        if self._native is not None:
            pieces = self._write_native(self._native, messages, tools, add_generation_prompt)
        elif self._template is not None:
            pieces = self._template.pieces(messages, tools, add_generation_prompt)
        else:
            raise ConfigError(
                "C06",
                "this tokenizer has no chat template, so conversations need a chat_format",
                where=str(self.folder),
                fix=f"set tokenizer.chat_format to one of {', '.join(NATIVE_FORMATS)}",
            )
        return pieces

    def assemble(
        self, conversations: Sequence[Sequence[Piece]], *, num_threads: int = 1, with_characters: bool = True
    ) -> RenderedBatch:
        """Written conversations tokenised together: the second half of `render`, several times as fast.

        Args:
            conversations: as `write` gives them.
            num_threads: that the library may use, where it lets itself be told.
            with_characters: say of each token which characters of its message it covers.

        Raises:
            DataError: D02, D13, a text that cannot be encoded; `render` tells whose.
        """
        return assemble_many(
            conversations,
            encode_many=partial(self._backend.encode_many, num_threads=num_threads),
            encode_structure=self._encode_structure,
            encode_control=self._encode_control,
            encode_rest=self._encode_rest,
            with_characters=with_characters,
        )

    def sketch(self, messages: Sequence[Message]) -> Sketch | None:
        """The conversation for `assemble_sketches`, where its chat format can do without writing it out; else None.

        Raises:
            DataError: D07, as `render`.
        """
        return None if self._sketcher is None else self._sketcher.sketch(messages)

    def assemble_sketches(self, sketches: Sequence[Sketch]) -> RenderedBatch:
        """What `assemble` says of conversations, in half of its time and without pieces and characters.

        Raises:
            DataError: as `assemble`.
        """
        assert self._sketcher is not None
        return self._sketcher.assemble(sketches, partial(self._backend.encode_many, in_characters=False))

    def tokenize_messages(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Tokens of a conversation and a `MaskFlag` for each: 0 for what is trained, 1 for what is not.

        Trained are the assistant's text and its end of turn, unless a message's `masked` says otherwise.
        """
        rendered = self.render(messages, tools, add_generation_prompt)
        return rendered.tokens.tolist(), default_mask(rendered, messages).tolist()

    def save(self, folder: str | Path) -> None:
        """Copies the tokenizer's files into a folder, with generation_config.json, and notes a native chat format."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stops = self.folder / "generation_config.json"  # names the tokens that end generation
        for file in [*self._files, *([stops] if stops.is_file() else [])]:
            if file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)
        if self.chat_format is not None:
            config = {**read_json(folder / CONFIG_FILE), CHAT_FORMAT_KEY: self.chat_format}
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _write_native(
        self, native: ChatFormat, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool
    ) -> list[Piece]:
        """The conversation in a native format, markers such as `<think>` in the assistant's own text as tokens."""
        _refuse_tools(native.name, messages, tools)
        if not self._writable:
            return native.pieces(messages, add_generation_prompt)
        result: list[Piece] = []
        for piece in native.pieces(messages, add_generation_prompt):
            by_assistant = piece.kind == TokenKind.CONTENT and messages[piece.turn].role == "assistant"
            if piece.is_token or not by_assistant:
                result.append(piece)
                continue
            at = 0
            for part in self._split_writable.split(piece.text):
                offset = piece.offset + at if piece.offset >= 0 else -1
                result.append(piece._replace(text=part, is_token=part in self._writable, offset=offset))
                at += len(part)
        return result


def _refuse_tools(name: str, messages: Sequence[Message], tools: Tools) -> None:
    """Native formats without tool calls must not drop them in silence."""
    if not tools and not any(message.tool_calls for message in messages):
        return
    turn = next((i for i, message in enumerate(messages) if message.tool_calls), None)
    what = "tools are given" if turn is None else f"turn {turn + 1} has tool_calls"
    raise DataError(
        "D07",
        f"{what}, which the chat format {name!r} does not write",
        fix="use the folder's own template (leave chat_format out), or write the calls into the content",
    )
