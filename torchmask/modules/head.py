"""The head: hidden states to logits."""

import torch
from torch import Tensor, nn

from torchmask.modules.spec import DecoderSpec


class Head(nn.Linear):
    """A linear layer whose results may be scaled and squeezed (Gemma 2, arXiv 2408.00118, section 2)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(spec.embed_dim, spec.vocab_size, bias=False)
        self.scale, self.softcap = spec.logit_scale, spec.logit_softcap

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V]."""
        logits = super().forward(hidden)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
