"""The words of the verbs that look at data, and which module each of them is in.

Imported whenever the command line is, so it imports nothing heavy.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmask.errors import EnvironmentFault

if TYPE_CHECKING:
    from torchmask.cli.open_config import DataConfig

LOOKING_VERBS = ("inspect", "lint", "prove", "diff", "snapshot")

_Verbs = Any  # argparse's subparsers have no public type


def add_looking_verbs(verbs: _Verbs, debug: argparse.ArgumentParser) -> None:
    """Adds the parsers of inspect, lint, prove, diff and snapshot."""
    trust = argparse.ArgumentParser(add_help=False)
    trust.add_argument("--trust", action="append", default=[], metavar="MODULE", help="allow components of MODULE")
    config = argparse.ArgumentParser(add_help=False, parents=[trust])
    config.add_argument("--config", required=True, metavar="NAME|PATH", help="built-in name or YAML file")
    config.add_argument("--val", action="store_true", help="the validation data (dataset_val)")
    config.add_argument(
        "recipe_and_overrides",
        nargs="*",
        metavar="RECIPE | key=value",
        help="the recipe (default: the one that the file's first line names), and overrides",
    )
    _add_inspect(verbs, [debug, config])
    _add_lint(verbs, [debug, config])
    _add_prove(verbs, [debug, config])
    _add_diff(verbs, [debug, trust])
    _add_snapshot(verbs, [debug, config])


def _add_inspect(verbs: _Verbs, parents: list[argparse.ArgumentParser]) -> None:
    inspect = verbs.add_parser(
        "inspect",
        parents=parents,
        description="Show what is trained and what is seen: documents in the terminal, coloured by weight, then the "
        "ledger, the lengths and the rows that teach nothing.",
    )
    inspect.add_argument("-n", type=_count, metavar="N", help="documents (with --packs and --html: rows) to show")
    inspect.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="ROW",
        help="this row of the source (17 or train.jsonl:17; with --packs and --html a packed row); may be repeated",
    )
    inspect.add_argument("--packs", action="store_true", help="rows as they are packed, in place of documents")
    inspect.add_argument("--ids", action="store_true", help="write each token's id behind it")
    inspect.add_argument("--no-summary", action="store_true", help="without ledger, lengths and dead rows")
    form = inspect.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="one line of JSON a document (with --packs: a row), all of them"
    )
    form.add_argument("--html", metavar="FILE", help="write one self-contained page")
    form.add_argument("--svg", metavar="FILE", help="write the terminal's view as a picture")


def _add_lint(verbs: _Verbs, parents: list[argparse.ArgumentParser]) -> None:
    lint = verbs.add_parser(
        "lint",
        parents=parents,
        description="Find what is suspicious about a configuration's data: codes TM001 to TM012, see docs/lint.md. "
        "Exit code 1 where one is an error.",
    )
    lint.add_argument("--json", action="store_true", help="print the findings as JSON")
    lint.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="CODE=SHARE",
        help="report CODE above (TM012: below) this share, for example TM003=0.02; may be repeated",
    )
    lint.add_argument("--ignore", action="append", default=[], metavar="CODE", help="leave a code out; may be repeated")
    lint.add_argument(
        "-n",
        type=_count,
        default=256,
        metavar="N",
        help="rows to render again for TM006 to TM008 and TM010 (default: 256)",
    )


def _add_prove(verbs: _Verbs, parents: list[argparse.ArgumentParser]) -> None:
    prove = verbs.add_parser(
        "prove",
        parents=parents,
        description="Show on your own data that packs change nothing: losses and gradients of a random model in fp64 "
        "with one document a row, flat packs and shared prefixes, and that no document sees another. Exit code 1 where "
        "a bound is missed.",
    )
    prove.add_argument("-n", type=_count, default=64, metavar="N", help="documents, drawn by seed (default: 64)")
    prove.add_argument("-o", "--output", default="certificate.json", metavar="FILE", help="default: certificate.json")
    prove.add_argument("--seed", type=int, default=0, help="of the model and of the documents drawn (default: 0)")


def _add_diff(verbs: _Verbs, parents: list[argparse.ArgumentParser]) -> None:
    diff = verbs.add_parser(
        "diff",
        parents=parents,
        description="Compare what two configurations train: ids, flags and weights, document by document. Overrides "
        "change both; with one configuration they make the second. Exit code 1 where anything differs.",
    )
    diff.add_argument(
        "configs_and_overrides", nargs="+", metavar="CONFIG | key=value", help="one or two configurations"
    )
    diff.add_argument("-n", type=_count, default=3, metavar="N", help="examples to show (default: 3)")
    diff.add_argument("--json", action="store_true", help="print the counts and examples as JSON")


def _add_snapshot(verbs: _Verbs, parents: list[argparse.ArgumentParser]) -> None:
    snapshot = verbs.add_parser(
        "snapshot",
        parents=parents,
        description="Write documents as text with what is trained in double brackets, to review and to keep in CI.",
    )
    snapshot.add_argument(
        "-n", type=_count, metavar="N", help="documents (default: 20, or as many as --check's FILE has)"
    )
    form = snapshot.add_mutually_exclusive_group()
    form.add_argument("-o", "--output", metavar="FILE", help="write here in place of the terminal")
    form.add_argument("--check", metavar="FILE", help="compare with FILE: exit code 1 and a diff where it differs")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def look(args: argparse.Namespace) -> int:
    """Runs the verb of parsed arguments and returns its exit code."""
    if args.verb == "diff":
        from torchmask.cli.diff import diff

        return diff(args.configs_and_overrides, count=args.n, as_json=args.json, trust=args.trust)
    from torchmask.cli.open_config import open_config

    for option in ("html", "svg", "output"):
        _check_writable(getattr(args, option, None))
    data = open_config(args.config, args.recipe_and_overrides, trust=args.trust)
    data = data.validation() if args.val else data
    if args.verb == "inspect":
        return _inspect(data, args)
    if args.verb == "lint":
        from torchmask.cli.lint import lint

        return lint(data, thresholds=args.threshold, ignored=args.ignore, num_probes=args.n, as_json=args.json)
    if args.verb == "prove":
        from torchmask.cli.prove import prove

        return prove(data, num_documents=args.n, output=args.output, seed=args.seed)
    from torchmask.cli.snapshot import snapshot

    return snapshot(data, count=args.n, output=args.output, check=args.check)


def _check_writable(file: str | None) -> None:
    """Refuses a file that cannot be written before any work is done for it.

    Raises:
        EnvironmentFault: K05.
    """
    if file is None:
        return
    path = Path(file)
    if path.is_dir() or not path.absolute().parent.is_dir():
        reason = "it is a folder" if path.is_dir() else "there is no such folder"
    elif not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        reason = "permission denied"
    else:
        return
    raise EnvironmentFault("K05", f"the file cannot be written: {reason}", where=str(path), fix="name another file")


def _inspect(data: "DataConfig", args: argparse.Namespace) -> int:
    from torchmask.cli.inspect import InspectOptions, inspect

    options = InspectOptions(
        count=args.n,
        rows=tuple(args.row),
        packs=args.packs,
        ids=args.ids,
        json=args.json,
        html=args.html,
        svg=args.svg,
        summary=not args.no_summary,
    )
    return inspect(data, options)
