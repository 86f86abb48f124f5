"""Sharding over devices with FSDP2; nothing happens in a single process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from torchmask.modules.decoder import Decoder
from torchmask.training.run import Run


def shard(model: Decoder, run: Run) -> None:
    """Shards each layer, then the rest, over all ranks; gradients are summed, not averaged, and summed in fp32.

    The loss is divided by the global number of targets before `backward`, so a sum over ranks is the whole gradient.
    """
    if run.mesh is None:
        return
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=run.mesh, mp_policy=policy)
    # The head is used outside `forward` (by the loss), so the root's parameters stay gathered until the backward pass.
    fully_shard(model, mesh=run.mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            if run.device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def materialise(model: Decoder, run: Run) -> None:
    """Gives a model built on `meta` real, unset memory on the run's device; each rank only its shards."""
    model.to_empty(device=run.device)
    model.tie_weights()


def clip_grad_norm(model: nn.Module, max_norm: float | None) -> Tensor:
    """The global gradient norm before clipping, a scalar; gradients are scaled down to `max_norm` if it is set.

    Taken in at least fp32 whatever the gradients' dtype: torch's own would be a bf16 number for bf16 gradients.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    own = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    wide = torch.promote_types(own[0].dtype, torch.float32)
    squared = torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in own]).square().sum()
    if isinstance(grads[0], DTensor):
        torch.distributed.all_reduce(squared)  # every rank holds other rows of each parameter
    norm = squared.sqrt()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in own:
            g.mul_(scale)
    return norm


def model_tensors(model: Decoder) -> dict[str, Tensor]:
    """The trained parameters by name, live, whole or sharded, each once (a tied head is the embedding).

    Frozen ones are not among them: they are where they came from.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name in trained}


@contextmanager
def inference(model: Decoder) -> Iterator[None]:
    """No gradients inside; afterwards gathered parameters are sharded again."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if isinstance(model, FSDPModule):
            model.reshard()
