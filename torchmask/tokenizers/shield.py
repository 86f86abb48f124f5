"""Private-use characters that stand for text which a template must not mistake for its own.

Typed control-token text is one such character while a template runs, so that every control token in the rendering was
written by the template; other such characters mark where a message's content begins and ends.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

_PRIVATE_USE = re.compile("[\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
_FREE_CODES = (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


def alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of the texts, the longest where several fit; None for no texts."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


class Shield:
    """Hides control-token text of one conversation and brings it back.

    Args:
        texts: everything the template will see; private-use characters in there are not used.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        used = {char for text in texts for char in _PRIVATE_USE.findall(text)}
        self._free = (chr(code) for code in _FREE_CODES if chr(code) not in used)
        self._stand_ins: dict[str, str] = {}

    def fresh(self) -> str:
        """A character that is nowhere in the conversation and was not handed out before."""
        return next(self._free)

    def hide(self, value: Any, pattern: re.Pattern[str] | None) -> Any:
        """A string, or the strings anywhere in lists and dicts, with a stand-in for every match of the pattern."""
        if isinstance(value, str):
            return pattern.sub(self._stand_in, value) if pattern else value
        if isinstance(value, dict):
            return {self.hide(key, pattern): self.hide(item, pattern) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item, pattern) for item in value]
        return value

    def _stand_in(self, match: re.Match[str]) -> str:
        if match[0] not in self._stand_ins:
            self._stand_ins[match[0]] = self.fresh()
        return self._stand_ins[match[0]]

    def show(self, text: str) -> str:
        """The text with what was hidden in it."""
        if not self._stand_ins:
            return text
        return text.translate({ord(char): hidden for hidden, char in self._stand_ins.items()})
