"""Start-up of the command line: seconds and peak memory, beside `python -c pass` measured in the same call.

.venv/bin/python tools/bench_cli.py
"""

import os
import statistics
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "torchmask --help": ["-m", "torchmask", "--help"],
    "torchmask ls": ["-m", "torchmask", "ls"],
    "torchmask validate": ["-m", "torchmask", "validate", "--config", "tiny/qa"],
}
REPEATS = 7


def measure(words: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MB (10^6 bytes) of one process."""
    began = time.perf_counter()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, *words],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - began
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{' '.join(words)} failed")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return seconds, usage.ru_maxrss * unit / 1e6


def main() -> None:
    print(f"{'command':<22}{'seconds':>9}{'MB':>8}   (median of {REPEATS}, after one to warm the disk cache)")
    for name, words in COMMANDS.items():
        measure(words)
        runs = [measure(words) for _ in range(REPEATS)]
        seconds, megabytes = (statistics.median(values) for values in zip(*runs))
        print(f"{name:<22}{seconds:>9.3f}{megabytes:>8.1f}")


if __name__ == "__main__":
    main()
