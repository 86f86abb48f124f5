"""`torchmask snapshot --config NAME|PATH`: masks as text, to review in a change and to check in CI."""

import difflib
import re
from pathlib import Path

from torchmask.cli.open_config import DataConfig
from torchmask.data.bracketed import bracketed
from torchmask.data.inspection import look_at
from torchmask.data.readable import Readable
from torchmask.data.report import short_place
from torchmask.errors import ConfigError

DEFAULT_COUNT = 20
_HEADER = re.compile(r"# torchmask snapshot, (\d+) documents?: ")


def snapshot(data: DataConfig, *, count: int | None = None, output: str | None = None, check: str | None = None) -> int:
    """Prints or writes the snapshot, or compares it with one that was kept.

    Args:
        data: the configuration's data.
        count: how many documents; None = 20, or as many as the file to check has.
        output: file to write.
        check: file to compare with.

    Returns:
        0; 1 where the file to check differs.

    Raises:
        ConfigError: C11, the file to check does not exist; C16, it is no snapshot.
    """
    if check is not None:
        return _check(data, Path(check), count)
    text = snapshot_text(data, DEFAULT_COUNT if count is None else count)
    if output is None:
        print(text, end="")
    else:
        Path(output).write_text(text, encoding="utf-8")
    return 0


def snapshot_text(data: DataConfig, count: int) -> str:
    """The first documents of the data set in brackets, each below its place, and what the signs mean."""
    samples = data.samples
    documents = [look_at(samples, i) for i in range(min(count, len(samples)))]
    ids = {token for document in documents for token in document.tokens.tolist()}
    read = Readable(ids, data.tokenizer.id_to_piece, data.control)
    noun = "document" if len(documents) == 1 else "documents"
    lines = [
        f"# torchmask snapshot, {len(documents)} {noun}: [[trained]] [[0.5:with weight 0.5]] ~~hidden~~ context",
        "",
    ]
    for document in documents:
        trained = int(document.trained.sum())
        lines += [f"## {short_place(document.place)}: {trained} of {len(document.tokens)} tokens trained"]
        lines += [bracketed(document, read), ""]
    return "\n".join(lines)


def _check(data: DataConfig, path: Path, count: int | None) -> int:
    if not path.is_file():
        fix = f"make it: `torchmask snapshot --config {data.name} -o {path}`"
        raise ConfigError("C11", f"there is no snapshot {str(path.absolute())!r}", fix=fix)
    kept = path.read_text(encoding="utf-8")
    header = _HEADER.match(kept)
    if header is None:
        raise ConfigError("C16", f"{path} is no snapshot", where="--check", fix="write one with `-o FILE`")
    now = snapshot_text(data, int(header[1]) if count is None else count)
    if now == kept:
        print(f"{path}: unchanged")
        return 0
    lines = difflib.unified_diff(kept.splitlines(), now.splitlines(), str(path), f"{data.name} now", lineterm="")
    print("\n".join(lines))
    return 1
