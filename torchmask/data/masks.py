"""Which tokens of a rendered conversation are trained, at the level of messages, and the EOS that ends a document.

Everything is decided by a token's kind and its message's index (`Rendered`), never by its id: a model in which EOS and
end of turn share one id, or a user who types one, changes nothing. Later rules win: strategy, roles, message.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from torchmask.errors import ConfigError
from torchmask.messages import ROLES, MaskFlag, Message, Rendered, TokenKind

MaskingStrategy = Literal["train_on_assistant", "train_on_last", "train_on_all"]


@dataclass(frozen=True)
class MaskPolicy:
    """Which messages are trained.

    Args:
        masking_strategy: `train_on_assistant` = every assistant message; `train_on_last` = the last assistant message;
            `train_on_all` = every message. Headers and other structure are never trained.
        roles_to_train: if given, decides in place of the strategy: messages of these roles, and no others.

    Raises:
        ConfigError: an unknown strategy or role (C06).
    """

    masking_strategy: MaskingStrategy = "train_on_assistant"
    roles_to_train: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _choose("masking_strategy", self.masking_strategy, get_args(MaskingStrategy))
        for role in self.roles_to_train or ():
            _choose("roles_to_train", role, ROLES)


def _choose(key: str, value: str, choices: Sequence[str]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    fix = f"choose one of {', '.join(choices)}" + (f"; did you mean {near[0]!r}?" if near else "")
    raise ConfigError("C06", f"{key} is {value!r}", fix=fix)


def trained_turns(messages: Sequence[Message], policy: MaskPolicy) -> npt.NDArray[np.bool_]:
    """[M] bool: the messages that are trained.

    >>> talk = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    >>> trained_turns(talk, MaskPolicy("train_on_last")).tolist()
    [False, False, False, True]
    """
    is_assistant = [message.role == "assistant" for message in messages]
    last = max((i for i, yes in enumerate(is_assistant) if yes), default=-1)
    if policy.roles_to_train is not None:
        chosen = [message.role in policy.roles_to_train for message in messages]
    elif policy.masking_strategy == "train_on_all":
        chosen = [True] * len(messages)
    elif policy.masking_strategy == "train_on_last":
        chosen = [i == last for i in range(len(messages))]
    else:
        chosen = is_assistant
    own = [message.masked for message in messages]
    return np.array([yes if masked is None else not masked for yes, masked in zip(chosen, own)], dtype=np.bool_)


def mask_of(rendered: Rendered, messages: Sequence[Message], policy: MaskPolicy) -> npt.NDArray[np.uint8]:
    """[n] uint8 of `MaskFlag`: content, end of turn and EOS of the trained messages are targets, all else is not.

    The first token is never a target, since nothing precedes it.

    >>> r = Rendered(np.array([1, 5, 6, 2]), np.array([0, 1, 1, 2], np.uint8), np.array([-1, 0, 1, 1]))
    >>> mask_of(r, [Message("user", "a"), Message("assistant", "b")], MaskPolicy()).tolist()
    [1, 1, 0, 0]
    """
    trained = np.append(trained_turns(messages, policy), False)  # the last entry answers for turn -1
    is_target = (rendered.kinds != TokenKind.STRUCTURE) & trained[rendered.turns]
    mask = np.where(is_target, MaskFlag.NONE, MaskFlag.LOSS).astype(np.uint8)
    mask[:1] = MaskFlag.LOSS
    return mask


def stop_index(rendered: Rendered) -> int:
    """Place of the token that ends the document, its EOS or last end of turn; -1 where content follows or none is.

    >>> stop_index(Rendered(np.array([1, 5, 2, 9]), np.array([0, 1, 2, 0], np.uint8), np.array([-1, 0, 0, 0])))
    2
    """
    ends = np.flatnonzero((rendered.kinds == TokenKind.END_OF_TURN) | (rendered.kinds == TokenKind.EOS))
    if not len(ends) or (rendered.kinds[ends[-1] :] == TokenKind.CONTENT).any():
        return -1
    return int(ends[-1])


def append_eos(rendered: Rendered, eos_id: int, *, turn: int) -> Rendered:
    """The document with EOS at its end, which belongs to message `turn`; unchanged where it has one already.

    >>> once = append_eos(Rendered(np.array([1, 5]), np.array([0, 1], np.uint8), np.array([-1, 0])), 2, turn=0)
    >>> once.tokens.tolist(), once.kinds.tolist(), len(append_eos(once, 2, turn=0))
    ([1, 5, 2], [0, 1, 3], 3)
    """
    if len(rendered) and rendered.kinds[-1] == TokenKind.EOS:
        return rendered
    return Rendered(
        np.append(rendered.tokens, np.int32(eos_id)),
        np.append(rendered.kinds, np.uint8(TokenKind.EOS)),
        np.append(rendered.turns, np.int32(turn)),
        rendered.num_straddlers,
    )


def finish_chat(rendered: Rendered, messages: Sequence[Message], eos_id: int | None) -> Rendered:
    """The default EOS policy for conversations (`eos.append: auto`).

    Nothing is appended where the last message's own end of turn ends the document, where that turn goes on
    (`eot=False`), or where the last word is not the assistant's. Otherwise the template has no end of turn at all, and
    without an EOS the model would never learn to stop.
    """
    if not messages or eos_id is None or messages[-1].role != "assistant" or not messages[-1].eot:
        return rendered
    last = len(messages) - 1
    is_end = (rendered.kinds == TokenKind.END_OF_TURN) | (rendered.kinds == TokenKind.EOS)
    if (is_end & (rendered.turns == last)).any():
        return rendered
    return append_eos(rendered, eos_id, turn=last)
