"""`torchmask download` against a stand-in of the Hub on loopback, in a process of its own as users run it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("hub_stand_in", Path(__file__).parent / "hub_stand_in.py")
hub_stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_stand_in)
HubStandIn, COMMIT = hub_stand_in.HubStandIn, hub_stand_in.COMMIT

TOKEN = "hf_averysecrettokenindeed"


@pytest.fixture
def repo(tmp_path):
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def download(hub_url, tmp_path, *words, **environment):
    command = [sys.executable, "-m", "torchmask", "download", *words]
    env = {**os.environ, "HF_ENDPOINT": hub_url, "HF_HOME": str(tmp_path / "home"), **environment}
    env.setdefault("HF_TOKEN", TOKEN)
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_fetches_weights_and_json_but_no_python_and_no_pickles(repo, tmp_path):
    with HubStandIn(repo) as hub:
        result = download(hub.url, tmp_path, "ok/model", "--output-dir", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    files = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert files == {"config.json", "model.safetensors"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"weights" * 1000
    assert COMMIT in result.stdout and str(tmp_path / "out") in result.stdout


def test_ignore_patterns_leave_files_out_and_the_cache_is_the_default_place(repo, tmp_path):
    with HubStandIn(repo) as hub:
        result = download(hub.url, tmp_path, "ok/model", "--ignore-patterns", "*.safetensors")
    folder = tmp_path / "home" / "hub" / "models--ok--model" / "snapshots" / COMMIT
    assert {path.name for path in folder.iterdir()} == {"config.json"}
    assert "no safetensors" in result.stdout


def test_a_connection_that_breaks_is_taken_up_at_the_byte_where_it_broke(repo, tmp_path):
    data = bytes(range(256)) * 98_304  # 24 MiB: huggingface_hub writes chunks of 10 MiB
    (repo / "model.safetensors").write_bytes(data)
    with HubStandIn(repo, cut_after=11 * 2**20) as hub:
        result = download(hub.url, tmp_path, "ok/model", "--output-dir", str(tmp_path / "out"))
        ranges = [range_ for method, path, range_ in hub.requests if method == "GET" and "safetensors" in path]
    assert result.returncode == 0, result.stderr
    assert hub.cuts == 1
    assert ranges == [None, f"bytes={10 * 2**20}-"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == data


def test_a_second_command_fetches_only_what_is_missing(repo, tmp_path):
    with HubStandIn(repo) as hub:
        download(hub.url, tmp_path, "ok/model", "--output-dir", str(tmp_path / "out"))
        (tmp_path / "out" / "config.json").unlink()
        hub.requests.clear()
        result = download(hub.url, tmp_path, "ok/model", "--output-dir", str(tmp_path / "out"))
        fetched = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    assert result.returncode == 0, result.stderr
    assert [path.rsplit("/", 1)[1] for path in fetched] == ["config.json"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/nothing", "does not know it"),
        ("nobody/private", "not logged in"),
        ("nobody/badtoken", "does not accept the access token"),
        ("nobody/gated", "accept it at https://huggingface.co/nobody/gated"),
    ],
)
def test_a_refusal_is_explained_without_a_traceback_or_the_token(repo, tmp_path, name, words):
    with HubStandIn(repo) as hub:
        result = download(hub.url, tmp_path, name, "--hf-token", TOKEN, "--debug")
        assert f"Bearer {TOKEN}" in hub.tokens
    assert result.returncode == 7
    assert "error[R18]" in result.stderr and words in result.stderr
    assert TOKEN not in result.stdout + result.stderr


def test_an_unknown_revision_is_named(repo, tmp_path):
    with HubStandIn(repo) as hub:
        result = download(hub.url, tmp_path, "ok/model", "--revision", "nosuch")
    assert result.returncode == 7
    assert "there is no revision 'nosuch'" in result.stderr


def test_no_network_is_said_and_not_a_traceback(tmp_path):
    result = download("http://127.0.0.1:9", tmp_path, "ok/model")
    assert result.returncode == 7
    assert "could not be reached" in result.stderr and "Traceback" not in result.stderr


def test_a_file_name_that_leaves_the_folder_is_refused(repo, tmp_path):
    with HubStandIn(repo, extra_names=("../evil.json",)) as hub:
        result = download(hub.url, tmp_path, "ok/model", "--output-dir", str(tmp_path / "out"))
    assert result.returncode == 4
    assert "error[R19]" in result.stderr
    assert not (tmp_path / "evil.json").exists()
