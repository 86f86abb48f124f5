"""Checkpoints: safetensors and JSON, written aside and renamed when whole, so that one which exists is good.

    checkpoints/step-00000200/
      manifest.json           {file: {bytes, sha256}}, written last
      state.json              step, counters, world size, fingerprints, versions
      rng-rank00000.safetensors
      data-rank00000.json     the rank's place in a stream; only of recipes that read one
      model/*.safetensors     sharded as the ranks hold it, read back on any number of ranks
      optim/*.safetensors

No pickle anywhere: tensors go through torch.distributed.checkpoint's Hugging Face storage, the rest through JSON. The
newest checkpoint is found by scanning for manifests; there is no pointer file to go stale.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from torchmask.errors import ConfigError, EnvironmentFault, WeightsError
from torchmask.training.run import Run, any_rank
from torchmask.training.seed import rng_state, set_rng_state

MANIFEST, STATE = "manifest.json", "state.json"
_TEMPORARY = ".tmp-"


def checkpoint_dir(run: Run, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return run.checkpoints_dir / f"step-{step:08d}"


def save_checkpoint(
    run: Run,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep_last_n: int | None,
    rank_state: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint of all ranks, then deletes the oldest ones beyond `keep_last_n`; collective.

    Args:
        tensors: `{"model": {fqn: tensor}, "optim": {name: tensor}}`, whole tensors or DTensors.
        state: JSON-able; `step` and `world_size` are added.
        rank_state: JSON-able, what only this rank knows, such as its place in a stream.

    Raises:
        EnvironmentFault: it could not be written (disk full, permission), also not after old checkpoints were
            deleted. The last good checkpoint is untouched.
    """
    folder = checkpoint_dir(run, step)
    if folder.exists():  # saved already, for instance by a step that is also the end of an epoch
        return folder
    whole_state = {**state, "step": step, "world_size": run.world_size}
    problem = _try_to_save(run, folder, tensors, whole_state, rank_state)
    if problem is not None:
        delete_old_checkpoints(run, keep_last_n)
        problem = _try_to_save(run, folder, tensors, whole_state, rank_state)
    if problem is not None:
        good = find_checkpoints(run.checkpoints_dir)
        raise EnvironmentFault(
            "K02",
            f"the checkpoint of step {step} could not be written: {problem}; "
            + (f"{good[-1].name} is whole" if good else "no earlier checkpoint exists"),
            where=str(folder),
            fix="free disk space, or keep fewer checkpoints (keep_last_n), then resume_from_checkpoint=true",
        )
    delete_old_checkpoints(run, keep_last_n)
    return folder


def _try_to_save(
    run: Run,
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    rank_state: Mapping[str, Any] | None,
) -> str | None:
    """Writes and renames; what went wrong on some rank, or None."""
    temporary = folder.with_name(_TEMPORARY + folder.name)
    steps: tuple[Callable[[], None], ...] = (
        lambda: _make_empty(temporary) if run.is_main else None,
        lambda: _write_tensors(run, temporary, tensors),
        lambda: _write_own(run, temporary, rank_state),
        lambda: _seal(temporary, folder, state) if run.is_main else None,
    )
    for write in steps:  # after each one all ranks agree whether to go on, so none waits for a rank that gave up
        problem = None
        try:
            write()
        except (OSError, SafetensorError, CheckpointException, RuntimeError) as error:
            problem = str(error).strip().splitlines()[-1]
        if any_rank(run, problem is not None):
            if run.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            run.barrier()
            return problem or "another rank could not write"
    return None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_own(run: Run, folder: Path, rank_state: Mapping[str, Any] | None) -> None:
    """What every rank has of its own: random states, its place in a stream."""
    save_file(rng_state(), folder / _rng_file(run.rank))
    if rank_state is not None:
        (folder / _data_file(run.rank)).write_text(json.dumps(dict(rank_state)))


def _write_tensors(run: Run, folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for part, named in tensors.items():
        writer = HuggingFaceStorageWriter(str(folder / part), save_distributed=True)
        with _quiet():
            dcp.save(dict(named), storage_writer=writer, no_dist=run.mesh is None)


def _seal(temporary: Path, folder: Path, state: Mapping[str, Any]) -> None:
    """state.json, then the manifest, flushed to the disk, then the rename that makes it a checkpoint."""
    (temporary / STATE).write_text(json.dumps(state, indent=2))
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        entries = pool.map(lambda p: {"bytes": p.stat().st_size, "sha256": _sha256(p)}, files)
        manifest = {str(p.relative_to(temporary)): entry for p, entry in zip(files, entries)}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in [*files, temporary / MANIFEST, temporary]:
        _fsync(path)
    os.rename(temporary, folder)
    _fsync(folder.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that have a manifest, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{MANIFEST}"))


def delete_old_checkpoints(run: Run, keep_last_n: int | None) -> None:
    """Deletes all but the newest `keep_last_n`, and what interrupted saves left behind."""
    if run.is_main:
        for path in run.checkpoints_dir.glob(_TEMPORARY + "*"):
            shutil.rmtree(path, ignore_errors=True)
        whole = find_checkpoints(run.checkpoints_dir)
        for path in whole[: -keep_last_n or None] if keep_last_n else []:
            shutil.rmtree(path, ignore_errors=True)
            if path.exists():
                warnings.warn(f"{path} could not be deleted; the run goes on", stacklevel=2)
    run.barrier()


def verify(folder: Path) -> None:
    """Checks every file against the manifest.

    Raises:
        WeightsError: a file is missing, has another length or another content.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        there = "no manifest.json" if folder.is_dir() else "no such folder"
        why = there if isinstance(error, OSError) else f"manifest.json is damaged: {error}"
        raise WeightsError("K07", f"no checkpoint: {why}", where=str(folder), fix=_choices(folder)) from error
    if not isinstance(manifest, dict) or STATE not in manifest:
        raise WeightsError("W04", f"{MANIFEST} does not list {STATE}", where=str(folder), fix=_choices(folder))
    for name, entry in manifest.items():
        path = folder / name
        found = "is missing" if not path.exists() else None
        if found is None and path.stat().st_size != entry["bytes"]:
            found = f"has {path.stat().st_size:,} bytes, the manifest says {entry['bytes']:,}"
        if found is None and _sha256(path) != entry["sha256"]:
            found = "has another sha256 than the manifest says"
        if found:
            raise WeightsError(
                "W04", f"the checkpoint is damaged: {name} {found}", where=str(folder), fix=_choices(folder)
            )


def _choices(folder: Path) -> str:
    others = [p.name for p in find_checkpoints(folder.parent) if p != folder]
    if not others:
        return "there is no other checkpoint beside it; start again with another output_dir"
    return f"resume_from_checkpoint={folder.parent / others[-1]} (there: {', '.join(others)})"


def load_state(folder: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint."""
    return json.loads((folder / STATE).read_text())


def load_tensors(run: Run, folder: Path, part: str, into: dict[str, Tensor]) -> None:
    """Reads `model` or `optim` into tensors that are already allocated, whole or sharded; collective.

    Raises:
        WeightsError: a tensor is missing or has another shape.
    """
    try:
        with _quiet():
            dcp.load(into, storage_reader=HuggingFaceStorageReader(str(folder / part)), no_dist=run.mesh is None)
    except (CheckpointException, RuntimeError, ValueError) as error:
        cause = str(error).strip().splitlines()[-1]
        raise WeightsError(
            "K09",
            f"{part} of the checkpoint does not fit this run: {cause}",
            where=str(folder),
            fix="resume with the model and optimizer the run was started with",
        ) from error


def restore_rng(run: Run, folder: Path) -> None:
    """This rank's random states, where the checkpoint has them (another world size has others)."""
    file = folder / _rng_file(run.rank)
    if file.exists():
        set_rng_state(load_file(file))


def load_rank_state(run: Run, folder: Path) -> dict[str, Any]:
    """The `rank_state` that this rank saved in a verified checkpoint.

    Raises:
        ConfigError: K08, the checkpoint is of another number of ranks, or of a recipe that saves none.
    """
    saved = load_state(folder)["world_size"]
    if saved != run.world_size or not (folder / _data_file(run.rank)).exists():
        s = "es" if saved > 1 else ""
        have = f"the places of {saved} process{s} in the stream" if _has_data(folder) else "no place in a stream"
        raise ConfigError(
            "K08",
            f"the checkpoint has {have}, this run has {run.world_size} process{'es' if run.world_size > 1 else ''}",
            where=str(folder),
            fix=f"resume with --nproc-per-node {saved} and the recipe that saved it; or start a new run in another "
            "output_dir from the weights of this one (checkpoint_dir)",
        )
    loaded: dict[str, Any] = json.loads((folder / _data_file(run.rank)).read_text())
    return loaded


def _has_data(folder: Path) -> bool:
    return (folder / _data_file(0)).exists()


def _data_file(rank: int) -> str:
    return f"data-rank{rank:05d}.json"


def _rng_file(rank: int) -> str:
    return f"rng-rank{rank:05d}.safetensors"


@contextmanager
def _quiet() -> Iterator[None]:
    """No lines about saving without a process group: it is what a single process means to do."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
