"""What end-of-document tokens mean: whether they are written, learned, and learned across a document's edge.

Two places use one policy. When a row is tokenised, `append`, `train_on_eos`, `train_on_eot` and `weight` decide which
stop tokens it has and which of them are targets (edges E1 and E4 of docs/packing.md). When documents are packed,
`boundary_loss`, `boundary_weight`, `on_truncate` and `append: virtual` decide what happens between and at the ends of
them (E2 to E6). Stop tokens are known by their place, never by their id: EOS and end of turn may be one id.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from torchmask.data.choices import WEIGHT_RANGE, choose, is_number, is_weight
from torchmask.errors import ConfigError

Append = Literal["auto", "always", "never", "virtual"]
TrainOnStop = Literal["turn", "all", "last", "none"]
BoundaryLoss = Literal["ignore", "train"]
OnTruncate = Literal["keep", "terminate", "drop"]
Preset = Literal["target", "boundary", "none", "virtual"]

_PRESETS: dict[str, dict[str, Any]] = {
    "target": {},
    "boundary": {"train_on_eos": "all", "boundary_loss": "train"},
    "none": {"train_on_eos": "none"},
    "virtual": {"append": "virtual"},
}


@dataclass(frozen=True)
class EosPolicy:
    """The rules for stop tokens.

    Args:
        append: `auto` = EOS at the end of a document that has no stop token there; `always` = also after a last
            message's own end of turn, and after a last word that is not the assistant's; `never`; `virtual` = as
            `auto`, but the document's stop token takes no slot: it is only the label of the last token before it.
        train_on_eos: whether the token that ends a document is a target: `turn` = as the message it follows, `all` or
            `last` = yes, `none` = no. An end of turn that ends its document counts as its EOS.
        train_on_eot: the same for ends of turn inside a document, where `last` is the document's last end of turn
            only; None = as `train_on_eos`.
        weight: scales the loss of every stop token, on top of its message's weight.
        boundary_loss: whether the last token of a document learns to predict the first of the next in its row
            (torchtune issue 1177); `train` is what classic pre-training on concatenated text does.
        boundary_weight: scales the loss of that prediction.
        on_truncate: a document that is cut: `keep` = has no stop token, `terminate` = its last kept token becomes EOS,
            a target only if that token was one, `drop` = is left out.

    Raises:
        ConfigError: an unknown choice (C06); values that contradict each other or are out of range (C09).
    """

    append: Append = "auto"
    train_on_eos: TrainOnStop = "turn"
    train_on_eot: TrainOnStop | None = None
    weight: float = 1.0
    boundary_loss: BoundaryLoss = "ignore"
    boundary_weight: float = 1.0
    on_truncate: OnTruncate = "keep"

    def __post_init__(self) -> None:
        choose("eos.append", self.append, get_args(Append))
        choose("eos.train_on_eos", self.train_on_eos, get_args(TrainOnStop))
        if self.train_on_eot is not None:
            choose("eos.train_on_eot", self.train_on_eot, get_args(TrainOnStop))
        choose("eos.boundary_loss", self.boundary_loss, get_args(BoundaryLoss))
        choose("eos.on_truncate", self.on_truncate, get_args(OnTruncate))
        for name in ("weight", "boundary_weight"):
            value = getattr(self, name)
            if not is_number(value) or not is_weight(value):
                fix = f"give a finite number ({WEIGHT_RANGE}); 0 is not trained"
                raise ConfigError("C09", f"eos.{name} is {value!r}", fix=fix)
        if self.boundary_loss == "train":
            if self.train_on_eos == "none" or self.weight == 0:
                untrained = "train_on_eos is none" if self.train_on_eos == "none" else "eos.weight is 0"
                raise ConfigError(
                    "C09",
                    f"eos.boundary_loss is train while {untrained}: the model would learn what follows a stop token "
                    "that it never learns to write",
                    fix="set eos.train_on_eos to all, or eos.boundary_loss to ignore",
                )
            if self.append == "virtual":
                raise ConfigError(
                    "C09",
                    "eos.boundary_loss is train while eos.append is virtual: a virtual stop token takes no slot, so "
                    "nothing can be predicted from it",
                    fix="set eos.append to auto, or eos.boundary_loss to ignore",
                )

    @property
    def for_eot(self) -> TrainOnStop:
        """What holds for ends of turn inside a document."""
        return self.train_on_eos if self.train_on_eot is None else self.train_on_eot

    @classmethod
    def preset(cls, name: str) -> "EosPolicy":
        """The policy behind a name: `target` (the defaults), `boundary`, `none` or `virtual`.

        Raises:
            ConfigError: an unknown name (C06).

        >>> EosPolicy.preset("boundary").train_on_eos, EosPolicy.preset("boundary").boundary_loss
        ('all', 'train')
        """
        choose("eos_policy", name, tuple(_PRESETS))
        return cls(**_PRESETS[name])

    @classmethod
    def of(cls, value: "EosPolicy | str | Mapping[str, Any] | None", *, preset: str | None = None) -> "EosPolicy":
        """The policy that YAML or a caller means.

        Args:
            value: a policy, the name of a preset, some of the fields, or None = nothing is said.
            preset: the preset that `value`'s fields are put on top of (`eos_policy` in YAML).

        Raises:
            ConfigError: unknown names and keys (C06); contradictions (C09).

        >>> EosPolicy.of({"weight": 0.5}, preset="none")
        EosPolicy(append='auto', train_on_eos='none', train_on_eot=None, weight=0.5, boundary_loss='ignore', \
boundary_weight=1.0, on_truncate='keep')
        """
        base = cls() if preset is None else cls.preset(preset)
        if value is None:
            return base
        if isinstance(value, Mapping):
            known = [field.name for field in fields(cls)]
            for key in value:
                choose("a key of eos", key, known)
            # None is YAML's "nothing said", except where the field itself may be None.
            said = {key: item for key, item in value.items() if item is not None or key == "train_on_eot"}
            return replace(base, **said)
        if preset is not None:
            raise ConfigError("C09", f"eos={value!r} and eos_policy={preset!r} both name a policy", fix="leave one out")
        if isinstance(value, EosPolicy):
            return value
        return cls.preset(value)


DEFAULT_EOS = EosPolicy()
