"""How the parts of a conversation are encoded, and its ids decoded, with one back end.

A text may be the first of its conversation, follow a token, or go on after a cut; what is constant is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import groupby

import numpy as np

from torchmask.errors import ConfigError
from torchmask.messages import Piece, Rendered, RenderedBatch
from torchmask.tokenizers.assembly import assemble_many
from torchmask.tokenizers.backend import Backend, Encoded
from torchmask.tokenizers.pieces import assemble


class Encoders:
    """Encoders for `assemble` and `assemble_many`.

    Args:
        backend: of the tokenizer.
        control: its control tokens.
        alone: encode each text between control tokens as if it stood alone, as Meta's and Mistral's own code does; else
            what follows a token is in the middle of a text, as for transformers.
        where: the folder, for messages.

    Attributes:
        encode: a text that follows a token.
        structure: the same, kept.
        control: a control token by its text, kept.
        first: the first text of a conversation, None where that is `encode`.
    """

    def __init__(self, backend: Backend, control: Mapping[str, int], *, alone: bool, where: str) -> None:
        self._backend, self._ids, self._where = backend, control, where
        self._texts = {id: text for text, id in control.items()}
        self._middle = None if alone else backend.middle
        in_text = self._middle or backend
        self.encode: Callable[[str], Encoded] = in_text.encode_with_offsets
        self._many = in_text.encode_many
        self.first = None if self._middle is None else backend.encode_with_offsets
        self.structure = lru_cache(maxsize=1024)(self.encode)
        self.control = lru_cache(maxsize=1024)(self._one_control_token)
        self._has_dummy_prefix = any(backend.id_to_piece(id).startswith("\u2581") for id in backend.encode("a")[:1])

    def _one_control_token(self, text: str) -> Encoded:
        if text not in self._ids:
            message = f"the chat format writes {text!r} here, which the tokenizer does not have"
            raise ConfigError("C06", message, where=self._where)
        return Encoded(*(np.array([value], np.int32) for value in (self._ids[text], 0, len(text))))

    def rest(self, text: str) -> Encoded:
        """A text that goes on after a cut: without the blank that sentencepiece puts in front.

        A line break is no part of longer pieces in the vocabularies that have this blank, so it stands in for the text
        before, and what it is made of is taken off again.
        """
        if self._backend.middle is not None:
            return self._backend.middle.encode_with_offsets(text)
        if self._has_dummy_prefix:
            ids, starts, ends = self._backend.encode_with_offsets("\n" + text)
            own = int(np.count_nonzero(ends <= 1))
            if own == len(ids) or starts[own] >= 1:
                return Encoded(ids[own:], starts[own:] - 1, ends[own:] - 1)
        return self._backend.encode_with_offsets(text)

    def assemble(self, pieces: Sequence[Piece]) -> Rendered:
        """One conversation, see `pieces.assemble`."""
        return assemble(
            pieces,
            encode=self.encode,
            encode_structure=self.structure,
            encode_control=self.control,
            encode_rest=self.rest,
            encode_first=self.first,
        )

    def assemble_many(
        self, conversations: Sequence[Sequence[Piece]], *, num_threads: int, with_characters: bool
    ) -> RenderedBatch:
        """Many, see `assembly.assemble_many`."""
        return assemble_many(
            conversations,
            encode_many=partial(self._many, num_threads=num_threads),
            encode_structure=self.structure,
            encode_control=self.control,
            encode_rest=self.rest,
            encode_first=self.first,
            with_characters=with_characters,
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens written as their text."""
        parts: list[str] = []
        for is_control, run in groupby(ids, key=self._texts.__contains__):
            if is_control:
                parts.append("".join(self._texts[id] for id in run))
            else:
                backend = self._middle if self._middle is not None and parts else self._backend
                parts.append(backend.decode(list(run)))
        return "".join(parts)
