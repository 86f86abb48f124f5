"""What a chat template does in general, found out with small conversations of our own."""

import re
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any

from torchmask.errors import DataError

_QUESTION = {"role": "user", "content": "a"}
_ANSWER, _REASONING = "\U000f0000", "\U000f0001"
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # Qwen's and most others', OpenRouter's, gpt-oss's


class TemplateProbe:
    """A template's habits, each found out when it is first asked for.

    Args:
        render: `(messages, tools, add_generation_prompt) -> text`.
        control: finds control tokens; None where there are none.
        writable: those that an assistant's own text may hold.
    """

    def __init__(
        self,
        render: Callable[[Sequence[dict[str, Any]], Any, bool], str],
        control: re.Pattern[str] | None,
        writable: Collection[str],
    ) -> None:
        self._render, self._control, self._writable = render, control, writable

    @cached_property
    def end_of_turn(self) -> str | None:
        """The control token after an answer; None where there is none."""
        found = self._tokens(self._after_answer([]))
        return found[0][0] if found else None

    @cached_property
    def end_in_history(self) -> str | None:
        """The control token after an answer that others follow, which may be another (gpt-oss).

        One that text follows rather than a further token is the next turn's header.
        """
        after = self._after_answer([{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}])
        found = self._tokens(after)
        if self.end_of_turn is None or len(found) < 2 or after[found[0].end() : found[1].start()].strip():
            return None
        return found[0][0]

    @cached_property
    def end_of_call(self) -> str | None:
        """The control token with which a message of tool calls ends; None where there is none."""
        call = {"id": "a23456789", "type": "function", "function": {"name": "f", "arguments": {}}}
        try:
            text = self._render([_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}], None, False)
            without = self._render([_QUESTION, {"role": "assistant", "content": ""}], None, False)
        except DataError:
            return None
        found = self._tokens(text) if text != without else []
        at_end = bool(found) and not text[found[-1].end() :].strip() and found[-1][0] not in self._writable
        return found[-1][0] if at_end else None

    @cached_property
    def reasoning_key(self) -> str | None:
        """The key of a message under which the template reads reasoning; None where it reads none."""
        for key in _REASONING_KEYS:
            try:
                answer = {"role": "assistant", "content": _ANSWER, key: _REASONING}
                if _REASONING in self._render([_QUESTION, answer], None, False):
                    return key
            except DataError:
                continue
        return None

    @cached_property
    def has_generation_prompt(self) -> bool:
        """Whether `add_generation_prompt` makes a difference."""
        try:
            return self._render([_QUESTION], None, True) != self._render([_QUESTION], None, False)
        except DataError:
            return True

    @cached_property
    def header(self) -> str:
        """What a generation prompt adds; empty where that is nothing, or text that anybody may type."""
        return self.added if self._tokens(self.added) else ""

    @cached_property
    def added(self) -> str:
        """What a generation prompt adds to a question."""
        try:
            whole, without = (self._render([_QUESTION], None, prompt) for prompt in (True, False))
        except DataError:
            return ""
        return whole.removeprefix(without) if whole.startswith(without) else ""

    def _tokens(self, text: str) -> list[re.Match[str]]:
        return list(self._control.finditer(text)) if self._control else []

    def _after_answer(self, following: Sequence[dict[str, Any]]) -> str:
        """What stands after the first answer of a conversation; empty where the template does not take it."""
        try:
            text = self._render([_QUESTION, {"role": "assistant", "content": _ANSWER}, *following], None, False)
        except DataError:
            return ""
        return text.partition(_ANSWER)[2]
