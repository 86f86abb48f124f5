"""Trading time for memory, and compiling."""

import shutil

import torch

from torchmask.errors import EnvironmentFault
from torchmask.modules.decoder import Decoder, DecoderLayer


def checkpoint_activations(model: Decoder, enabled: bool) -> None:
    """Every layer keeps only its input for the backward pass (Chen et al. 2016, arXiv 1604.06174)."""
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        layer.checkpoint_activations = enabled


def compile_layers(model: Decoder, enabled: bool) -> None:
    """Compiles layer by layer, in place, so that parameter names stay and one compilation serves all layers.

    Raises:
        EnvironmentFault: there is no C++ compiler to compile with.
    """
    if not enabled:
        return
    if not torch.cuda.is_available() and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise EnvironmentFault("R13", "compile=true needs a C++ compiler", fix="install g++, or set compile=false")
    for layer in model.layers:
        layer.compile()
