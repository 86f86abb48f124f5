"""torchmask: fine-tuning of causal language models in plain PyTorch, where masking is the first-class thing.

Names are resolved on first use, so that `import torchmask` costs nothing and the command line stays fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmask.messages import MaskFlag, Message

__version__ = "0.1.0"
__all__ = ["MaskFlag", "Message", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("MaskFlag", "Message"):
        from torchmask import messages

        return getattr(messages, name)
    raise AttributeError(f"module 'torchmask' has no attribute {name!r}")
