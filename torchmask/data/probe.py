"""What a data set's builder shows a tokenizer: the conversations behind the samples, to say and check more of them.

Samples keep tokens and flags, not roles and texts; that is what makes a million of them small. To look at some of them
again, their rows are read a second time with a tokenizer that remembers. Nothing is guessed from the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.messages import Message, Rendered


@dataclass(frozen=True, eq=False)
class Seen:
    """A conversation and what the chat format made of it."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None
    rendered: Rendered

    def roles(self) -> list[str]:
        """The role of each token's message; empty for tokens of none."""
        names = [*(message.role for message in self.messages), ""]  # the last answers for turn -1
        return [names[turn] for turn in self.rendered.turns.tolist()]


@dataclass(frozen=True, eq=False)
class SeenText:
    """Text that was tokenised without a chat format, and the characters that each token covers ([n] int32 each)."""

    text: str
    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]


_IN_BULK = ("write", "assemble")


class WatchingTokenizer:
    """A tokenizer that does what another does and remembers what it was shown.

    Attributes:
        conversations: those that were rendered, in order.
        last: messages and tools of the last one that was to be rendered, whether that went well or not.
        texts: what was tokenised as plain text.

    Args:
        tokenizer: the one that does the work; its attributes are this one's, except for what renders many conversations
            at once: each has to come by on its own to be seen.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.conversations: list[Seen] = []
        self.last: tuple[Sequence[Message], Sequence[dict[str, Any]] | None] | None = None
        self.texts: list[SeenText] = []
        self._by_tokens: dict[bytes, Seen] = {}

    def __getattr__(self, name: str) -> Any:
        if name in _IN_BULK:
            raise AttributeError(f"a watching tokenizer has no {name}")
        return getattr(self._tokenizer, name)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> Rendered:
        """As the tokenizer's."""
        if not add_generation_prompt:
            self.last = messages, tools
        rendered: Rendered = self._tokenizer.render(messages, tools, add_generation_prompt, **options)
        if not add_generation_prompt:
            seen = Seen(messages, tools, rendered)
            self.conversations.append(seen)
            self._by_tokens[_key(rendered.tokens)] = seen
        return rendered

    def encode_with_offsets(self, text: str, **options: Any) -> Any:
        """As the tokenizer's."""
        encoded = self._tokenizer.encode_with_offsets(text, **options)
        self.texts.append(SeenText(text, *encoded))
        return encoded

    def find(self, tokens: npt.NDArray[np.int32]) -> Seen | None:
        """The conversation behind a document, which may end in an EOS that the chat format did not write."""
        return self._by_tokens.get(_key(tokens)) or self._by_tokens.get(_key(tokens[:-1]))

    def roles_of(self, tokens: npt.NDArray[np.int32]) -> list[str] | None:
        """The role of each token of a document, or None where no conversation with these tokens was seen."""
        seen = self.find(tokens)
        if seen is None:
            return None
        roles = seen.roles()
        return roles + [roles[-1] if roles else ""] * (len(tokens) - len(roles))


def _key(tokens: npt.NDArray[np.int32]) -> bytes:
    return np.ascontiguousarray(tokens, np.int32).tobytes()
