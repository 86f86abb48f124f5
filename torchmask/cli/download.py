"""`torchmask download REPO`: a model's weights, configuration and tokenizer from the Hugging Face Hub.

The work is huggingface_hub's; here is what may be fetched (safetensors, JSON and text; never Python or pickles) and
what an answer of the Hub means for the person who typed the command.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torchmask.errors import ConfigError, EnvironmentFault, TorchmaskError, WeightsError

ALLOWED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""What is fetched: no `*.bin`, `*.pt` (pickles can run code) and no `*.py`."""


def download(
    repo: str,
    *,
    revision: str = "main",
    output_dir: str | None = None,
    ignore_patterns: Sequence[str] = (),
    force: bool = False,
    token: str | None = None,
) -> int:
    """Fetches a model, prints where it is and which commit it is.

    A connection that breaks is taken up again where it broke; after an interrupted command, the next one keeps the
    files that were whole.

    Args:
        repo: `owner/name` on the Hub.
        revision: branch, tag or commit.
        output_dir: folder for the files; by default the Hugging Face cache.
        ignore_patterns: globs of files to leave out.
        force: fetch again what is already there.
        token: access token; by default the variable HF_TOKEN or what `hf auth login` stored. Never printed.

    Raises:
        ConfigError: C16 for a name that cannot be a repository's.
        EnvironmentFault: R18 if the Hub refuses, does not know the repository or cannot be reached.
        WeightsError: R19 for a file name that leaves the folder, W01 if a file did not arrive whole.
    """
    if "/" not in repo or repo.count("/") > 1:
        raise ConfigError("C16", f"{repo!r} is not a repository of the Hub", fix="write owner/name")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    with _explained(repo, revision, secret=token or os.environ.get("HF_TOKEN")):
        folder = snapshot_download(
            repo,
            revision=revision,
            local_dir=output_dir,
            allow_patterns=list(ALLOWED),
            ignore_patterns=list(ignore_patterns) or None,
            force_download=force,
            token=token,
        )
    files = [path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts]
    size = sum(path.stat().st_size for path in files)
    print(f"{repo}: {len(files)} files, {size / 2**20:.1f} MiB")
    print(f"folder: {folder}")
    print(f"revision: {_commit(folder, output_dir) or revision}")
    if not any(path.suffix == ".safetensors" for path in files):
        print("no safetensors among them; pickled weights are not fetched, though they can be read (weights_only)")
    return 0


def _commit(folder: str, output_dir: str | None) -> str | None:
    """The commit that was fetched: the name of the snapshot in the cache, or what lies beside the files."""
    if output_dir is None:
        return Path(folder).name
    for metadata in (Path(folder) / ".cache" / "huggingface" / "download").glob("*.metadata"):
        return metadata.read_text(encoding="utf-8").splitlines()[0]
    return None


@contextlib.contextmanager
def _explained(repo: str, revision: str, *, secret: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        known = _explain(error, repo, revision)
        if known is None and secret and secret in str(error):
            known = EnvironmentFault("R18", _first_line(error), where=repo)
        if known is None:
            raise
        if secret:
            known.message = known.message.replace(secret, "***")
        # `from None`: the original holds the request with its headers, token included
        raise type(known)(known.id, known.message, where=known.where, fix=known.fix) from None


def _explain(error: Exception, repo: str, revision: str) -> TorchmaskError | None:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    again = f"run `torchmask download {repo}` again: files that are whole are kept"
    if isinstance(error, errors.GatedRepoError):
        message = "the model is gated: its owner wants you to accept a licence first"
        fix = f"accept it at {page}, then `hf auth login` (or set HF_TOKEN) with an account that was admitted"
        return EnvironmentFault("R18", message, where=repo, fix=fix)
    if isinstance(error, errors.RevisionNotFoundError):
        return EnvironmentFault("R18", f"there is no revision {revision!r}", where=repo, fix=f"see {page}/commits/main")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        message = "the Hub does not know it, or it is private and you are not logged in"
        if status == 401 and "Invalid" in str(error):
            message = "the Hub does not accept the access token"
        fix = f"check the spelling at {page}; for a private or gated one `hf auth login` or set HF_TOKEN"
        return EnvironmentFault("R18", message, where=repo, fix=fix)
    if status == 403:
        fix = f"ask for access at {page}, or use a token with the right to read it"
        return EnvironmentFault("R18", "access refused (403)", where=repo, fix=fix)
    if isinstance(error, ValueError) and _is_hostile(str(error)):
        return WeightsError("R19", f"refused: a file name that leaves the folder ({_first_line(error)})", where=repo)
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | errors.HfHubHTTPError):
        message = f"the Hub could not be reached: {_first_line(error)}"
        return EnvironmentFault("R18", message, where=repo, fix=f"check the network (HF_HUB_OFFLINE, proxy); {again}")
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return WeightsError("W01", _first_line(error), where=repo, fix=f"{again}, or with --force")
    if type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
        message = f"the connection broke: {type(error).__name__} {_first_line(error)}".strip()
        return EnvironmentFault("R18", message, where=repo, fix=again)
    return None


def _is_hostile(text: str) -> bool:
    return any(sign in text for sign in ("..", "outside", "Invalid filename", "invalid path", "absolute"))


def _first_line(error: Any) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
