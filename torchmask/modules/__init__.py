"""Building blocks in plain torch: they know nothing of recipes, files or configurations."""

from torchmask.modules.attention_mask import AttentionMask, build_attention_mask, may_attend
from torchmask.modules.decoder import Decoder, DecoderLayer
from torchmask.modules.kv_cache import KVCache
from torchmask.modules.loss import linear_cross_entropy
from torchmask.modules.rope_scaling import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    YarnRopeScaling,
)
from torchmask.modules.spec import DecoderSpec, MoESpec

__all__ = [
    "AttentionMask",
    "Decoder",
    "DecoderLayer",
    "DecoderSpec",
    "DynamicRopeScaling",
    "KVCache",
    "LinearRopeScaling",
    "Llama3RopeScaling",
    "LongRopeScaling",
    "MoESpec",
    "YarnRopeScaling",
    "build_attention_mask",
    "linear_cross_entropy",
    "may_attend",
]
