"""The arguments that data set builders have in common, each of them spelled out once.

A builder gets them as one frozen object and is called with each by its name. `takes` joins the two: its builders have
the whole signature, so a wrong key of a YAML file is found by name, also by those who only read the source
(`torchmask.config.signatures`).
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torchmask.data.choices import check_max_rows
from torchmask.data.collect import Render, collect
from torchmask.data.eos import EosPolicy, Preset
from torchmask.data.formats import Conversation, Format, with_system_prompt
from torchmask.data.policy import MaskingStrategy, MaskPolicy, Straddle, UnstableTemplate
from torchmask.data.readers import SampleBy
from torchmask.data.rendering import Tokenizer, documents_of
from torchmask.data.rows import BadRows, Filter, OnBadRow, Row
from torchmask.data.sample import Samples
from torchmask.data.sources import DataFiles, open_source
from torchmask.data.spans import SpanRule
from torchmask.errors import ConfigError

Builder = Callable[..., Samples]


def _needs_chat_format(message: str, tokenizer: Any, *, instead: str) -> ConfigError:
    """C09, for a tokenizer without a chat format; the way out names the native formats that fit its vocabulary.

    Args:
        message: what needs one.
        tokenizer: the one without.
        instead: the other way out.
    """
    fitting = getattr(tokenizer, "fitting_formats", ())
    which = f" ({', '.join(fitting)} fit this vocabulary)" if fitting else ""
    return ConfigError("C09", message, fix=f"set tokenizer.chat_format{which}, or {instead}")


def chat_dataset_needs(tokenizer: Any) -> ConfigError:
    """The same of `chat_dataset`."""
    instead = "use instruct_dataset for rows of one prompt and one answer"
    return _needs_chat_format("chat_dataset needs a tokenizer with a chat format", tokenizer, instead=instead)


def chat_needs(tokenizer: Any) -> ConfigError:
    """The same where `chat: true` asks for one."""
    message = "chat=true, but the tokenizer has no chat format"
    return _needs_chat_format(message, tokenizer, instead="leave chat=true out")


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Which rows are read, what becomes of bad ones, and the stop tokens.

    Args:
        data_files, split, name, field, streaming: see `open_source`.
        eos, eos_policy: the rules for stop tokens, see `EosPolicy`: some of its fields, on top of a preset's.
        filter_fn: which rows to keep: a function of the row, or `{column: value or list of values}`.
        on_bad_row, max_bad_share: see `BadRows`.
        max_rows: read only so many rows.
        num_workers: processes that tokenise; 0 = this one. The result is the same.
        cache: keep the samples on disk: True = in the user's cache folder, or a folder; see docs/data_speed.md.

    Raises:
        ConfigError: `max_rows` is no number of rows (C13).
    """

    data_files: DataFiles | None = None
    split: str | None = "train"
    name: str | None = None
    field: str | None = None
    streaming: bool = False
    eos: EosPolicy | Mapping[str, Any] | None = None
    eos_policy: Preset | None = None
    filter_fn: Filter | None = None
    on_bad_row: OnBadRow = "error"
    max_bad_share: float = 0.01
    max_rows: int | None = None
    num_workers: int = 0
    cache: bool | str = False

    def __post_init__(self) -> None:
        check_max_rows(self.max_rows)

    @property
    def stops(self) -> EosPolicy:
        """The rules for stop tokens."""
        return EosPolicy.of(self.eos, preset=self.eos_policy)

    def read(
        self,
        source: str,
        parse: Format,
        render: Render,
        policy: MaskPolicy,
        *,
        expand: Callable[[Iterable[Row]], Iterator[Row]] | None = None,
        sample_by: SampleBy = "line",
    ) -> Samples:
        """The samples of a source.

        Args:
            source: see `open_source`.
            parse, render, policy: see `collect`.
            expand, sample_by: see `open_source`.

        Raises:
            DataError: the source or its rows cannot be used; each with file and row.
        """
        rows = open_source(
            source,
            data_files=self.data_files,
            split=self.split,
            name=self.name,
            field=self.field,
            sample_by=sample_by,
            streaming=self.streaming,
            expand=expand,
        )
        return collect(
            rows,
            parse,
            render,
            policy=policy,
            bad=BadRows(self.on_bad_row, max_bad_share=self.max_bad_share, stop_at_first=self.streaming),
            filter_fn=self.filter_fn,
            max_rows=self.max_rows,
            num_workers=self.num_workers,
        )


@dataclass(frozen=True, kw_only=True)
class TextOptions(RowOptions):
    """The same, and rules for characters of the text.

    Args:
        spans, straddle: see `MaskPolicy`; `spans` are `SpanRule`s.
    """

    spans: Sequence[SpanRule | Mapping[str, Any]] = ()
    straddle: Straddle = "overlap"

    @property
    def rules(self) -> tuple[SpanRule, ...]:
        """The span rules."""
        return tuple(map(SpanRule.of, self.spans))


@dataclass(frozen=True, kw_only=True)
class ConversationOptions(TextOptions):
    """The same, and which messages are trained.

    Args:
        new_system_prompt: replaces the system messages of all rows, or comes in front of each.
        masking_strategy, roles_to_train: which messages are trained, see `MaskPolicy`.
        train_on_input: train the prompt too: `masking_strategy: train_on_all` under torchtune's older name.
        train_on_header, unstable_template: see `MaskPolicy`.
    """

    new_system_prompt: str | None = None
    masking_strategy: MaskingStrategy = "train_on_assistant"
    roles_to_train: Sequence[str] | None = None
    train_on_input: bool = False
    train_on_header: bool = False
    unstable_template: UnstableTemplate = "error"

    def policy(self, *, mask_history: bool = False) -> MaskPolicy:
        """The rules of what is learned.

        Args:
            mask_history: train the last answer only: `train_on_last` under LLaMA-Factory's name.

        Raises:
            ConfigError: two names for different things (C09), or what `MaskPolicy` refuses.
        """
        strategy, roles = self.masking_strategy, self.roles_to_train
        names: list[tuple[str, bool, MaskingStrategy]] = [
            ("train_on_input", self.train_on_input, "train_on_all"),
            ("mask_history", mask_history, "train_on_last"),
        ]
        for name, is_set, means in names:
            if is_set and (roles is not None or strategy not in ("train_on_assistant", means)):
                other = "roles_to_train" if roles is not None else f"masking_strategy={strategy}"
                raise ConfigError("C09", f"{name}=true contradicts {other}", fix="leave one of the two out")
            strategy = means if is_set else strategy
        return MaskPolicy(
            strategy,
            None if roles is None else tuple(roles),
            self.train_on_header,
            self.rules,
            self.straddle,
            self.stops,
            self.unstable_template,
        )

    def in_chat(self, tokenizer: Tokenizer, chat: bool | None) -> bool:
        """Whether rows are written in the chat format: as asked for, else where there is one.

        Raises:
            ConfigError: there is none, and something needs it (C09).
        """
        wanted = tokenizer.has_chat_format if chat is None else chat
        if wanted and not tokenizer.has_chat_format:
            raise chat_needs(tokenizer)
        if not wanted and self.new_system_prompt is not None:
            message = "new_system_prompt needs a chat format, and rows are written raw"
            raise ConfigError("C09", message, fix="set tokenizer.chat_format, or put the text into the prompt")
        return wanted

    def read_conversations(
        self,
        tokenizer: Tokenizer,
        source: str,
        parse: Format,
        *,
        in_chat: bool,
        mask_history: bool = False,
        expand: Callable[[Iterable[Row]], Iterator[Row]] | None = None,
    ) -> Samples:
        """The samples of a source of conversations.

        Args:
            tokenizer: a tokenizer.
            source, expand: see `open_source`.
            parse: a row -> its messages.
            in_chat: see `in_chat`.
            mask_history: see `policy`.

        Raises:
            DataError, ConfigError: as `read`, `policy`.
        """
        policy = self.policy(mask_history=mask_history)
        render = partial(documents_of, tokenizer, policy=policy, chat=in_chat)
        parse = partial(_with_system, parse=parse, prompt=self.new_system_prompt)
        return self.read(source, parse, render, policy, expand=expand)


def _with_system(row: Row, *, parse: Format, prompt: str | None) -> Conversation:
    return with_system_prompt(parse(row), prompt)


def takes(options: type[RowOptions]) -> Callable[[Builder], Builder]:
    """A builder that is called with the fields of `options` by name, and itself gets them as its second argument.

    >>> @takes(RowOptions)
    ... def build(tokenizer, options, *, source):
    ...     return source, options.max_rows
    >>> build(None, source="a.jsonl", max_rows=3)
    ('a.jsonl', 3)
    >>> build(None, source="a.jsonl", max_row=3)
    Traceback (most recent call last):
    TypeError: build() got an unexpected keyword argument 'max_row'
    """

    def decorate(build: Builder) -> Builder:
        written = inspect.signature(build)
        first, _, *own = written.parameters.values()
        kind = inspect.Parameter.KEYWORD_ONLY
        shared = [inspect.Parameter(f.name, kind, default=f.default, annotation=f.type) for f in fields(options)]
        signature = written.replace(parameters=[first, *own, *shared])

        @functools.wraps(build)
        def call(*args: Any, **arguments: Any) -> Samples:
            try:
                bound = signature.bind(*args, **arguments)
            except TypeError as error:
                raise TypeError(f"{build.__name__}() {error}") from None
            common = {f.name: bound.kwargs[f.name] for f in fields(options) if f.name in bound.kwargs}
            rest = {name: value for name, value in bound.kwargs.items() if name not in common}
            return build(*bound.args, options(**common), **rest)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate
