"""Chat templates of a model's own folder, with every turn located.

The template is run on shielded text (see shield.py), so each control token in its output is its own. Where turns are:

- an assistant's turn begins where the prompt that generation would be fed ends: the rendering of the messages before it
  with a generation prompt, which has to be a prefix of the whole rendering;
- other content lies between two marks, put around it for a second rendering that must otherwise equal the first;
- a turn ends at the template's end-of-turn token after its content, its reasoning and its last call; a template that
  begins an answer again behind that has written more for the message, and where is not known.

A template for which this does not hold is refused; its masks would be guesses.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

from torchmask.errors import DataError
from torchmask.messages import Message
from torchmask.tokenizers.formats import Tools
from torchmask.tokenizers.pieces import Piece
from torchmask.tokenizers.sandbox import RefusedByTemplate, compile_template
from torchmask.tokenizers.shield import Shield, alternatives
from torchmask.tokenizers.template_calls import ends_of_calls, with_arguments_as_text, without_empty_content
from torchmask.tokenizers.template_probe import TemplateProbe
from torchmask.tokenizers.template_texts import find_texts
from torchmask.tokenizers.tool_calls import check_arguments, with_parsed_arguments
from torchmask.tokenizers.turns import Token, Turn, cut_into_pieces, in_text_order


class TemplateFormat:
    """A folder's own chat template as a function from conversations to pieces.

    Args:
        templates: sources by name; `tool_use`, if there is one, is used when tools are given.
        bos, eos: text of these tokens, empty where there is none.
        control: every control token's text.
        writable: those that an assistant's own text may hold as tokens.
        stops: those known to end a turn.
        instead: names native formats that this tokenizer could use, for messages.
        where: the folder, for messages.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        *,
        bos: str,
        eos: str,
        control: Sequence[str],
        writable: Sequence[str],
        stops: Sequence[str],
        instead: Callable[[], Sequence[str]],
        where: str,
    ) -> None:
        self._sources, self._where = dict(templates), where
        self._bos, self._eos = bos, eos
        self._stops, self._instead = stops, instead
        self._writable = frozenset(writable)
        self._any_control = alternatives(control)
        self._not_writable = alternatives(text for text in control if text not in self._writable)
        self._only_writable = alternatives(writable)
        self._compiled: dict[str, Any] = {}
        self._probe = TemplateProbe(self._render, self._any_control, self._writable)

    def pieces(self, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
        """The conversation as the template writes it; turns that are not `Message.trained` need not be located.

        Raises:
            DataError: D07, the template refuses the conversation; D08, arguments of a call that are no object; D14, a
                trained turn cannot be located.
        """
        check_arguments(messages)
        trained = [message.trained for message in messages]
        written = json.dumps(
            [[m.content, m.reasoning, m.tool_calls, m.name, m.tool_call_id] for m in messages] + [tools],
            ensure_ascii=False,
            default=str,
        )
        shield = Shield([written, *self._sources.values()])
        shown_tools = shield.hide(list(tools), self._any_control) if tools else None
        self._refuse_dropped_reasoning(messages)
        plain, text = self._written(messages, shown_tools, add_generation_prompt, shield)
        render = partial(self._render, tools=shown_tools, add_generation_prompt=add_generation_prompt)
        key = (self._probe.reasoning_key or "") if any(len(message) > 2 for message in plain) else ""
        turns = find_texts(plain, render, text, shield, reasoning_key=key)
        for message, turn in zip(messages, turns, strict=True):
            if turn.reasoning is not None:
                turn.reasoning = turn.reasoning._replace(offset=turn.reasoning.offset + len(message.text))
        if any(message.tool_calls for message in messages):
            for i, place in ends_of_calls(plain, render, text, shield, where=self._where).items():
                turns[i].calls_end = place
                if place is None and trained[i] and not add_generation_prompt:
                    raise self._cannot_locate(i, messages, "the template looks into its calls, so they cannot be found")
        tokens = self._find_tokens(text, turns, messages)
        for i, message in enumerate(messages):
            if message.role == "assistant":
                strict = trained[i] and not add_generation_prompt
                turns[i].begin = self._begin_of_answer(plain, i, shown_tools, text, turns, tokens, strict)
            elif (content := turns[i].content) is not None:
                turns[i].begin = content.start
            elif trained[i] and message.text.strip() and not add_generation_prompt:
                raise self._cannot_locate(i, messages, "its text is not in the rendering as it was given")
        must_end = [False] * len(messages) if add_generation_prompt else trained
        self._find_ends(turns, tokens, messages, text, must_end)
        return cut_into_pieces(text, turns, tokens, messages, shield=shield, eos=self._eos)

    @property
    def end_of_turn(self) -> str | None:
        """The control token that the template writes after an answer; None if it writes none or takes no such chat."""
        return self._probe.end_of_turn

    @property
    def end_of_call(self) -> str | None:
        """The control token with which a message of tool calls ends, as `end_of_turn`; gpt-oss has one of its own."""
        return self._probe.end_of_call

    @cached_property
    def _ends(self) -> frozenset[str]:
        """Every token that ends a turn."""
        found = (*self._stops, self.end_of_turn, self.end_of_call, self._probe.end_in_history)
        return frozenset(end for end in found if end is not None)

    def _written(
        self, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool, shield: Shield
    ) -> tuple[list[dict[str, Any]], str]:
        """The messages as the template is given them, and what it writes.

        Templates differ in how they expect calls: with arguments as an object or as JSON text (DeepSeek's), in a
        message of empty content or of none (`content is none`, DeepSeek's again). The first way that is written counts.
        """
        plain = [self._as_dict(message, shield) for message in messages]
        if not any(message.tool_calls for message in messages):
            return plain, self._render(plain, tools, add_generation_prompt)
        failure: DataError | None = None
        for has_text, has_content in ((False, True), (True, True), (False, False), (True, False)):
            shown = [with_arguments_as_text(message) for message in plain] if has_text else plain
            shown = shown if has_content else [without_empty_content(message) for message in shown]
            try:
                text = self._render(shown, tools, add_generation_prompt)
                self._refuse_dropped_calls(shown, tools, add_generation_prompt, text)
                return shown, text
            except DataError as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def _as_dict(self, message: Message, shield: Shield) -> dict[str, Any]:
        """The message as templates expect it, shielded."""
        hidden = self._not_writable if message.role == "assistant" else self._any_control
        result: dict[str, Any] = {"role": message.role, "content": shield.hide(message.text, hidden)}
        if message.reasoning_text and self._probe.reasoning_key is not None:
            result[self._probe.reasoning_key] = shield.hide(message.reasoning_text, hidden)
        if message.tool_calls:
            calls = [with_parsed_arguments(call) for call in message.tool_calls]
            result["tool_calls"] = shield.hide(calls, self._any_control)
        for key in ("name", "tool_call_id"):
            if getattr(message, key) is not None:
                result[key] = shield.hide(getattr(message, key), self._any_control)
        return result

    def _refuse_dropped_reasoning(self, messages: Sequence[Message]) -> None:
        """Templates that know no reasoning would leave it out, and some write an empty thinking block in its place."""
        turn = next((i for i, message in enumerate(messages) if message.reasoning_text), None)
        if turn is not None and self._probe.reasoning_key is None:
            raise DataError(
                "D07",
                f"turn {turn + 1} has reasoning beside its content, which the chat template does not write",
                where=self._where,
                fix="write it into the content as the model is to write it (<think>...</think>), leave it out, or use "
                "a chat_format that thinks, such as qwen3",
            )

    def _refuse_dropped_calls(
        self, plain: Sequence[dict[str, Any]], tools: Tools, add_generation_prompt: bool, text: str
    ) -> None:
        """Templates that know no tool calls leave them out; such a message would be learnt as an empty answer."""
        turn = next((i for i, message in enumerate(plain) if "tool_calls" in message), None)
        if turn is None:
            return
        without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in plain]
        try:
            if self._render(without, tools, add_generation_prompt) != text:
                return
        except DataError:
            return  # without them it is another conversation, so they were seen
        raise DataError(
            "D07",
            f"turn {turn + 1} has tool_calls, which the chat template does not write",
            where=self._where,
            fix="write the calls into the content, or use a chat_format with tools",
        )

    def _render(self, messages: Sequence[dict[str, Any]], tools: Tools, add_generation_prompt: bool) -> str:
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            name = next(iter(self._sources))
        if name not in self._compiled:
            self._compiled[name] = compile_template(self._sources[name], where=self._where)
        variables = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt,
                     "bos_token": self._bos, "eos_token": self._eos}  # fmt: skip
        try:
            return self._compiled[name](variables)
        except RefusedByTemplate as error:
            raise DataError(
                "D07",
                f"the chat template does not take this conversation: {error} "
                f"(roles: {', '.join(message['role'] for message in messages)})",
                where=self._where,
            ) from None

    def _find_tokens(self, text: str, turns: Sequence[Turn], messages: Sequence[Message]) -> list[Token]:
        """The control tokens of the rendering: the template's own, and those that an assistant may write itself."""
        areas: list[tuple[int, int, Any]] = []
        at = 0
        located = sorted((span, m.role) for turn, m in zip(turns, messages, strict=True) for span in turn.own)
        for (start, end, _), role in located:
            areas += [
                (at, start, self._any_control),
                (start, end, self._only_writable if role == "assistant" else None),
            ]
            at = max(at, end)
        areas.append((at, len(text), self._any_control))
        return [
            Token(found.start(), found.end(), found[0])
            for start, end, pattern in areas
            if pattern is not None
            for found in pattern.finditer(text, start, end)
        ]

    def _begin_of_answer(
        self,
        plain: Sequence[dict[str, Any]],
        index: int,
        tools: Tools,
        text: str,
        turns: Sequence[Turn],
        tokens: Sequence[Token],
        strict: bool,
    ) -> int | None:
        """Where the tokens that a model would generate for this turn begin."""
        turn = turns[index]
        try:
            prompt = self._render(plain[:index], tools, True)
            cause = "the prompt that generation would be fed is not how the whole conversation begins"
        except DataError as error:
            prompt, cause = None, f"the messages before it cannot be rendered alone ({error.message})"
        if index == 0 and not (prompt and prompt.endswith(self._probe.added) and text.startswith(prompt)):
            prompt = None  # many templates write no prompt for what nobody has asked
        if prompt is None or not text.startswith(prompt):
            begin = self._behind_header(text, turns, index, tokens) if prompt is not None or index == 0 else None
            may_differ = not strict or index + 1 < len(turns) or prompt is None
            if begin is not None and (may_differ or self._only_opens(prompt or "", text, begin)):
                turn.served = prompt is None
                return begin
            if strict:
                raise self._cannot_locate(index, plain, cause)
            return turn.content.start if turn.content else None
        if turn.content and not self._probe.has_generation_prompt:
            header = [t for t in tokens if len(prompt) <= t.start < turn.content.start and t.text not in self._writable]
            if header:  # the template knows no generation prompt, but what it wrote is the turn's header all the same
                return min(span.start for span in turn.own)
        return len(prompt)

    def _behind_header(self, text: str, turns: Sequence[Turn], index: int, tokens: Sequence[Token]) -> int | None:
        """Where the header of an answer ends, for templates that write it otherwise than they write the prompt.

        Its header is the last one in front of what is located of the answer. None where there is none of its own.
        """
        turn = turns[index]
        header = self._probe.header if index else self._probe.added  # nobody has typed anything in front of the first
        places = [*(span.start for span in turn.own), *([] if turn.calls_end is None else [turn.calls_end])]
        if not header or not places:
            return None
        opening = self._only_writable.search(header) if self._only_writable else None
        without = header[: opening.start()] if opening else header
        first = min(places)
        begin = text.rfind(without, 0, first)
        before = [span.end for other in turns[:index] for span in other.own if span.start < first]
        is_other = any(begin < token.start < first and token.text in self._ends for token in tokens)
        if begin < 0 or not without or is_other or begin < max(before, default=0):
            return None
        return begin + len(header if text.startswith(header, begin) else without)

    def _only_opens(self, prompt: str, text: str, begin: int) -> bool:
        """Whether all that a prompt has more than a rendering up to `begin` is the thinking that it opens."""
        return text[:begin] == prompt[:begin] and self._probe.header.endswith(prompt[begin:])

    def _find_ends(
        self,
        turns: Sequence[Turn],
        tokens: Sequence[Token],
        messages: Sequence[Message],
        text: str,
        must_end: Sequence[bool],
    ) -> None:
        """Sets where each located turn ends."""
        ends = [token for token in tokens if token.text in self._ends]
        limit = len(text)
        answers = [turn.begin for turn, message in zip(turns, messages, strict=True) if message.role == "assistant"]
        for begin, i in reversed(in_text_order(turns)):
            turn, answer = turns[i], messages[i].role == "assistant"
            turn.end = max(begin, *(span.end for span in turn.own), turn.calls_end or 0)
            before = bisect_left(tokens, begin, key=attrgetter("start")) - 1
            if turn.end > limit or (before >= 0 and tokens[before].end > begin):
                raise self._cannot_locate(i, messages, "it overlaps what comes next to it")
            next_end = bisect_left(ends, turn.end, key=attrgetter("start"))
            if next_end < len(ends) and ends[next_end].end <= limit:
                turn.end_token = ends[next_end]
            if answer and turn.end_token is not None:
                turn.end = turn.end_token.start
                if must_end[i] and self._goes_on(text, turn.end_token.end, begin, answers):
                    raise self._cannot_locate(i, messages, "behind its end the template begins an answer once more")
            elif answer and must_end[i] and (self.end_of_turn is not None or turn.content is None):
                raise self._cannot_locate(i, messages, f"no end-of-turn token ({self.end_of_turn}) follows it")
            limit = begin

    def _goes_on(self, text: str, end: int, begin: int, answers: Sequence[int | None]) -> bool:
        """Whether the header of an answer that is no other message's follows the end of the one that began there."""
        if not self._probe.header or None in answers:
            return False
        following = [place for place in answers if place is not None and place > begin]
        return text.count(self._probe.header, end, min(following, default=len(text))) > bool(following)

    def _cannot_locate(self, index: int, messages: Sequence[Any], cause: str) -> DataError:
        message = messages[index]
        role = message["role"] if isinstance(message, dict) else message.role
        formats = self._instead()
        return DataError(
            "D14",
            f"turn {index + 1} of {len(messages)} ({role}) cannot be located in what the chat template writes: {cause}",
            where=self._where,
            fix=f"use a built-in chat_format ({', '.join(formats)}), or leave this turn untrained"
            if formats
            else "leave this turn untrained; no built-in chat_format fits this vocabulary",
        )
