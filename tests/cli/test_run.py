"""`torchmask run` in this process: what is parsed, what reaches the recipe, what comes back."""

import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from torchmask.cli.main import main
from torchmask.cli.run import TORCHRUN_FLAGS, parse
from torchmask.errors import ConfigError

RECIPE = '''
"""A recipe for tests."""
from dataclasses import dataclass
from torchmask.config import Component, instantiate
from torchmask.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Config:
    mode: str = "ok"  # what happens
    seed: int = 0  # a number
    rows: Component | None = None  # built and printed


def main(cfg: Config) -> None:
    print("config", cfg.mode, cfg.seed)
    if cfg.rows:
        print("rows", instantiate(cfg.rows))
    if cfg.mode == "data":
        raise DataError("D01", "row 7 is broken", where="train.jsonl:7")
    if cfg.mode == "bug":
        raise KeyError("oops")
    if cfg.mode == "sleep":
        import time
        print("ready", flush=True)
        time.sleep(30)
    if cfg.mode == "threads":
        import os
        print("spins", os.environ.get("GOMP_SPINCOUNT"))
    if cfg.mode == "chatty":
        for i in range(100_000):
            print("line", i, flush=True)
        open("finished", "w").close()
'''


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "my_recipe.py").write_text(textwrap.dedent(RECIPE))
    (tmp_path / "my.yaml").write_text("# mine\nseed: 3\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "torchmask", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_the_recipe_is_called_with_its_config(recipe, capsys):
    assert main(["run", "my_recipe.py", "--config", "my.yaml", "mode=a=b"]) == 0
    assert capsys.readouterr().out == "config a=b 3\n"


@pytest.mark.parametrize(
    ("given", "seen"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_sleep_soon_unless_the_environment_says_otherwise(recipe, monkeypatch, capsys, given, seen):
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # noted, so that it is put back afterwards
    monkeypatch.delenv("GOMP_SPINCOUNT")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["run", "my_recipe.py", "--config", "my.yaml", "mode=threads"]) == 0
    assert f"spins {seen}" in capsys.readouterr().out


def test_options_may_stand_before_or_after_the_recipe(recipe, capsys):
    assert main(["run", "--config=my.yaml", "--debug", "my_recipe.py", "seed=4"]) == 0
    assert capsys.readouterr().out == "config ok 4\n"


def test_components_beside_the_recipe_are_built(recipe, capsys):
    (recipe / "my_code.py").write_text("def rows(n=1):\n    return list(range(n))\n")
    assert main(["run", "my_recipe.py", "--config", "my.yaml", "rows=my_code.rows", "rows.n=3"]) == 0
    assert "rows [0, 1, 2]" in capsys.readouterr().out


@pytest.mark.parametrize(("mode", "code", "words"), [("data", 3, "error[D01] train.jsonl:7"), ("bug", 1, "Traceback")])
def test_errors_of_the_recipe_have_their_exit_code(recipe, capsys, mode, code, words):
    assert main(["run", "my_recipe.py", "--config", "my.yaml", f"mode={mode}"]) == code
    assert words in capsys.readouterr().err


def test_a_bad_configuration_stops_before_the_recipe_runs(recipe, capsys):
    assert main(["run", "my_recipe.py", "--config", "my.yaml", "sed=4", "seed=x"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[0] == "error[C01] command line: unknown key 'sed'"
    assert "(exit 2, 2 problems)" in output.err


def test_validate_says_good_or_lists_what_is_wrong(recipe, capsys):
    assert main(["validate", "--config", "my.yaml", "my_recipe.py"]) == 0
    assert "good for recipe my_recipe.py" in capsys.readouterr().out
    assert main(["validate", "--config", "my.yaml", "my_recipe.py", "mode=./nowhere.json"]) == 2
    assert "error[C15] command line: mode: there is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "x"], "no recipe named"),
        (["finetune"], "no --config given"),
        (["finetune", "--config"], "--config needs a value"),
        (["finetune", "--config", "x", "--nproc-per-node", "2"], "unknown option '--nproc-per-node' after"),
        (["-m", "finetune", "--config", "x"], "-m does not go with a recipe"),
        (["a=b", "--config", "x"], "no recipe named"),
    ],
)
def test_wrong_command_lines_say_the_form(words, message):
    with pytest.raises(ConfigError) as raised:
        parse(words)
    assert raised.value.id == "C16" and message in raised.value.message


def test_torchrun_options_are_split_from_the_rest():
    before = ["--nnodes=2", "--nproc_per_node", "4", "--standalone", "--rdzv-id", "7"]
    after = ["finetune", "--config", "tiny/qa", "--trust", "m", "--debug", "a=1", "~b"]
    request = parse([*before, *after])
    assert request.torchrun_options == tuple(before)
    assert request.worker_arguments() == ["run", *after]


def test_our_list_of_flags_equals_torchs():
    from torch.distributed.run import get_args_parser

    flags = set()
    for action in get_args_parser()._actions:
        if action.nargs == 0 and "--help" not in action.option_strings:
            flags |= {re.sub("_", "-", name.lstrip("-")) for name in action.option_strings if name.startswith("--")}
    assert flags == set(TORCHRUN_FLAGS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_the_recipe_handles_any_ends_as_stopped(recipe, number):
    process = start("run", "my_recipe.py", "--config", "my.yaml", "mode=sleep")
    while "ready" not in (line := process.stdout.readline()):
        assert line or process.poll() is None
    process.send_signal(number)
    began = time.monotonic()
    _, error = process.communicate(timeout=20)
    assert process.returncode == 75 and time.monotonic() - began < 10
    assert "error[R04]" in error and "Traceback" not in error


def test_a_reader_that_leaves_does_not_end_a_run(recipe):
    process = start("run", "my_recipe.py", "--config", "my.yaml", "mode=chatty")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 0, process.stderr.read()
    assert (recipe / "finished").exists()
