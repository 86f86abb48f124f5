"""Models from folders in Hugging Face layout."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from torchmask.errors import WeightsError
from torchmask.models import (
    bloom,
    falcon,
    gemma,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    meta_llama,
    ministral3,
    mistral,
    mixtral,
    olmo,
    phi3,
    qwen,
    qwen3_moe,
    smollm3,
)
from torchmask.models.config_values import WRONG_VALUE
from torchmask.models.family import Family, build_model
from torchmask.models.resize import with_new_rows
from torchmask.models.scope import out_of_scope, refuse_quantised
from torchmask.models.weight_files import FileTensor, check_folder, open_folder
from torchmask.models.weights import heads_differ, load_weights
from torchmask.modules.decoder import Decoder
from torchmask.modules.spec import DecoderSpec

CONFIG_FILE = "config.json"
GET_CONFIG = "take the config.json that was published with the model"
_HOW_TO_ADD = "docs/families.md, 'Adding a family'"
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        bloom.FAMILY,
        falcon.FAMILY,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
        gpt2.FAMILY,
        gpt_neox.FAMILY,
        gpt_oss.FAMILY,
        granite.FAMILY,
        llama.FAMILY,
        mistral.FAMILY,
        mistral.MINISTRAL,
        ministral3.FAMILY,
        mixtral.FAMILY,
        olmo.OLMO2,
        olmo.OLMO3,
        phi3.FAMILY,
        qwen.QWEN2,
        qwen.QWEN3,
        qwen3_moe.FAMILY,
        smollm3.FAMILY,
    )
}


def from_pretrained(
    folder: str | Path, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The model in a Hugging Face folder, with its weights.

    Where config.json says that the head is the embedding and the files have another one, it is not: such a model gets
    a head of its own, and `tie_word_embeddings` is false in what it is saved with.

    Args:
        folder: holds config.json and weights as safetensors or, where there are none, pickles (`pytorch_model.bin`),
            single or sharded; or one of Meta's Llamas as published (params.json, consolidated.00.pth, ...).
        dtype: of the parameters, whatever the files hold; a torch dtype or its name: fp32, bf16, fp16, fp64.
        device: `meta` builds the model without its weights.

    Raises:
        WeightsError: a missing or damaged file, an unknown family, tensors that do not fit or are no finite numbers,
            quantised weights (MXFP4 is read).
        ConfigError: a dtype or device that there is not.
        EnvironmentFault: a device that this machine does not have.
    """
    folder = check_folder(Path(folder).expanduser())
    config = read_config(folder)
    family = family_of(config, where=_config_file(folder))
    spec = _spec_of(family, config, folder)
    if spec.tie_embeddings and _holds_own_head(folder, family):
        config = {**config, "tie_word_embeddings": False}
        spec = _spec_of(family, config, folder)
    model = build_model(family, spec, dtype=dtype, device=device, config=config, seed=None)
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
    family = family_of(content, where=_config_file(config))
    spec = _spec_of(family, content, config)
    return build_model(family, spec, dtype=dtype, device=device, config=content, seed=seed)


def _config_file(config: dict[str, Any] | str | Path) -> str:
    """What `read_config` reads, for messages."""
    if isinstance(config, dict):
        return CONFIG_FILE
    path = Path(config).expanduser()
    if meta_llama.is_meta_folder(path):
        return str(path / meta_llama.PARAMS_FILE)
    return str(path / CONFIG_FILE if path.is_dir() else path)


def _spec_of(family: Family, content: dict[str, Any], config: dict[str, Any] | str | Path) -> DecoderSpec:
    where = _config_file(config)
    try:
        return family.spec_from_config(content)
    except WeightsError as error:  # of a value, by families that know no files
        raise WeightsError(error.id, error.message, where=where, fix=error.fix) from error
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        message = f"{Path(where).name} describes no model: {why}"
        raise WeightsError("W05", message, where=where, fix=WRONG_VALUE) from error


def load_pretrained(model: Decoder, folder: str | Path) -> None:
    """Fills a materialised model (whole, or sharded by FSDP2) with the weights of a folder; each rank reads its part.

    Raises:
        WeightsError: a missing, damaged or refused file, tensors that do not fit, quantised weights.
    """
    folder, family = Path(folder).expanduser(), family_of(model.hub_config)
    if meta_llama.is_meta_folder(folder):
        parts = meta_llama.open_parts(folder, model.spec.embed_dim)
        if model.spec.tie_embeddings and meta_llama.has_own_head(list(parts.values())):
            raise _untied("output.weight", "tok_embeddings.weight", folder)
        tensors, layout = meta_llama.join_parts(parts, family.layout(model), model.spec.head_dim)
        tensors = with_new_rows(model, tensors, layout)
        derived, config_file = meta_llama.DERIVED, meta_llama.PARAMS_FILE
        load_weights(model, tensors, layout, where=str(folder), derived=derived, config_file=config_file)
        return
    check_folder(folder)
    refuse_quantised(read_config(folder) if (folder / CONFIG_FILE).exists() else model.hub_config, str(folder))
    tensors = open_folder(folder)
    if model.spec.tie_embeddings and _has_own_head(tensors, family):
        raise _untied(family.hub_name(_HEAD, tensors), family.hub_name(_EMBEDDING, tensors), folder)
    layout = family.layout(model, tensors)
    tensors = with_new_rows(model, tensors, layout)
    load_weights(model, tensors, layout, where=str(folder), derived=family.derived)


def _untied(head: str, embedding: str, folder: Path) -> WeightsError:
    return WeightsError(
        "W05",
        f"{head} differs from {embedding}, and the model has one parameter for both",
        where=str(folder),
        fix="set tie_word_embeddings: false in the config.json that the model is built from, or build it by"
        " from_pretrained from this folder",
    )


def _holds_own_head(folder: Path, family: Family) -> bool:
    """Whether the files of a folder have another head than the embedding; False where they cannot be read."""
    if meta_llama.is_meta_folder(folder):
        return False  # there the files have told whether it is tied
    try:
        return _has_own_head(open_folder(folder), family)
    except WeightsError:
        return False  # whoever loads them is told


def _has_own_head(tensors: Mapping[str, FileTensor], family: Family) -> bool:
    """Whether a checkpoint has another head than the embedding."""
    return heads_differ(*(tensors.get(family.hub_name(ours, tensors)) for ours in (_HEAD, _EMBEDDING)))


def read_config(config: dict[str, Any] | str | Path) -> dict[str, Any]:
    """The content of a config.json given as dict, file or folder; of a Meta folder, what it would be."""
    if isinstance(config, dict):
        return config
    path = Path(config).expanduser()
    if meta_llama.is_meta_folder(path):
        return meta_llama.read_config(path)
    path = path / CONFIG_FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a mark of the byte order
    except FileNotFoundError as error:
        raise WeightsError(
            "W03",
            "no such file" if path.parent.is_dir() else "no such folder",
            where=str(path.absolute() if path.parent.is_dir() else path.parent.absolute()),
            fix="name a model folder in Hugging Face layout; `torchmask download REPO --output-dir FOLDER` makes one",
        ) from error
    except ValueError as error:
        raise WeightsError("W05", f"not valid JSON: {error}", where=str(path), fix=GET_CONFIG) from error
    if not isinstance(content, dict):
        raise WeightsError("W05", "not a JSON object", where=str(path), fix=GET_CONFIG)
    return content


def family_of(config: dict[str, Any], *, where: str = CONFIG_FILE) -> Family:
    """The family that a config.json names.

    Raises:
        WeightsError: W10, none that torchmask knows; with what it is, or the name that may have been meant.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = f"known: {', '.join(sorted(FAMILIES))}"
    if model_type is None:
        message, fix = f"model_type is missing; {known}", f"{GET_CONFIG}; it says which family the model is of"
        raise WeightsError("W10", message, where=where, fix=fix)
    why = out_of_scope(config, FAMILIES)
    near = [] if why else get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.8)
    fix = f"did you mean {near[0]!r}? Otherwise use" if near else "use"
    fix += " a model of a known family" + ("" if why else f", or add its own: {_HOW_TO_ADD}")
    message = f"model_type {model_type!r} {why or 'is not a family torchmask knows'}; {known}"
    raise WeightsError("W10", message, where=where, fix=fix)
