"""Models to folders in Hugging Face layout."""

import json
from pathlib import Path

import torch

from torchmask.models.conversions import hub_tensors
from torchmask.models.folder import family_of
from torchmask.models.weights import save_weights
from torchmask.modules.decoder import Decoder


def save_pretrained(model: Decoder, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes config.json and safetensors as transformers loads them; collective where the model is sharded.

    Rank 0 writes; whole tensors are gathered one at a time. A tied head is not written, as on the Hub, and weights that
    were read from a quantised checkpoint are written as the floats they are.

    Args:
        dtype: of the files; None keeps the parameters' own.
    """
    folder = Path(folder)
    family = family_of(model.hub_config)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device: it has no weights to write")
    parameters = dict(model.named_parameters())  # a tied head comes once, as the embedding
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    tensors = hub_tensors(family.layout(model), parameters, dtype=dtype, device="cpu" if writes else "meta")
    if not writes:
        for _ in tensors:
            pass
        return
    save_weights(folder, tensors)
    written = dtype or model.embed_tokens.weight.dtype
    config = {**model.hub_config, "torch_dtype": str(written).removeprefix("torch.")}
    for key in ("dtype", "quantization_config"):  # the newer name of the same key; what no longer holds
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
