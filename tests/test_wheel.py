"""The wheel carries recipes and configurations, and works outside the repository."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def shell(*words, cwd, timeout=900, **environment):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**env, **environment},
    )
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    shell(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPO, cwd=folder)
    [path] = folder.glob("torchmask-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh virtual environment with the wheel; its dependencies are those of this environment, torchmask is not."""
    folder = tmp_path_factory.mktemp("outside")
    python = folder / "venv" / "bin" / "python"
    shell(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    site = Path(shell(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    shell(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # a path file is read after site-packages, so the wheel's torchmask wins over anything listed here; path files of
    # that folder (the editable install) are not read
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    home = shell(python, "-c", "import torchmask; print(torchmask.__file__)", cwd=folder).strip()
    assert Path(home).is_relative_to(folder)
    return folder, python.parent / "torchmask"


def test_recipes_and_configurations_are_inside_the_package_and_nothing_is_beside_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"torchmask"}
    for kind in ("recipes", "configs"):
        for path in (REPO / kind).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"torchmask/_{kind}/{path.relative_to(REPO / kind).as_posix()}" in names
    assert not [name for name in names if "__pycache__" in name]


def test_ls_shows_what_the_checkout_shows(installed):
    folder, torchmask = installed
    here = shell(sys.executable, "-m", "torchmask", "ls", cwd=REPO)
    assert shell(torchmask, "ls", cwd=folder) == here


def test_the_demo_runs_from_the_wheel_with_a_copied_recipe_and_configuration(installed):
    folder, torchmask = installed
    if not (REPO / "configs" / "tiny" / "qa.yaml").exists():
        pytest.skip("the embedded default is not there yet")
    shell(torchmask, "cp", "finetune", "mine.py", cwd=folder)
    shell(torchmask, "cp", "tiny/qa", "mine.yaml", cwd=folder)
    short = ["max_steps_per_epoch=3", "evaluate=null", "output_dir=out"]
    shell(torchmask, "run", "mine.py", "--config", "mine.yaml", *short, cwd=folder)
    assert (folder / "out" / "final" / "config.json").exists()
    shell(torchmask, "run", "finetune", "--config", "tiny/qa", *short[:2], "output_dir=again", cwd=folder)
    assert (folder / "again" / "metrics.jsonl").read_text() != ""
