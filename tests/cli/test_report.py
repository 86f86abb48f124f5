"""Every exception ends in an exit code and a text."""

import errno

import pytest

from torchmask.cli.report import describe, format_error
from torchmask.errors import ConfigError, ConfigProblems, DataError, DivergedError, StopRequested, WeightsError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("C01", "x"), 2),
        (DataError("D01", "x"), 3),
        (WeightsError("W01", "x"), 4),
        (DivergedError("R01", "x"), 5),
        (MemoryError(), 6),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), 6),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 7),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 7),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1234"), 8),
        (RuntimeError("The server socket has failed to listen on any local network address. EADDRINUSE"), 7),
        (StopRequested("R03", "stopped"), 75),
        (KeyboardInterrupt(), 130),
        (KeyError("a bug"), 1),
        (ValueError("a bug"), 1),
        (SystemExit(2), 2),
        (SystemExit(None), 0),
    ],
)
def test_exit_codes(error, code):
    assert describe(error).exit_code == code


def test_out_of_memory_of_torch_is_known_by_its_name():
    class OutOfMemoryError(RuntimeError):
        pass

    ending = describe(OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert ending.exit_code == 6
    assert "batch_size" in ending.text and "enable_activation_checkpointing" in ending.text


def test_a_bug_shows_its_traceback_and_a_known_error_only_with_debug():
    try:
        raise KeyError("a bug")
    except KeyError as error:
        assert "Traceback" in describe(error).text
    try:
        raise DataError("D01", "not valid JSON", where="train.jsonl:8", excerpt='8 | {"a"', fix="mend the line")
    except DataError as error:
        assert "Traceback" not in describe(error).text
        assert "Traceback" in describe(error, debug=True).text


def test_the_form_of_an_error():
    error = DataError("D01", "not valid JSON", where="train.jsonl:8", excerpt='8 | {"a"', fix="mend the line")
    assert format_error(error) == (
        "error[D01] train.jsonl:8: not valid JSON\n"
        '    8 | {"a"\n'
        "  fix: mend the line\n"
        "  more: docs/errors.md#d01      (exit 3)"
    )


def test_several_problems_have_one_end():
    text = format_error(ConfigProblems([ConfigError("C01", "one"), ConfigError("C03", "two")]))
    assert text.splitlines() == [
        "error[C01] one",
        "error[C03] two",
        "  more: docs/errors.md#c01 #c03      (exit 2, 2 problems)",
    ]
