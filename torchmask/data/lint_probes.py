"""Findings that need the conversations behind the samples: what serving would feed, who speaks, what users typed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from torchmask.data.formats import Conversation
from torchmask.data.lint import MAX_PLACES, Finding, Level
from torchmask.data.policy import MaskPolicy
from torchmask.data.probe import Seen, WatchingTokenizer
from torchmask.data.sample import Sample, Samples
from torchmask.data.serving import Mismatch, serving_mismatch
from torchmask.errors import DataError
from torchmask.messages import TokenKind


@dataclass
class _Cases:
    """Documents in which something was found."""

    count: int = 0
    places: list[str] = field(default_factory=list)
    detail: str = ""

    def add(self, place: str, detail: str = "") -> None:
        self.count += 1
        self.detail = self.detail or detail
        if len(self.places) < MAX_PLACES:
            self.places.append(place)

    def finding(self, code: str, level: Level, message: str, total: int) -> Iterator[Finding]:
        if self.count:
            text = f"{self.count:,} of {total:,} documents looked at {message}{self.detail}"
            yield Finding(code, level, text, self.count, self.count / total, tuple(self.places))


def check_conversations(samples: Samples, watching: WatchingTokenizer, tokenizer: Any) -> Iterator[Finding]:
    """TM006, TM007, TM008 and TM010.

    Args:
        samples: what the rows became that `watching` has seen.
        watching: the tokenizer that they were made with.
        tokenizer: renders prompts.
    """
    rewritten, tools, headers, typed, prompts = _Cases(), _Cases(), _Cases(), _Cases(), _Cases()
    texts = {seen.ids.tobytes(): seen for seen in watching.texts}
    control = [text for text in tokenizer.control_tokens if len(text) > 2]
    looked_at = 0
    for i in range(len(samples)):
        sample, place = samples[i], samples.where(i)
        seen = watching.find(sample.tokens)
        if seen is None:
            text = texts.get(_without_ends(sample, tokenizer).tobytes())
            if text is None:
                continue
            looked_at += 1
            if any(word in text.text for word in control):
                typed.add(place)
            if _raw_prompt_differs(sample, text, tokenizer):
                prompts.add(place)
            continue
        looked_at += 1
        roles, trained = np.array(watching.roles_of(sample.tokens)), sample.trained
        kinds = np.full(len(sample), TokenKind.EOS)
        kinds[: len(seen.rendered)] = seen.rendered.kinds
        if (trained & (roles == "tool") & (kinds == TokenKind.CONTENT)).any():
            tools.add(place)
        if trained[1:][kinds[1:] == TokenKind.STRUCTURE].any():
            headers.add(place)
        if any(word in message.text for message in seen.messages if message.role != "assistant" for word in control):
            typed.add(place)
        _compare_prompts(seen, trained, place, tokenizer, rewritten, prompts)
    total = max(looked_at, 1)
    yield from rewritten.finding("TM006", "error", "are written in another way before a later turn", total)
    yield from tools.finding("TM007", "warning", "train what a tool said, which the model never has to say", total)
    yield from headers.finding("TM007", "warning", "train headers, which generation is given", total)
    yield from typed.finding("TM008", "info", "hold the text of a special token; it is encoded as plain text", total)
    yield from prompts.finding("TM010", "error", "train an answer after other ids than generation is fed", total)


def _compare_prompts(seen: Seen, trained: Any, place: str, tokenizer: Any, rewritten: _Cases, prompts: _Cases) -> None:
    """Adds the document to those whose history is rewritten or whose prompt differs, if it is one."""
    turns = set(seen.rendered.turns[trained[: len(seen.rendered)]].tolist())
    roles = {seen.messages[turn].role for turn in turns if turn >= 0}
    if "assistant" not in roles:
        return
    conversation = Conversation(list(seen.messages), list(seen.tools) if seen.tools else None)
    mismatch = serving_mismatch(tokenizer, conversation, MaskPolicy())
    if mismatch is None or mismatch.turn not in turns:
        return
    cases = prompts if _code_of(mismatch, tokenizer, conversation) == "TM010" else rewritten
    cases.add(place, f"; {mismatch.describe(tokenizer)}")


def harmless_edge(finding: Finding, found: Sequence[Finding], samples: Samples, watching: WatchingTokenizer) -> Finding:
    """TM005 as information where the chat format itself makes such tokens and serving begins answers with them, too.

    Llama-2's blank between `[/INST]` and an answer is part of the answer's first token, and generation is not fed it.
    """
    served = watching.conversations and all(other.code != "TM010" for other in found)
    if finding.code != "TM005" or samples.report.get("spans") or not served:
        return finding
    return replace(finding, level="info", message=f"{finding.message}; generation is fed what comes before them")


def refused_conversation(error: DataError, watching: WatchingTokenizer, tokenizer: Any) -> Finding:
    """The finding for a conversation that the data set's builder refused because serving would feed other ids (D14)."""
    code = "TM006"
    if watching.last is not None:
        messages, tools = watching.last
        # Whoever looked at it last may have marked its turns as not trained, so that they need not be located.
        plain = [replace(message, masked=None, train=None, weight=None) for message in messages]
        conversation = Conversation(plain, list(tools) if tools else None)
        mismatch = serving_mismatch(tokenizer, conversation, MaskPolicy())
        code = code if mismatch is None else _code_of(mismatch, tokenizer, conversation)
    return Finding(code, "error", error.message, 1, places=(error.where,) if error.where else ())


def _code_of(mismatch: Mismatch, tokenizer: Any, conversation: Conversation) -> str:
    """TM006 where the difference is in the turns before, TM010 where it is in the generation prompt behind them."""
    history = [replace(message, masked=True) for message in conversation.messages[: mismatch.turn]]
    before = tokenizer.render(history, conversation.tools).tokens
    return "TM010" if mismatch.position >= len(before) else "TM006"


def _without_ends(sample: Sample, tokenizer: Any) -> Any:
    """The ids of a raw document's text: without the BOS and EOS around it."""
    ids = sample.tokens
    if len(ids) and ids[0] == tokenizer.bos_id:
        ids = ids[1:]
    if len(ids) and ids[-1] == tokenizer.eos_id:
        ids = ids[:-1]
    return np.ascontiguousarray(ids, np.int32)


def _raw_prompt_differs(sample: Sample, text: Any, tokenizer: Any) -> bool:
    """Whether the text before the first target is tokenised differently on its own, as generation would have it."""
    offset = int(len(sample) > 0 and sample.tokens[0] == tokenizer.bos_id)
    targets = np.flatnonzero(sample.trained[1:]) + 1 - offset
    if not len(targets) or not 0 < targets[0] < len(text.ids):
        return False
    first = int(targets[0])
    served, _, _ = tokenizer.encode_with_offsets(text.text[: int(text.starts[first])])
    return not np.array_equal(served, text.ids[:first])
