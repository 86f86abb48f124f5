"""Models to folders in Hugging Face layout."""

import json
from pathlib import Path

import torch

from torchmask.errors import EnvironmentFault
from torchmask.models.adapters import merged_parameters
from torchmask.models.conversions import hub_tensors
from torchmask.models.folder import family_of
from torchmask.models.layered_rope import with_layered_ropes
from torchmask.models.rope_config import with_rope_types
from torchmask.models.weight_files import new_name
from torchmask.models.weights import save_weights
from torchmask.modules.decoder import Decoder


def save_pretrained(model: Decoder, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes config.json and safetensors as transformers loads them; collective where the model is sharded.

    Rank 0 writes; whole tensors are gathered one at a time. A tied head is not written, as on the Hub, and weights that
    were read from a quantised checkpoint are written as the floats they are. A head that is no longer the embedding is
    written, and config.json says so. Adapters are merged into what is written, and stay apart in the model. Files of an
    earlier save in the folder are replaced.

    Args:
        dtype: of the files; None keeps the parameters' own.

    Raises:
        ValueError: a model on the meta device.
        EnvironmentFault: K05, the folder cannot be made, as where there is a file of its name.
    """
    folder = Path(folder)
    family = family_of(model.hub_config)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device: it has no weights to write")
    make_folder(folder)
    parameters = merged_parameters(model)  # a tied head comes once, as the embedding
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    tensors = hub_tensors(family.layout(model), parameters, dtype=dtype, device="cpu" if writes else "meta")
    if not writes:
        for _ in tensors:
            pass
        return
    save_weights(folder, tensors)
    written = dtype or model.embed_tokens.weight.dtype
    config = with_rope_types(model.hub_config)
    if model.spec.window_rope_base is not None:
        config = with_layered_ropes(config, model.spec)
    config = {**config, "torch_dtype": str(written).removeprefix("torch.")}
    if model.spec.tie_embeddings and "lm_head.weight" in parameters:
        config["tie_word_embeddings"] = False
    for key in ("dtype", "quantization_config"):  # the newer name of the same key; what no longer holds
        config.pop(key, None)
    new = folder / new_name("config.json")
    new.write_text(json.dumps(config, indent=2) + "\n")
    new.replace(folder / "config.json")


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        EnvironmentFault: K05, it cannot be made, as where there is a file of its name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file of this name" if isinstance(error, FileExistsError | NotADirectoryError) else error
        message = f"the model's folder cannot be made: {reason}"
        raise EnvironmentFault("K05", message, where=str(folder), fix="name another folder") from error
