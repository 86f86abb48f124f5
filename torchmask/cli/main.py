"""`torchmask VERB ...`: the verbs, and how every one of them ends.

`torchmask --help` and `torchmask ls` are typed often and must answer at once, so a verb's module is imported when the
verb is used, and modules imported here import only the standard library.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import torchmask
from torchmask.cli.data import add_data_verb
from torchmask.cli.looking import LOOKING_VERBS, add_looking_verbs
from torchmask.cli.report import report
from torchmask.cli.stopping import stop_when_asked

_VERBS = """\
verbs:
  run        run a recipe, in this process or on many devices
  ls         list the built-in recipes and configurations
  cp         copy one to edit it
  cat        print one
  validate   check a configuration without running it
  inspect    show what is trained and seen, in the terminal, as HTML or as JSON
  lint       find what is suspicious about a configuration's data
  prove      show on your own data that packs change no loss and no gradient
  diff       compare the masks of two configurations
  snapshot   masks as bracketed text, for review and CI
  data       tokenise ahead of time (build), list (ls) and remove (rm) what is kept
  download   fetch a model from the Hugging Face Hub
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors are printed, never raised.

    Args:
        argv: the words after `torchmask`; by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except BrokenPipeError as error:
        if words[:1] == ["run"]:
            return report(error, debug="--debug" in words)
        _write_nowhere()
        return 0
    except BaseException as error:
        return report(error, debug="--debug" in words, trains=words[:1] == ["run"])


def entry_point() -> None:
    """The console script."""
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _write_nowhere()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A worker of several: gloo's threads may still wait for the others, and the orderly way out would end in an
        # abort ("terminate called without an active exception"), one time in three where the worker gave up and now
        # and then where all is done.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _write_nowhere() -> None:
    """Whoever reads has seen enough (`torchmask ls | head`): what is still to be written goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["run"]:  # torchrun's options come before the recipe's name, which argparse cannot express
        from torchmask.cli.run import run

        return run(words[1:])
    args = _parse(words)
    if args.verb is None:
        _parser().print_help()
        return 0
    with stop_when_asked(f"before `torchmask {args.verb}` was done"):
        return _run_verb(args)


def _run_verb(args: argparse.Namespace) -> int:
    if args.verb == "ls":
        if args.models:
            from torchmask.cli.ls_models import ls_models

            return ls_models()
        from torchmask.cli.ls import ls

        return ls()
    if args.verb == "cat":
        from torchmask.cli.copy import cat

        return cat(args.name)
    if args.verb == "cp":
        from torchmask.cli.copy import cp

        return cp(args.name, args.destination, no_clobber=args.no_clobber, make_parents=args.make_parents)
    if args.verb == "validate":
        from torchmask.cli.validate import validate

        return validate(args.recipe_and_overrides, config=args.config, trust=args.trust)
    if args.verb in LOOKING_VERBS:
        from torchmask.cli.looking import look

        return look(args)
    if args.verb == "data":
        from torchmask.cli.data import data

        return data(args)
    from torchmask.cli.download import download

    return download(
        args.repo,
        revision=args.revision,
        output_dir=args.output_dir,
        ignore_patterns=args.ignore_patterns,
        force=args.force,
        token=args.hf_token,
    )


def _parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a verb; overrides may also follow an option (`validate finetune --config X a=b`)."""
    args, rest = _parser().parse_known_args(words)
    takes_overrides = args.verb == "validate" or args.verb in LOOKING_VERBS or hasattr(args, "num_workers")
    if rest and (not takes_overrides or any(word.startswith("-") for word in rest)):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.recipe_and_overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchmask",
        description=torchmask.__doc__.splitlines()[0] if torchmask.__doc__ else None,
        epilog=_VERBS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"torchmask {torchmask.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", help="see below; `torchmask VERB --help` says more")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show tracebacks")

    verbs.add_parser("run", parents=[debug], add_help=False)
    ls = verbs.add_parser("ls", parents=[debug], description="List the built-in recipes and configurations.")
    ls.add_argument("--models", action="store_true", help="list the families of models and their builders instead")

    cat = verbs.add_parser("cat", parents=[debug], description="Print a built-in recipe or configuration.")
    cat.add_argument("name", help="as `torchmask ls` shows it")

    cp = verbs.add_parser("cp", parents=[debug], description="Copy a built-in recipe or configuration to edit it.")
    cp.add_argument("name", help="as `torchmask ls` shows it")
    cp.add_argument("destination", help="file or folder; the suffix is added if missing")
    cp.add_argument("-n", "--no-clobber", action="store_true", help="keep a file that exists")
    cp.add_argument("--make-parents", action="store_true", help="make missing folders")

    validate = verbs.add_parser(
        "validate", parents=[debug], description="Check a configuration, its components and the files it names."
    )
    validate.add_argument("--config", required=True, metavar="NAME|PATH", help="built-in name or YAML file")
    validate.add_argument("--trust", action="append", default=[], metavar="MODULE", help="allow components of MODULE")
    validate.add_argument(
        "recipe_and_overrides",
        nargs="*",
        metavar="RECIPE | key=value",
        help="the recipe (default: the one that the file's first line names), and overrides",
    )

    add_looking_verbs(verbs, debug)
    add_data_verb(verbs, debug)

    download = verbs.add_parser(
        "download",
        parents=[debug],
        description="Fetch a model from the Hugging Face Hub; run it again to go on after an interruption.",
    )
    download.add_argument("repo", metavar="REPO", help="for example meta-llama/Llama-3.2-1B")
    download.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    download.add_argument("--output-dir", metavar="DIR", help="default: the Hugging Face cache")
    download.add_argument(
        "--ignore-patterns", action="append", default=[], metavar="GLOB", help="files to leave out; may be repeated"
    )
    download.add_argument("--force", action="store_true", help="fetch again what is already there")
    download.add_argument(
        "--hf-token",
        metavar="TOKEN",
        help="access token for gated models; better: `hf auth login` or the variable HF_TOKEN (not visible in `ps`)",
    )
    return parser
