"""Models: builders for published sizes, and folders in Hugging Face layout in and out."""

from torchmask.models.export import save_pretrained
from torchmask.models.folder import (
    FAMILIES,
    from_config,
    from_pretrained,
    load_pretrained,
    read_config,
)
from torchmask.models.llama import (
    code_llama_7b,
    code_llama_13b,
    code_llama_34b,
    llama2_7b,
    llama2_13b,
    llama2_70b,
    llama3_1_8b,
    llama3_1_70b,
    llama3_1_405b,
    llama3_2_1b,
    llama3_2_3b,
    llama3_3_70b,
    llama3_8b,
    llama3_70b,
    smollm2_1_7b,
    smollm2_135m,
    smollm2_360m,
    tinyllama_1b,
)
from torchmask.models.weights import init_weights

__all__ = [
    "FAMILIES",
    "code_llama_7b",
    "code_llama_13b",
    "code_llama_34b",
    "from_config",
    "from_pretrained",
    "init_weights",
    "llama2_7b",
    "llama2_13b",
    "llama2_70b",
    "llama3_1_8b",
    "llama3_1_70b",
    "llama3_1_405b",
    "llama3_2_1b",
    "llama3_2_3b",
    "llama3_3_70b",
    "llama3_8b",
    "llama3_70b",
    "load_pretrained",
    "read_config",
    "save_pretrained",
    "smollm2_1_7b",
    "smollm2_135m",
    "smollm2_360m",
    "tinyllama_1b",
]
