"""Models to folders in Hugging Face layout."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchmask.models.folder import family_of
from torchmask.models.weights import save_weights
from torchmask.modules.decoder import Decoder


def save_pretrained(model: Decoder, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes config.json and safetensors as transformers loads them; collective where the model is sharded.

    Rank 0 writes; one whole tensor at a time is gathered. A tied head is not written, as on the Hub.

    Args:
        dtype: of the files; None keeps the parameters' own.
    """
    folder = Path(folder)
    family = family_of(model.hub_config)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device: it has no weights to write")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():  # a tied head comes once, as the embedding
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            yield family.to_hub(name), whole.to(dtype) if dtype is not None else whole

    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        for _ in tensors():
            pass
        return
    save_weights(folder, tensors())
    written = dtype or model.embed_tokens.weight.dtype
    config = {**model.hub_config, "torch_dtype": str(written).removeprefix("torch.")}
    config.pop("dtype", None)  # the newer name of the same key
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
