"""`torchmask lint --config NAME|PATH`: what is suspicious about a configuration's data, for people and for CI."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from torchmask.cli.open_config import DataConfig
from torchmask.cli.terminal import console_for
from torchmask.config import instantiate
from torchmask.data.lint import CODES, Finding, check_data, read_thresholds
from torchmask.data.lint_probes import check_conversations, harmless_edge, refused_conversation
from torchmask.data.probe import WatchingTokenizer
from torchmask.data.report import short_place
from torchmask.errors import ConfigError, DataError

LEVELS = {"error": "bold red", "warning": "bold yellow", "info": "bold blue"}


def lint(
    data: DataConfig,
    *,
    thresholds: Sequence[str] = (),
    ignored: Sequence[str] = (),
    num_probes: int = 256,
    as_json: bool = False,
) -> int:
    """Prints the findings, the worst first.

    Args:
        data: the configuration's data.
        thresholds: as `TM003=0.02`.
        ignored: codes to leave out.
        num_probes: rows whose conversations are looked at again.
        as_json: print JSON.

    Returns:
        1 where a finding is an error, else 0.

    Raises:
        ConfigError: C16, an unknown code or threshold.
        DataError: rows that cannot be used at all.
    """
    unknown = [code for code in ignored if code not in CODES]
    if unknown:
        raise ConfigError(
            "C16", f"unknown code {', '.join(unknown)}", where="--ignore", fix=f"one of {', '.join(CODES)}"
        )
    shares = read_thresholds(thresholds)
    found = [finding for finding in find(data, shares, num_probes) if finding.code not in ignored]
    found.sort(key=lambda finding: (list(LEVELS).index(finding.level), finding.code))
    if as_json:
        print(json.dumps(_as_json(data, found, shares), indent=2, ensure_ascii=False))
    else:
        _print(console_for(), data, found)
    return int(any(finding.level == "error" for finding in found))


def find(data: DataConfig, thresholds: Mapping[str, float], num_probes: int) -> list[Finding]:
    """All findings of a configuration's data."""
    try:
        packs = data.packs
    except DataError as error:
        if error.id != "D14":
            raise
        return [_refused(data, error)]
    tokenizer = data.tokenizer
    found = list(
        check_data(
            packs,
            thresholds,
            bos_id=tokenizer.bos_id,
            stop_ids=tokenizer.stop_ids,
            output_size=output_size(data.values),
        )
    )
    watching, samples = data.watch(num_probes)
    found += check_conversations(samples, watching, tokenizer)
    return [harmless_edge(finding, found, packs.samples, watching) for finding in found]


def _refused(data: DataConfig, error: DataError) -> Finding:
    watching = WatchingTokenizer(data.tokenizer)
    with contextlib.suppress(DataError):  # the same again
        data.build_samples(watching, num_workers=0, cache=False)
    return refused_conversation(error, watching, data.tokenizer)


def output_size(values: Mapping[str, Any]) -> int | None:
    """How many tokens the configuration's model can produce; None where the recipe has no model.

    A folder's config.json says it; other models are built without weights, which imports torch.
    """
    model = values.get("model")
    if not isinstance(model, dict):
        return None
    file = Path(str(model.get("folder", ""))).expanduser() / "config.json"
    if "folder" in model and file.is_file():
        size = json.loads(file.read_text(encoding="utf-8")).get("vocab_size")
        return None if size is None else int(size)
    return int(instantiate(model, dtype="fp32", device="meta").spec.vocab_size)


def _as_json(data: DataConfig, found: Sequence[Finding], thresholds: Mapping[str, float]) -> dict[str, Any]:
    counts = {f"{level}s": sum(finding.level == level for finding in found) for level in ("error", "warning")}
    return {
        "config": data.name,
        **counts,
        "thresholds": dict(thresholds),
        "findings": [
            {**asdict(finding), "title": CODES[finding.code].title, "cure": finding.cure} for finding in found
        ],
    }


def _print(console: Console, data: DataConfig, found: Sequence[Finding]) -> None:
    for finding in found:
        title = CODES[finding.code].title
        head = Text.assemble((finding.level, LEVELS[finding.level]), f"[{finding.code}] {title}: {finding.message}")
        console.print(head, soft_wrap=True)
        if finding.places:
            more = ", ..." if finding.count > len(finding.places) else ""
            console.print(f"  rows: {', '.join(map(short_place, finding.places))}{more}", soft_wrap=True)
        console.print(f"  fix: {finding.cure}", soft_wrap=True)
        console.print(f"  more: docs/lint.md#{finding.code.lower()}", soft_wrap=True)
    errors = sum(finding.level == "error" for finding in found)
    rest = f"{len(found)} findings, {errors} errors" if found else "nothing suspicious found"
    console.print(f"{data.name}: {rest}", soft_wrap=True)
