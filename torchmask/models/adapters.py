"""Low-rank adapters put onto a model, and what it is with them merged in.

Adapting changes linear layers in place: the parameters that were there keep their names and tensors, so the model is
sharded, filled and saved as before. Merging never touches live weights: a save reads each parameter through
`merged_parameters`, one at a time.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchmask.errors import ConfigError
from torchmask.lora import LoRA
from torchmask.models.conversions import whole_tensor
from torchmask.models.folder import load_pretrained
from torchmask.models.resize import has_new_rows
from torchmask.models.weights import copy_into, init_weights
from torchmask.modules.decoder import Decoder
from torchmask.modules.head import Head
from torchmask.modules.lora import LoRALinear, adapted_layers, is_adapter
from torchmask.modules.moe import MoE

ROUTER = "router"


def adapt(model: Decoder, lora: LoRA | None, *, seed: int = 0, has_new_tokens: bool = False) -> int:
    """Gives linear layers adapters and freezes all else; returns the number of layers. None changes nothing.

    Before `checkpoint_activations`, `compile_layers` and `shard`. The model says what it said before until it is
    trained. On the meta device the adapters have no values yet: `init_adapters` once they have memory.

    Args:
        has_new_tokens: the vocabulary has tokens that the model never saw, also where its embedding had spare rows.

    Raises:
        ConfigError: C09, a name that no layer or module has; a model that has adapters already; rows of new tokens
            that would never be trained.
    """
    if lora is None:
        return 0
    refuse_adapted(model)
    layers = linear_layers(model)
    targets = lora.targets or sorted({_leaf(name) for name in layers})
    _check_targets(targets, {_leaf(name) for name in layers}, any(isinstance(m, MoE) for m in model.modules()))
    whole = _trained_whole(model, lora.also_train)
    tables = {"embed_tokens"} if model.spec.tie_embeddings else {"embed_tokens", "lm_head"}
    if (has_new_tokens or has_new_rows(model)) and not tables <= set(lora.also_train):
        raise ConfigError(
            "C09",
            "tokens were added to the vocabulary, and what the model knows of them would stay as it is",
            where="lora.also_train",
            fix=f"lora.also_train=[{','.join(sorted(tables))}]",
        )
    chosen = [name for name in layers if _leaf(name) in targets]
    model.requires_grad_(False)
    for name in chosen:
        attach(model, name, rank=lora.rank, scale=lora.scale, dropout=lora.dropout)
    for module in whole:
        module.requires_grad_(True)
    if not model.embed_tokens.weight.is_meta:
        init_adapters(model, seed=seed)
    return len(chosen)


def refuse_adapted(model: nn.Module) -> None:
    """Raises ConfigError C09 if a model has adapters."""
    if any(adapted_layers(model)):
        fix = "load the model anew, or from a folder that it was exported to, where they are merged in"
        raise ConfigError("C09", "the model has adapters already", where="lora", fix=fix)


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the layers that can have an adapter: all linear ones but the head and routers."""
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, Head)]
    return [name for name in linear if _leaf(name) != ROUTER]


def attach(model: nn.Module, name: str, *, rank: int, scale: float, dropout: float = 0.0) -> LoRALinear:
    """Puts an adapter with unset values onto one linear layer."""
    parent, _, leaf = name.rpartition(".")
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear), name
    adapted = LoRALinear(layer, rank=rank, scale=scale, dropout=dropout)
    setattr(model.get_submodule(parent), leaf, adapted)
    return adapted


def _check_targets(names: list[str], known: set[str], has_experts: bool) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = "; routers and the matrices of experts take no adapters" if has_experts else ""
        message = f"the model has no linear layer called {', '.join(map(repr, unknown))}{hint}"
        raise ConfigError("C09", message, where="lora.targets", fix=f"choose among {', '.join(sorted(known))}")


def _trained_whole(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """The embeddings, heads and norms of these names: what a folder of adapters can hold beside them."""
    known: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        own = {leaf for leaf, _ in module.named_parameters(recurse=False)}
        if own and own <= {"weight", "bias"} and (isinstance(module, Head) or not isinstance(module, nn.Linear)):
            known.setdefault(_leaf(name), []).append(module)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            "C09",
            f"{', '.join(map(repr, unknown))} cannot be trained whole beside adapters",
            where="lora.also_train",
            fix=f"choose among {', '.join(sorted(known))}; linear layers learn through their adapters (lora.targets)",
        )
    return [module for name in names for module in known[name]]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def init_adapters(model: nn.Module, *, seed: int) -> None:
    """Sets new adapters: B to 0, so that nothing changes at first; A uniform within 1 / sqrt(I), as PEFT's.

    Each tensor has its own generator, seeded by its name, so that every world size starts from the same values.
    """
    for name, layer in adapted_layers(model):
        bound = 1 / math.sqrt(layer.in_features)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        copy_into(layer.lora_a, torch.empty(layer.lora_a.shape).uniform_(-bound, bound, generator=generator))
        copy_into(layer.lora_b, torch.zeros(layer.lora_b.shape))


def load_or_init(model: Decoder, folder: str | Path | None, *, seed: int) -> None:
    """Fills a materialised model with the weights of a folder, or with random ones where None is named.

    Adapters are new ones in both cases.

    Raises:
        WeightsError: as of `load_pretrained`.
    """
    if folder is None:
        init_weights(model, seed=seed)
    else:
        load_pretrained(model, folder)
    init_adapters(model, seed=seed)


class _Merged(Mapping[str, Tensor]):
    """See `merged_parameters`."""

    def __init__(self, model: Decoder) -> None:
        self._layers = dict(adapted_layers(model))
        self._parameters = {name: p for name, p in model.named_parameters() if not is_adapter(name)}

    def __getitem__(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in self._layers:
            return merged_weight(self._layers[owner])
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def merged_parameters(model: Decoder) -> Mapping[str, Tensor]:
    """A model's parameters with its adapters' products added; each is computed when it is asked for, by all ranks."""
    return _Merged(model)


@torch.no_grad()
def merged_weight(layer: LoRALinear) -> Tensor:
    """W + scale B A, [O, I] in the weight's dtype, computed in fp32 or wider; sharded where the weight is."""
    weight, a, b = layer.weight, layer.lora_a, layer.lora_b
    if not (isinstance(weight, DTensor) and isinstance(b, DTensor)):
        return _merge(weight, a, b, layer.scale)
    # A layer's matrices are all cut into rows, so a rank has the same rows of B as of W.
    local = _merge(weight.to_local(), whole_tensor(a), b.to_local(), layer.scale)
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride(), run_check=False
    )


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale).to(weight.dtype)
