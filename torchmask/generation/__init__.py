"""Text from a model: decoding with a key-value cache, sampling, and incremental detokenisation."""

from torchmask.generation.arguments import check_sampling
from torchmask.generation.decoding import OnToken, generate, num_new_tokens
from torchmask.generation.sampling import sample
from torchmask.generation.streaming import TextStream, before_stop, decode_continuation, stop_on_text

__all__ = [
    "OnToken",
    "TextStream",
    "before_stop",
    "check_sampling",
    "decode_continuation",
    "generate",
    "num_new_tokens",
    "sample",
    "stop_on_text",
]
