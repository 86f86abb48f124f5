"""The tokenizer that the rest of torchmask sees: a back end, the roles of its tokens and a chat format."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from torchmask.errors import DataError
from torchmask.messages import Message, Rendered, RenderedBatch, default_mask
from torchmask.tokenizers.added_tokens import CONFIG_FILE, AddedToken, swallow_blanks, tokens_in_answers
from torchmask.tokenizers.backend import Backend
from torchmask.tokenizers.encoders import Encoders
from torchmask.tokenizers.extension import extended, new_tokens, noted_tokens, tokens_of_template
from torchmask.tokenizers.folder import Roles, open_backend, read_roles
from torchmask.tokenizers.formats import ASSISTANT_MARKERS, ChatFormat, fitting_formats, native_format, no_chat_format
from torchmask.tokenizers.given_messages import check_messages
from torchmask.tokenizers.json_files import read_json
from torchmask.tokenizers.pieces import Piece
from torchmask.tokenizers.saving import CHAT_FORMAT_KEY, write_tokenizer
from torchmask.tokenizers.shield import alternatives
from torchmask.tokenizers.sketches import Sketch, Sketcher
from torchmask.tokenizers.template_files import read_templates
from torchmask.tokenizers.template_format import TemplateFormat


def from_pretrained(
    folder: str | Path, chat_format: str | None = None, *, add_tokens: Sequence[str] = ()
) -> "Tokenizer":
    """The tokenizer of a folder.

    Read are tokenizer.json, else tekken.json, else tokenizer.model (sentencepiece or tiktoken ranks), else vocab.json
    with merges.txt; and the tokens that the configuration files add to it.

    Args:
        folder: a Hugging Face or Meta folder; its configuration files say which tokens are BOS, EOS and padding.
        chat_format: a name in `formats.NATIVE_FORMATS`; None takes the format that `save` noted in the folder, else the
            folder's own chat template, if it has one.
        add_tokens: control tokens to put behind the vocabulary, see `Tokenizer.add_tokens`.

    Raises:
        ConfigError: C11, no tokenizer there or a damaged one; C06, an unknown chat format, or one whose control tokens
            the tokenizer lacks.
    """
    folder = Path(folder)
    chat_format = chat_format or read_json(folder / CONFIG_FILE).get(CHAT_FORMAT_KEY)
    return _opened(folder, chat_format, partial(new_tokens, add_tokens, special=True))


def _opened(folder: Path, chat_format: str | None, find_added: Callable[[Backend], list[AddedToken]]) -> "Tokenizer":
    """A tokenizer with added tokens, which its chat format may need."""
    backend, files = open_backend(folder)
    added = find_added(backend)
    roles = read_roles(folder, backend, vocab_size=backend.vocab_size + len(added))
    backend = extended(backend, added)
    return Tokenizer(folder, backend, roles, chat_format=chat_format, files=files, added=added)


def _restored(folder: Path, chat_format: str | None, added: Sequence[AddedToken]) -> "Tokenizer":
    """A pickled tokenizer."""
    return _opened(folder, chat_format, lambda _: list(added))


class Tokenizer:
    """Text and conversations to ids and back.

    Attributes:
        folder: where it came from.
        chat_format: the native format in use, None for the folder's own template.
        vocab_size: one more than the largest id.
        bos_id, eos_id, pad_id: ids, None where the tokenizer has no such token.
        adds_bos: whether the model's own tokenizer puts BOS in front of plain text.
        control_tokens: every token that is never made from text, by its text.
    """

    def __init__(
        self,
        folder: Path,
        backend: Backend,
        roles: Roles,
        *,
        chat_format: str | None,
        files: Sequence[Path],
        added: Sequence[AddedToken] = (),
    ) -> None:
        self.folder, self.chat_format = folder, chat_format
        self.bos_id, self.eos_id, self.pad_id = roles.bos, roles.eos, roles.pad
        self.adds_bos = roles.adds_bos
        self._files, self._roles, self._added = list(files), roles, tuple(added)
        self._use(backend)

    def _use(self, backend: Backend) -> None:
        """Takes a back end, and what follows from it."""
        self._backend = backend
        self.vocab_size = backend.vocab_size
        self.control_tokens: Mapping[str, int] = {**backend.specials, **backend.markers}
        self._control_texts = {id: text for text, id in self.control_tokens.items()}
        self._special_ids = frozenset(backend.specials.values())
        self._native = None if self.chat_format is None else self._find_native(self.chat_format)
        alone = self._native is not None and self._native.alone
        self._encoders = Encoders(backend, self.control_tokens, alone=alone, where=str(self.folder))
        templates = {} if self._native is not None else read_templates(self.folder)
        markers = [text for text in ASSISTANT_MARKERS if text in backend.markers]
        noted = [*noted_tokens(self.folder, self.control_tokens), *(token.text for token in self._added)]
        own = [text for text in noted if text in self.control_tokens]
        if own:  # those that the format itself writes are its structure: in an answer they are typed text
            written = self._written_tokens(templates, markers)
            own = [text for text in own if text not in written]
        self._writable = list(dict.fromkeys([*markers, *own]))
        self._own = alternatives(own)
        self._template = self._find_template(templates, self._writable)
        self._sketcher: Sketcher | None = None
        is_plain = not backend.swallows and (alone or backend.middle is None)
        if self._native is not None and self._native.shown is not None and is_plain:
            self._sketcher = Sketcher(self._native, self._encoders, markers=self._writable)

    @property
    def num_added(self) -> int:
        """Tokens that were added here; those that the folder's files add are its own."""
        return len(self._added)

    def add_tokens(self, tokens: Sequence[str] | str, special: bool = True) -> int:
        """Puts tokens behind the vocabulary, as control tokens; returns how many there were not before.

        Their ids count on from `vocab_size`; a model with fewer embeddings needs `models.resize_embeddings`. Templates
        and native formats may write them. In an assistant's text they are tokens, anywhere else typed text stays text.

        Args:
            tokens: their texts.
            special: decoding leaves them out; False = it keeps them, and those that are not written like control
                tokens (`<..>`, `[..]`) are found in any text.

        Raises:
            ConfigError: C03, C09, C13, a text that cannot be a token.
        """
        new = new_tokens(tokens, self._backend, special=special)
        if new:
            self._added += tuple(new)
            self._use(extended(self._backend, new))
            self.__dict__.pop("stop_ids", None)
        return len(new)

    def _find_native(self, name: str) -> ChatFormat:
        return native_format(name, **self._vocabulary, where=str(self.folder))

    @property
    def _vocabulary(self) -> dict[str, Any]:
        """What native formats need to know: `control`, `bos`, `eos`."""
        bos_id = self.bos_id if self.adds_bos else None  # formats that name their BOS write it all the same
        bos, eos = (None if id is None else self._control_texts.get(id) for id in (bos_id, self.eos_id))
        return {"control": self.control_tokens, "bos": bos, "eos": eos}

    @property
    def fitting_formats(self) -> list[str]:
        """Names of the native chat formats all of whose control tokens this vocabulary has."""
        return fitting_formats(**self._vocabulary)

    def _written_tokens(self, templates: Mapping[str, str], markers: Sequence[str]) -> set[str]:
        """Control tokens that the chat format puts around any messages."""
        if self._native is not None:
            return {*self._native.control, *self._native.stops}
        template = self._find_template(templates, markers)
        return set() if template is None else tokens_of_template(template, templates.values(), self.control_tokens)

    def _find_template(self, templates: Mapping[str, str], writable: Sequence[str]) -> TemplateFormat | None:
        if not templates:
            return None
        names: Mapping[int | None, str] = dict(self._control_texts.items())
        bos, eos = names.get(self.bos_id, ""), names.get(self.eos_id, "")
        stops = [names[id] for id in self._roles.stops if id in names]
        instead = partial(fitting_formats, **self._vocabulary)
        return TemplateFormat(
            templates, bos=bos, eos=eos, control=list(self.control_tokens), writable=writable, stops=stops,
            instead=instead, where=str(self.folder),
        )  # fmt: skip

    def __reduce__(self) -> tuple[Callable[..., "Tokenizer"], tuple[Path, str | None, tuple[AddedToken, ...]]]:
        return _restored, (self.folder, self.chat_format, self._added)

    def identity(self) -> dict[str, Any]:
        """Everything that determines its ids: its files, the chat format and the libraries, as a key for caches."""
        return {
            "files": list(self._files),
            "chat_format": self.chat_format,
            "templates": read_templates(self.folder) if self.chat_format is None else {},
            "ids": [self.bos_id, self.eos_id, self.pad_id, *self._roles.stops],
            "adds_bos": self.adds_bos,
            "versions": {name: version(name) for name in ("tokenizers", "tiktoken", "sentencepiece")},
            **({"added": [[token.text, token.id, token.special] for token in self._added]} if self._added else {}),
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
        if self._template is not None:
            ends += [end for end in (self._template.end_of_turn, self._template.end_of_call) if end is not None]
        of_format = [self.control_tokens[text] for text in ends if text in self.control_tokens]
        return tuple(dict.fromkeys([*self._roles.stops, *of_format]))

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Ids of plain text; what looks like a control token in it is text.

        Args:
            text: any text.
            add_bos: put BOS in front, where the model's own tokenizer does, see `adds_bos` (Qwen's has no BOS; GPT-2's
                has one, and adds none).
            add_eos: put EOS at the end, where the tokenizer has one.
        """
        ids = self._backend.encode(text)
        if add_bos and self.adds_bos and self.bos_id is not None:
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
        return self._encoders.rest(text) if goes_on else self._backend.encode_with_offsets(text)

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
        return self._encoders.decode(kept)

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
            DataError: D07, roles that the format does not take, or not in this order; D08, messages that are none, or
                arguments of a call that are no object; D14, a template whose turns cannot be located.
        """
        pieces = self.write(messages, tools, add_generation_prompt)
        return self._encoders.assemble(pieces if edit is None else edit(pieces))

    def write(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[Piece]:
        """The conversation as the chat format writes it, not yet tokenised: the first half of `render`."""
        check_messages(messages)
        if self._native is not None:
            pieces = self._native.write(messages, tools, add_generation_prompt)
        elif self._template is not None:
            pieces = self._template.pieces(messages, tools, add_generation_prompt)
        else:
            raise no_chat_format(self.fitting_formats, where=str(self.folder))
        if self._own is not None:
            pieces = tokens_in_answers(pieces, messages, self._own)
        return swallow_blanks(pieces, self._backend.swallows) if self._backend.swallows else pieces

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
        return self._encoders.assemble_many(conversations, num_threads=num_threads, with_characters=with_characters)

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
        """Copies the tokenizer's files into a folder, with generation_config.json; notes added tokens and a format.

        Where the chat format is a native one, generation_config.json says its stop tokens, for transformers.
        """
        write_tokenizer(
            Path(folder), self.folder, self._files,
            chat_format=self.chat_format, added=self._added, control=self.control_tokens, stops=self.stop_ids,
            roles={"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id},
        )  # fmt: skip
