"""Models from folders in Hugging Face layout."""

import json
from pathlib import Path
from typing import Any

import torch

from torchmask.errors import WeightsError
from torchmask.models import llama
from torchmask.models.family import Family, build_model
from torchmask.models.weights import load_weights
from torchmask.modules.decoder import Decoder

FAMILIES: dict[str, Family] = {family.model_type: family for family in (llama.FAMILY,)}


def from_pretrained(
    folder: str | Path, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The model in a Hugging Face folder, with its weights.

    Args:
        folder: holds config.json and safetensors, single or sharded.
        dtype: of the parameters, whatever the files hold; a torch dtype or its name: fp32, bf16, fp16, fp64.
        device: `meta` builds the model without reading weights.

    Raises:
        WeightsError: a missing or damaged file, an unknown family, tensors that do not fit.
    """
    folder = Path(folder).expanduser()
    model = from_config(folder, dtype=dtype, device=device, seed=None)
    if torch.device(device).type != "meta":
        load_pretrained(model, folder)
    return model


def from_config(
    config: dict[str, Any] | str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    seed: int | None = 0,
) -> Decoder:
    """A model of any size of a known family, with random weights.

    Args:
        config: the content of a config.json, its path, or a folder that holds one.
        dtype: of the parameters.
        seed: of the random weights; None leaves them unset.

    Raises:
        WeightsError: no config.json, or one that names an unknown family.
    """
    content = read_config(config)
    family = family_of(content)
    try:
        spec = family.spec_from_config(content)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, WeightsError):
            raise
        where = "config.json" if isinstance(config, dict) else str(config)
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise WeightsError("W05", f"config.json describes no model: {why}", where=where, fix="get it again") from error
    return build_model(family, spec, dtype=dtype, device=device, config=content, seed=seed)


def load_pretrained(model: Decoder, folder: str | Path) -> None:
    """Fills a materialised model (whole, or sharded by FSDP2) with the weights of a folder."""
    load_weights(model, Path(folder).expanduser(), family_of(model.hub_config).to_ours)


def read_config(config: dict[str, Any] | str | Path) -> dict[str, Any]:
    """The content of a config.json given as dict, file or folder."""
    if isinstance(config, dict):
        return config
    path = Path(config).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            "W03",
            "no such file" if path.parent.is_dir() else "no such folder",
            where=str(path.absolute() if path.parent.is_dir() else path.parent.absolute()),
            fix="name a model folder in Hugging Face layout; `torchmask download REPO --output-dir FOLDER` makes one",
        ) from error
    except ValueError as error:
        raise WeightsError("W05", f"not valid JSON: {error}", where=str(path), fix="get the file again") from error
    if not isinstance(content, dict):
        raise WeightsError("W05", "not a JSON object", where=str(path), fix="get the file again")
    return content


def family_of(config: dict[str, Any]) -> Family:
    """The family that a config.json names."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise WeightsError(
            "W10",
            f"model_type {model_type!r} is not a family torchmask knows; known: {', '.join(sorted(FAMILIES))}",
            where="config.json",
            fix="use a model of a known family",
        )
    return FAMILIES[model_type]
