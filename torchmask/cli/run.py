"""`torchmask run [TORCHRUN-OPTIONS] RECIPE --config NAME|PATH [overrides]`.

Without torchrun's options the recipe runs in this process: no launcher, no process group. With them, the configuration
is checked first (no torch needed for that), then torch's elastic launcher starts one worker for each device.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torchmask.cli import worker
from torchmask.cli.catalog import find_config, find_recipe
from torchmask.cli.stopping import stop_when_asked
from torchmask.config.built_in import built_in_folder
from torchmask.errors import ConfigError

USAGE = """\
usage: torchmask run [TORCHRUN-OPTIONS] RECIPE --config NAME|PATH [key=value ...] [~key ...]

Run a recipe. Without torchrun's options it runs in this process; with them (for example --nproc-per-node 2) it runs in
as many workers, started by torch's elastic launcher, whose options are all accepted.

  RECIPE               built-in name (see `torchmask ls`) or the path of your copy (my_recipe.py)
  --config NAME|PATH   built-in name or a YAML file
  key=value            override: a.b=v, list=[1,2], optimizer=torch.optim.SGD (drops the old component's arguments)
  ~key                 remove a key
  --trust MODULE       let the configuration name components of MODULE; may be repeated
  --debug              show tracebacks
  -h, --help           show this text

exit codes: 0 done, 1 bug, 2 configuration, 3 data, 4 weights or checkpoint, 5 diverged, 6 out of memory, 7 environment,
8 worker lost, 75 stopped on request and saved (run again to go on), 130 stopped at once
"""

TORCHRUN_FLAGS = (
    "standalone",
    "module",
    "no-python",
    "run-path",
    "virtual-local-rank",
)
"""Torchrun's options that take no value; the others take one. A test compares them with torch's own parser."""

_NOT_FOR_RECIPES = ("module", "no-python", "run-path")
# Until the recipe handles signals itself.
_STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
_BEFORE_TRAINING = "while not training; what was saved before stands"
_OWN_OPTIONS = ("--config", "--trust", "--debug", "--help")


@dataclass(frozen=True)
class Request:
    """A parsed `torchmask run` command line.

    Args:
        recipe: as typed.
        config: as typed.
        overrides: `key=value` and `~key`.
        trust: modules named with `--trust`.
        torchrun_options: to be parsed by torch.
        debug: show tracebacks.
    """

    recipe: str
    config: str
    overrides: tuple[str, ...]
    trust: tuple[str, ...] = ()
    torchrun_options: tuple[str, ...] = ()
    debug: bool = False

    def worker_arguments(self) -> list[str]:
        """The command line of one worker, after `torchmask`."""
        trust = [word for module in self.trust for word in ("--trust", module)]
        debug = ["--debug"] if self.debug else []
        return ["run", self.recipe, "--config", self.config, *trust, *debug, *self.overrides]


def run(words: Sequence[str]) -> int:
    """Runs a recipe and returns the exit code of a run without errors (0), or that of the workers."""
    if any(word in ("-h", "--help") for word in words):
        print(USAGE, end="")
        return 0
    request = parse(words)
    _wait_without_spinning()
    if worker.is_worker():
        return _run_as_worker(request)
    with stop_when_asked(_BEFORE_TRAINING, signals=_STOP_SIGNALS):
        if request.torchrun_options:
            from torchmask.cli.launch import launch

            check(request.recipe, request.config, request.overrides, request.trust)
            return launch(request)
        run_here(request)
    return 0


def _wait_without_spinning() -> None:
    """Lets torch's threads sleep soon when one waits for another; read by libgomp when torch is imported.

    Otherwise each spins for a long while and takes a core from whoever computes there: see tools/bench_spin.py.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def parse(words: Sequence[str]) -> Request:
    """Splits a command line into torchrun's options, the recipe, our options and overrides.

    Raises:
        ConfigError: C16 for a missing recipe or configuration and for unknown options.

    >>> parse(["--nproc-per-node", "2", "finetune", "--config", "tiny/qa", "seed=1"]).torchrun_options
    ('--nproc-per-node', '2')
    """
    rest = list(words)
    options: list[str] = []
    overrides: list[str] = []
    trust: list[str] = []
    recipe = config = None
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--config", "-c", "--trust"):
            if not equals and not rest:
                raise ConfigError("C16", f"{name} needs a value", where="command line")
            value = value if equals else rest.pop(0)
            config = config if name == "--trust" else value
            trust += [value] if name == "--trust" else []
        elif word == "--debug":
            continue
        elif word.startswith("-"):
            if recipe is not None:
                raise _unknown_option(word)
            options.append(word)
            takes_value = not equals and name.lstrip("-").replace("_", "-") not in (*TORCHRUN_FLAGS, "m")
            options += [rest.pop(0)] if takes_value and rest else []
        elif recipe is None:
            recipe = word
        else:
            overrides.append(word)
    form = "torchmask run [TORCHRUN-OPTIONS] RECIPE --config NAME|PATH [overrides]"
    if recipe is None or "=" in recipe:
        raise ConfigError("C16", "no recipe named", where="command line", fix=f"{form}; `torchmask ls` shows them")
    if config is None:
        raise ConfigError("C16", "no --config given", where="command line", fix=form)
    for option in options:
        if option.lstrip("-").replace("_", "-") in (*_NOT_FOR_RECIPES, "m"):
            raise ConfigError("C16", f"{option} does not go with a recipe", where="command line", fix=form)
    return Request(recipe, config, tuple(overrides), tuple(trust), tuple(options), "--debug" in words)


def _unknown_option(word: str) -> ConfigError:
    near = get_close_matches(word.partition("=")[0], _OWN_OPTIONS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    fix = hint + "torchrun's options stand before the recipe's name, overrides are written key=value"
    return ConfigError("C16", f"unknown option {word!r} after the recipe's name", where="command line", fix=fix)


def check(
    recipe: str,
    config: str,
    overrides: Sequence[str],
    trusted: Sequence[str],
    *,
    check_files: bool = False,
    open_tokenizer: bool = False,
) -> Any:
    """The checked configuration of a request, with the trust it was checked under and the recipe's file.

    Args:
        recipe, config, overrides, trusted: as typed.
        check_files: also report files and folders that are named and do not exist.
        open_tokenizer: also report what only the tokenizer's own files tell; they are read where all else is good.

    Returns:
        checked, trust, recipe's path

    Raises:
        ConfigError: everything that is wrong with it.
    """
    from torchmask.cli.tokenizer_checks import problems_of_formats, problems_of_tokenizers
    from torchmask.config import Trust, load_config

    recipe_path, config_path = find_recipe(recipe), find_config(config)
    folders = []
    for path, kind in ((recipe_path, "recipes"), (config_path, "configs")):
        if not path.resolve().is_relative_to(built_in_folder(kind).resolve()):
            folders.append(str(path.resolve().parent))
    trust = Trust(modules=tuple(trusted), folders=tuple(dict.fromkeys(folders)))
    checked = load_config(
        config_path,
        recipe=recipe_path,
        overrides=overrides,
        trust=trust,
        check_files=check_files,
        more_checks=problems_of_tokenizers if open_tokenizer else problems_of_formats,
    )
    return checked, trust, recipe_path


def run_here(request: Request) -> None:
    """Checks the configuration, imports the recipe and calls its `main` in this process."""
    from torchmask.config import load_recipe, trust_for_this_process

    checked, trust, recipe_path = check(request.recipe, request.config, request.overrides, request.trust)
    trust_for_this_process(trust)
    sys.stdout = _Surviving(sys.stdout)
    try:
        recipe = load_recipe(Path(recipe_path))
        recipe.main(checked.as_config(recipe.Config))
    finally:
        sys.stdout = sys.stdout.stream if isinstance(sys.stdout, _Surviving) else sys.stdout


def _run_as_worker(request: Request) -> int:
    """Runs the recipe and leaves word of a good end; bad ends are left by `torchmask.cli.report`."""
    same_end = _end_that_would_repeat()
    worker.leave_start()
    if same_end is not None:
        worker.leave_ending(same_end.exit_code, same_end.id, same_end.text)
        return same_end.exit_code
    with stop_when_asked(_BEFORE_TRAINING, signals=_STOP_SIGNALS):
        run_here(request)
    worker.leave_ending(0)
    return 0


def _end_that_would_repeat() -> worker.WorkerEnding | None:
    """The end of the attempt before, where `--max-restarts` could only repeat it or undo a stop that was asked for.

    One worker that stopped among others that failed does not count: the agent tells the rest to stop when one fails.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    endings = worker.read_endings(Path(os.environ[worker.FOLDER_VARIABLE]), attempt=attempt - 1)
    repeating = [e for e in endings if e.exit_code in (2, 3, 4, 5)]
    stopped = [e for e in endings if e.exit_code in (75, 130)]
    if repeating or (stopped and len(stopped) == len(endings)):
        return (repeating or stopped)[0]
    return None


class _Surviving:
    """A stdout whose reader may leave (`torchmask run ... | head`): training goes on, silently."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self.stream.write(text))
        except BrokenPipeError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._silence()

    def _silence(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
