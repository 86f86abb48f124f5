"""Text of tokens as they come, without ever showing half of a character.

A token can end inside a multi-byte character, and a sentencepiece decoder drops the blank before the first word it
sees, some all blanks before it, so tokens cannot be decoded one by one. A window is decoded instead: the tokens shown
last, for context, back to one that is no blank, and those not yet shown.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are not (yet) a character


class Decodes(Protocol):
    """Whatever turns ids into text; `torchmask.tokenizers.Tokenizer` does."""

    def decode(self, ids: list[int], /) -> str:
        """The text of ids."""
        ...


class TextStream:
    """Tokens in, text out: each `push` returns the text that has become certain, `finish` the rest.

    Args:
        tokenizer: for its `decode`.
        context: tokens before the first one pushed, such as the prompt that a text goes on from; their text is not
            returned, but it keeps the blank between the two.
        stop: texts that end the stream; neither they nor what follows is returned, and what may be the beginning of one
            waits until it is certain.

    Attributes:
        is_stopped: one of `stop` has come.

    >>> class Bytes:
    ...     def decode(self, ids):
    ...         return bytes(ids).decode("utf-8", "replace")
    >>> stream = TextStream(Bytes())
    >>> [stream.push(byte) for byte in "né!".encode()]
    ['n', '', 'é', '!']
    >>> stream = TextStream(Bytes(), stop=["END"])
    >>> [stream.push(byte) for byte in b"EN.END."], stream.finish(), stream.is_stopped
    (['', '', 'EN.', '', '', '', ''], '', True)
    """

    def __init__(self, tokenizer: Decodes, *, context: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._shown, self._waiting = list(context), list[int]()
        self._held, self.is_stopped = "", False

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character or a stop text is incomplete."""
        self._waiting.append(token)
        text = self._text_of_waiting()
        if not text or text.endswith(REPLACEMENT):
            return ""
        is_blank = not text.strip(" ")  # decoders drop it, so it is no context by itself
        self._shown, self._waiting = [*self._shown, *self._waiting] if is_blank else self._waiting, []
        return self._certain(text)

    def finish(self) -> str:
        """The text of what still waits, incomplete characters as the decoder shows them."""
        text = self._certain(self._text_of_waiting()) + self._held
        self._shown, self._waiting, self._held = self._shown + self._waiting, [], ""
        return text

    def _certain(self, text: str) -> str:
        """What of the text held back and this one may be shown; the rest is held back, or dropped after a stop text."""
        if self.is_stopped:
            return ""
        text, self.is_stopped = before_stop(self._held + text, self._stop)
        if self.is_stopped:
            self._held = ""
            return text
        held = max((n for stop in self._stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _text_of_waiting(self) -> str:
        return decode_continuation(self._tokenizer, self._shown, self._waiting)


def decode_continuation(tokenizer: Decodes, prompt: Sequence[int], completion: Sequence[int]) -> str:
    """The text that `completion` adds after the text of `prompt`; its own text where the two run into each other.

    `decode(completion)` alone loses the blank before its first word with sentencepiece.
    """
    before = tokenizer.decode(list(prompt))
    both = tokenizer.decode([*prompt, *completion])
    return both[len(before) :] if both.startswith(before) else tokenizer.decode(list(completion))


def stop_on_text(
    tokenizer: Decodes, texts: Sequence[str], *, contexts: Sequence[Sequence[int]] | None = None
) -> Callable[[int, int], bool]:
    """An `on_token` for `generate` that ends a completion once one of `texts` is in it; cut it with `before_stop`.

    Texts, unlike stop ids, may begin and end anywhere in a token.

    Args:
        contexts: of each prompt, the tokens that its completion's text goes on from, as of `TextStream`: a text that
            begins with a blank is found in the first token only so; None = completions stand for themselves.
    """
    streams: dict[int, TextStream] = {}

    def is_complete(index: int, token: int) -> bool:
        if index not in streams:
            streams[index] = TextStream(tokenizer, context=contexts[index] if contexts else (), stop=texts)
        streams[index].push(token)
        return streams[index].is_stopped

    return is_complete


def before_stop(completion: str, texts: Sequence[str]) -> tuple[str, bool]:
    """The completion up to the first of `texts` in it, and whether there is one.

    >>> before_stop("Yes.\\n\\nQuestion: and", ["Question:", "\\n\\n"])
    ('Yes.', True)
    """
    starts = [start for start in (completion.find(text) for text in texts) if start >= 0]
    return (completion[: min(starts)], True) if starts else (completion, False)
