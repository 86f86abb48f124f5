"""The rules of what is learned and seen, and what they say of messages as wholes.

Later rules win: strategy, roles, message, content part, span rules in their order, EOS policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from torchmask.data.choices import choose
from torchmask.data.eos import DEFAULT_EOS, EosPolicy, TrainOnStop
from torchmask.data.spans import NamedRule, SpanRule, name_rules
from torchmask.messages import ROLES, MaskFlag, Message

MaskingStrategy = Literal["train_on_assistant", "train_on_last", "train_on_all"]
Straddle = Literal["overlap", "inside", "split", "error"]
UnstableTemplate = Literal["error", "expand"]

BASE_RULES = (
    "bos",  # the first token: nothing precedes it
    "header",  # what the template writes around messages
    "strategy",
    "roles",
    "message",
    "part",
    "data",  # flags that came with the row's ids
    "eos",  # the token that ends the document
    "eot",  # ends of turn inside it
    "prompt",  # text before an answer that was cut out of a text; turns before the one that an expanded sample trains
    "text",  # plain text
)
LOSS, HIDDEN = np.uint8(MaskFlag.LOSS), np.uint8(MaskFlag.ATTENTION)

RULE = {name: i for i, name in enumerate(BASE_RULES)}


@dataclass(frozen=True)
class MaskPolicy:
    """What is trained and what is seen.

    Args:
        masking_strategy: `train_on_assistant` = every assistant message; `train_on_last` = the last assistant message;
            `train_on_all` = every message.
        roles_to_train: if given, decides in place of the strategy: messages of these roles, and no others.
        train_on_header: train the headers of trained messages too (torchtune's habit); with `train_on_all`, all that
            the template writes, so that the labels are a copy of the inputs.
        spans: rules for characters of messages, later ones win.
        straddle: what happens to a token that covers more than a span: `overlap` = it belongs to it, `inside` = it does
            not, `split` = the text is cut there before it is tokenised, `error` = such a row is refused.
        eos: the rules for stop tokens.
        unstable_template: `error` = refuse rows for which the template writes other text before a trained turn than
            generation would be fed; `expand` = make one sample of each trained turn.
        base: the rule's name where the strategy decides.

    Raises:
        ConfigError: an unknown strategy, role or choice (C06).
    """

    masking_strategy: MaskingStrategy = "train_on_assistant"
    roles_to_train: tuple[str, ...] | None = None
    train_on_header: bool = False
    spans: tuple[SpanRule, ...] = ()
    straddle: Straddle = "overlap"
    eos: EosPolicy = DEFAULT_EOS
    unstable_template: UnstableTemplate = "error"
    base: Literal["strategy", "text"] = "strategy"

    def __post_init__(self) -> None:
        choose("masking_strategy", self.masking_strategy, get_args(MaskingStrategy))
        choose("straddle", self.straddle, get_args(Straddle))
        choose("unstable_template", self.unstable_template, get_args(UnstableTemplate))
        for role in self.roles_to_train or ():
            choose("roles_to_train", role, ROLES)
        object.__setattr__(self, "spans", tuple(map(SpanRule.of, self.spans)))
        assert len(self.rule_names) <= 256

    @cached_property
    def rules(self) -> tuple[NamedRule, ...]:
        """The span rules with names that differ."""
        return name_rules(self.spans, BASE_RULES)

    @cached_property
    def rule_names(self) -> tuple[str, ...]:
        """What `Decision.rules` are indexes into."""
        return BASE_RULES + tuple(name for name, _ in self.rules)

    @cached_property
    def tables(self) -> dict[Any, Any]:
        """Where `decide` keeps what it has worked out for this policy."""
        return {}


def turn_weights(messages: Sequence[Message], policy: MaskPolicy) -> list[tuple[float, int]]:
    """The weight of each message as a whole, 0 = not trained, and the index of the rule that says so.

    >>> talk = [Message("user", "a"), Message("assistant", "b", weight=0.5)]
    >>> [(weight, BASE_RULES[rule]) for weight, rule in turn_weights(talk, MaskPolicy())]
    [(0.0, 'strategy'), (0.5, 'message')]
    """
    roles, strategy = policy.roles_to_train, policy.masking_strategy
    rule = RULE[policy.base] if roles is None else RULE["roles"]
    last = -1
    if roles is None and strategy == "train_on_last":
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    decided = []
    for i, message in enumerate(messages):
        own = message.own_weight
        if own is not None:
            decided.append((own, RULE["message"]))
        elif any(detail_weight(detail) is not None for detail in message.train_detail):
            trains = any(detail_weight(detail) for detail in message.train_detail)
            decided.append((float(trains), RULE["part"]))
        elif roles is not None:
            decided.append((float(message.role in roles), rule))
        elif policy.base == "text" and message.role != "assistant":
            decided.append((0.0, RULE["prompt"]))
        elif strategy == "train_on_all":
            decided.append((1.0, rule))
        elif strategy == "train_on_last":
            decided.append((float(i == last), rule))
        else:
            decided.append((float(message.role == "assistant"), rule))
    return decided


def detail_weight(detail: Any) -> float | None:
    """What a character range of `train_detail` says of its weight; None where it only hides."""
    if detail.get("train") is False:
        return 0.0
    if detail.get("weight") is not None:
        return float(detail["weight"])
    return 1.0 if detail.get("train") else None


def trained_turns(messages: Sequence[Message], policy: MaskPolicy) -> npt.NDArray[np.bool_]:
    """[M] bool: the messages that are trained as a whole.

    >>> talk = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    >>> trained_turns(talk, MaskPolicy("train_on_last")).tolist()
    [False, False, False, True]
    """
    return np.array([weight != 0 for weight, _ in turn_weights(messages, policy)], dtype=np.bool_)


def stop_weight(rule: TrainOnStop, weight: float, eos: EosPolicy) -> float:
    """The weight of a stop token whose message has a weight; for `last`, of one that is not the last."""
    if rule == "all":
        return (weight or 1.0) * eos.weight
    return weight * eos.weight if rule == "turn" else 0.0
