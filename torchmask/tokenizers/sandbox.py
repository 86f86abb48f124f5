"""Rendering chat templates that come with a model: Jinja in a sandbox, with what Hugging Face's templates expect.

A template is a stranger's program. It runs in Jinja's immutable sandbox (no attributes that reach Python's internals,
no changes to our objects) with limits on output, repetition and time. These stop mistakes and simple attacks; memory
that a template builds up by concatenation is not limited. Undefined values are false and can be tested, as published
templates do; printing one is an error rather than silence.
"""

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from torchmask.errors import ConfigError, DataError

MAX_OUTPUT_CHARS = 8 * 1024 * 1024
MAX_SECONDS = 5
_MAX_ITERATIONS = 1_000_000  # of `range`, over one rendering
_MAX_PRODUCT = 1_000_000  # longest string or list that `*` may build
_WIDE_FORMAT = re.compile(r"\d{5}|\*|\{[^}]*\{")  # a width of five digits, or one that is an argument
_EXACT_TYPES = (str, dict, list)
_PADDING_METHODS = frozenset(("ljust", "rjust", "center", "zfill", "expandtabs"))


class RefusedByTemplate(Exception):
    """A template called `raise_exception`: it does not take such a conversation."""


def compile_template(source: str, *, where: str) -> Callable[[Mapping[str, Any]], str]:
    """The template as a function from its variables to text.

    The function raises `RefusedByTemplate` where the template says so, and DataError D14 where it fails or exceeds a
    limit.

    Raises:
        ConfigError: C06, the source is not a Jinja template.
    """
    import jinja2

    environment = _environment()
    try:
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError("C06", f"line {error.lineno} of the chat template: {error.message}", where=where) from None

    def render(variables: Mapping[str, Any]) -> str:
        parts: list[str] = []
        size = 0
        with _time_limit(where):
            try:
                for part in template.generate(**variables, range=_counted_range()):
                    parts.append(part)
                    size += len(part)
                    if size > MAX_OUTPUT_CHARS:
                        raise DataError(
                            "D14", f"the chat template writes more than {MAX_OUTPUT_CHARS:,} characters", where=where
                        )
            except (RefusedByTemplate, DataError):
                raise
            except Exception as error:  # a template can fail in any way Python can
                raise DataError(
                    "D14", f"the chat template fails: {type(error).__name__}: {error}", where=where
                ) from error
        return "".join(parts)

    return render


@cache
def _environment() -> Any:
    """Jinja as transformers' `apply_chat_template` configures it, more tightly locked."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Undefined(jinja2.Undefined):
        """False, testable and comparable; an error when it is printed."""

        def __str__(self) -> str:
            return self._fail_with_undefined_error()

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's text in some templates; here it only has to parse."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    safe: dict[tuple[type, str], bool] = {}  # only names that such types have get here, so it stays small

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(x) if isinstance(x, (str, list, tuple)) else x for x in (left, right)]
            too_long = operator == "*" and sizes != [left, right] and sizes[0] * sizes[1] > _MAX_PRODUCT
            pads = operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left) is not None
            if too_long or pads or operator == "**":
                raise jinja2.sandbox.SecurityError(f"{operator!r} is not allowed on such operands")
            return super().call_binop(context, operator, left, right)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None and _WIDE_FORMAT.search(value.__self__):
                raise jinja2.sandbox.SecurityError("such a width is not allowed in a format")
            return wrapped

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, str) and attr in _PADDING_METHODS:
                return False
            if type(obj) not in _EXACT_TYPES:
                return super().is_safe_attribute(obj, attr, value)
            # Jinja decides by the object's type and the name alone, in a dozen `isinstance`: a fifth of a rendering.
            if (type(obj), attr) not in safe:
                safe[type(obj), attr] = super().is_safe_attribute(obj, attr, value)
            return safe[type(obj), attr]

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=Undefined,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)
    for name in (
        "center",
        "format",
        "indent",
        "wordwrap",
    ):  # they pad without limit; indent is put back below, with one
        environment.filters.pop(name, None)
    environment.filters["tojson"] = _to_json
    environment.filters["indent"] = _indent
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates expect it: other scripts as they are, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    import jinja2.filters

    if (width if isinstance(width, int) else len(width)) > 100:
        raise ValueError("indent: width over 100")
    return jinja2.filters.do_indent(text, width, first, blank)


def _raise_exception(message: str) -> None:
    raise RefusedByTemplate(message)


def _strftime_now(format: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(format)


def _counted_range() -> Callable[..., range]:
    """`range` with a budget of iterations for one rendering, nested loops included."""
    left = _MAX_ITERATIONS

    def counted(*args: int) -> range:
        nonlocal left
        result = range(*args)
        left -= len(result)
        if left < 0:
            raise OverflowError(f"more than {_MAX_ITERATIONS:,} iterations of range")
        return result

    return counted


@contextmanager
def _time_limit(where: str) -> Iterator[None]:
    """Stops a rendering after MAX_SECONDS, where Python can be interrupted: in the main thread, with a free alarm."""
    free = (
        threading.current_thread() is threading.main_thread()
        and hasattr(signal, "setitimer")
        and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    )
    if not free:
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise DataError("D14", f"the chat template runs for more than {MAX_SECONDS} s", where=where)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
