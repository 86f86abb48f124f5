"""`torchmask data build | ls | rm`: tokenised data made ahead of time, and what of it is on the disk.

Imported whenever the command line is, so it imports nothing but the standard library until a verb is used.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmask.errors import ConfigError

if TYPE_CHECKING:
    from torchmask.data.cache import Listed

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def add_data_verb(verbs: Any, debug: argparse.ArgumentParser) -> None:
    """Adds the parser of `data` with its own verbs."""
    place = argparse.ArgumentParser(add_help=False, parents=[debug])
    place.add_argument(
        "--cache", metavar="DIR", help="the cache's folder (default: $TORCHMASK_CACHE, else ~/.cache/torchmask)"
    )
    data = verbs.add_parser(
        "data", parents=[debug], description="Tokenised data on the disk: make it, list it, remove it."
    )
    own = data.add_subparsers(dest="data_verb", metavar="build | ls | rm", required=True)

    build = own.add_parser(
        "build",
        parents=[place],
        description="Tokenise and pack a configuration's data now, so that runs start at once. What is there is "
        "checked byte by byte, and made again where it is damaged.",
    )
    build.add_argument("--config", required=True, metavar="NAME|PATH", help="built-in name or YAML file")
    build.add_argument("--trust", action="append", default=[], metavar="MODULE", help="allow components of MODULE")
    build.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="processes that tokenise (default: the data set's num_workers, else the cores)",
    )
    build.add_argument(
        "recipe_and_overrides",
        nargs="*",
        metavar="RECIPE | key=value",
        help="the recipe (default: the one that the file's first line names), and overrides",
    )

    ls = own.add_parser("ls", parents=[place], description="List what is kept: the newest first.")
    ls.add_argument("--json", action="store_true", help="print JSON, with everything that determines each entry")
    ls.add_argument("--check", action="store_true", help="read every byte and compare checksums")

    rm = own.add_parser("rm", parents=[place], description="Remove entries; data sets go with their packed rows.")
    rm.add_argument("keys", nargs="*", metavar="KEY", help="as `torchmask data ls` shows them; a beginning is enough")
    rm.add_argument("--all", action="store_true", help="remove everything")
    rm.add_argument("--older-than", metavar="AGE", help="remove what was made longer ago, such as 12h, 30d or 2w")


def data(args: argparse.Namespace) -> int:
    """Runs `torchmask data ...`.

    Raises:
        ConfigError: what was typed does not fit; everything that is wrong with a configuration.
        DataError: as the data set's builder.
    """
    if args.data_verb == "build":
        return build(
            args.config, args.recipe_and_overrides, cache=args.cache, num_workers=args.num_workers, trust=args.trust
        )
    if args.data_verb == "ls":
        return ls(cache=args.cache, as_json=args.json, check=args.check)
    return rm(args.keys, cache=args.cache, everything=args.all, older_than=args.older_than)


def build(
    config: str,
    words: Sequence[str] = (),
    *,
    cache: str | None = None,
    num_workers: int | None = None,
    trust: Sequence[str] = (),
) -> int:
    """Makes the entries that a run of this configuration with `dataset.cache=true` will open.

    Those that are there are read and compared with their checksums; damaged ones are built again.

    Args:
        config: built-in name or YAML file.
        words: the recipe's name, if given, and overrides.
        cache: the cache's folder; None = the configuration's own, else the usual one.
        num_workers: processes that tokenise; None = as the data set's own key says, else as many as there are cores.
        trust: modules whose components are allowed.
    """
    from torchmask.cli.open_config import open_config
    from torchmask.data.cache import every_byte_checked
    from torchmask.data.report import format_ledger

    opened = open_config(config, words, trust=trust)
    for part in [opened, *([opened.validation()] if opened.values.get("dataset_val") else [])]:
        component = part.values[part.key]
        own = component.get("cache")
        given = (num_workers, component.get("num_workers"), _num_cores())
        workers = next(number for number in given if number is not None)
        began = time.perf_counter()
        with every_byte_checked():
            samples = part.build_samples(part.tokenizer, cache=cache or own or True, num_workers=workers)
            if samples.home is None:
                message = f"{component['_component_']} takes no `cache`, so nothing can be kept"
                raise ConfigError("C09", message, where=part.key, fix="use a data set builder of torchmask.data")
            packs = part.pack(samples)
        print(format_ledger(packs.report, title=part.key))
        print(f"  kept in {samples.home} ({time.perf_counter() - began:.1f} s)")
        if not own:
            print(f"  set {part.key}.cache=true for runs that use it" + (f", or ={cache}" if cache else ""))
    return 0


def ls(*, cache: str | None = None, as_json: bool = False, check: bool = False) -> int:
    """Prints the entries of the cache.

    Returns:
        1 where an entry is damaged, else 0.
    """
    from torchmask.data.cache import cache_root, list_entries
    from torchmask.data.mapped import Damaged, verify

    root = cache_root(cache or True)
    entries = list_entries(root)
    problems = {entry.key: entry.problem for entry in entries}
    for entry in entries:
        if check and entry.problem is None:
            try:
                verify(entry.folder)
            except Damaged as error:
                problems[entry.key] = str(error)
    if as_json:
        print(json.dumps([_as_json(entry, problems[entry.key]) for entry in entries], indent=2, ensure_ascii=False))
        return int(any(problems.values()))
    if not entries:
        print(f"nothing in {root}")
        return 0
    total = sum(entry.num_bytes for entry in entries)
    print(f"{root}: {len(entries)} entries, {_size(total)}")
    print(f"{'key':<12}  {'size':>9}  {'documents':>11}  {'tokens':>14}  {'age':>5}  source")
    sources = {entry.key: str(entry.facts.get("source", "")) for entry in entries}
    for entry in entries:
        what = _what(entry, sources)
        problem = f"  DAMAGED: {problems[entry.key]}" if problems[entry.key] else ""
        documents, tokens = (f"{entry.header[k]:,}" if k in entry.header else "" for k in ("documents", "tokens"))
        age = _age(time.time() - entry.made)
        print(
            f"{entry.key[:12]}  {_size(entry.num_bytes):>9}  {documents:>11}  {tokens:>14}  {age:>5}  {what}{problem}"
        )
    return int(any(problems.values()))


def rm(
    keys: Sequence[str], *, cache: str | None = None, everything: bool = False, older_than: str | None = None
) -> int:
    """Removes entries.

    Raises:
        ConfigError: C09, nothing or too much is named; C11, no entry of this key.
    """
    from torchmask.data.cache import cache_root, list_entries, remove_entry

    if bool(keys) + everything + (older_than is not None) != 1:
        raise ConfigError("C09", "say what to remove", fix="one of: KEY ..., --all, --older-than 30d")
    root = cache_root(cache or True)
    entries = list_entries(root)
    if older_than is not None:
        limit = time.time() - _seconds(older_than)
        chosen = {entry.key for entry in entries if entry.made < limit}
    else:
        chosen = {entry.key for entry in entries} if everything else _chosen(keys, entries, root)
    # Rows are of no use without their samples.
    chosen |= {entry.key for entry in entries if entry.facts.get("samples") in chosen}
    freed = 0
    for entry in entries:
        if entry.key in chosen:
            remove_entry(entry.folder)
            freed += entry.num_bytes
    print(f"removed {len(chosen)} of {len(entries)} entries, {_size(freed)}")
    return 0


def _chosen(keys: Sequence[str], entries: "Sequence[Listed]", root: Path) -> set[str]:
    chosen = set()
    for key in keys:
        found = [entry.key for entry in entries if entry.key.startswith(key)]
        if not found or not key:
            raise ConfigError("C11", f"no entry {key!r} in {root}", fix="`torchmask data ls` lists them")
        if len(found) > 1:
            raise ConfigError("C11", f"{key!r} begins {len(found)} keys: {', '.join(found)}", fix="write more of it")
        chosen.add(found[0])
    return chosen


def _seconds(age: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", age)
    if match is None:
        fix = "write a number and m, h, d or w, such as 12h, 30d or 2w"
        raise ConfigError("C03", f"--older-than {age!r} is no age", fix=fix)
    return float(match[1]) * _UNITS[match[2]]


def _what(entry: "Listed", sources: dict[str, str]) -> str:
    if entry.facts.get("kind") == "rows":
        options = entry.facts.get("options", {})
        length = options.get("max_seq_len")
        of = entry.facts.get("samples", "")
        return f"{entry.header.get('rows', 0):,} rows of {length} slots of {of[:12]} ({sources.get(of) or 'removed'})"
    split = entry.facts.get("split")
    return str(entry.facts.get("source", "?")) + (f" [{split}]" if split not in (None, "train") else "")


def _as_json(entry: "Listed", problem: str | None) -> dict[str, Any]:
    counts: dict[str, Any] = {k: entry.header[k] for k in ("documents", "tokens", "rows") if k in entry.header}
    return {
        "key": entry.key,
        "folder": str(entry.folder),
        "bytes": entry.num_bytes,
        "made": entry.made,
        **counts,
        "problem": problem,
        "facts": entry.facts,
    }


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _age(seconds: float) -> str:
    for unit in ("w", "d", "h", "m"):
        if seconds >= _UNITS[unit]:
            return f"{seconds / _UNITS[unit]:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"
