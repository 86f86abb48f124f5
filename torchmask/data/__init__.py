"""Rows of any source -> messages -> samples -> packs -> batches, and the ledger of what became of every token.

Names are resolved on first use: only `Batch`, `collate` and `filler` need torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmask.data.batch import Batch, collate, collate_rows, filler
    from torchmask.data.builders import (
        alpaca_dataset,
        chat_dataset,
        instruct_dataset,
        squad_dataset,
    )
    from torchmask.data.eos import EosPolicy
    from torchmask.data.formats import Conversation
    from torchmask.data.masks import Decision, decide, mask_of
    from torchmask.data.mixture import mixture_dataset
    from torchmask.data.pack_options import check_options
    from torchmask.data.packing import Pack, PackedDataset, Placement, Plan, plan_packs
    from torchmask.data.policy import MaskPolicy
    from torchmask.data.rendering import render_conversation, render_prompt, render_raw, render_text
    from torchmask.data.report import format_ledger
    from torchmask.data.rows import Row
    from torchmask.data.sample import Sample, Samples
    from torchmask.data.sample_builder import SamplesBuilder
    from torchmask.data.serving import serving_mismatch
    from torchmask.data.sources import open_source
    from torchmask.data.spans import SpanRule
    from torchmask.data.squad import squad_conversation, squad_rows
    from torchmask.data.stream_parts import StreamPart, stream_part
    from torchmask.data.streaming import PackedStream
    from torchmask.data.text_builders import segments_dataset, text_completion_dataset, tokenized_dataset
    from torchmask.data.view import write_masks_html

__all__ = [
    "Batch",
    "Conversation",
    "Decision",
    "EosPolicy",
    "MaskPolicy",
    "Pack",
    "PackedDataset",
    "PackedStream",
    "Placement",
    "Plan",
    "Row",
    "Sample",
    "Samples",
    "SamplesBuilder",
    "SpanRule",
    "StreamPart",
    "alpaca_dataset",
    "chat_dataset",
    "check_options",
    "collate",
    "collate_rows",
    "decide",
    "filler",
    "format_ledger",
    "instruct_dataset",
    "mask_of",
    "mixture_dataset",
    "open_source",
    "plan_packs",
    "render_conversation",
    "render_prompt",
    "render_raw",
    "render_text",
    "segments_dataset",
    "serving_mismatch",
    "squad_conversation",
    "squad_dataset",
    "squad_rows",
    "stream_part",
    "text_completion_dataset",
    "tokenized_dataset",
    "write_masks_html",
]

_MODULES = {
    "batch": ("Batch", "collate", "collate_rows", "filler"),
    "builders": ("alpaca_dataset", "chat_dataset", "instruct_dataset", "squad_dataset"),
    "eos": ("EosPolicy",),
    "formats": ("Conversation",),
    "masks": ("Decision", "decide", "mask_of"),
    "mixture": ("mixture_dataset",),
    "pack_options": ("check_options",),
    "packing": ("Pack", "PackedDataset", "Placement", "Plan", "plan_packs"),
    "policy": ("MaskPolicy",),
    "rendering": ("render_conversation", "render_prompt", "render_raw", "render_text"),
    "report": ("format_ledger",),
    "rows": ("Row",),
    "sample": ("Sample", "Samples"),
    "sample_builder": ("SamplesBuilder",),
    "serving": ("serving_mismatch",),
    "sources": ("open_source",),
    "spans": ("SpanRule",),
    "stream_parts": ("StreamPart", "stream_part"),
    "streaming": ("PackedStream",),
    "squad": ("squad_conversation", "squad_rows"),
    "text_builders": ("segments_dataset", "text_completion_dataset", "tokenized_dataset"),
    "view": ("write_masks_html",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"torchmask.data.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'torchmask.data' has no attribute {name!r}")
