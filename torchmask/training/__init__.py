"""What a training recipe is made of: runs, steps, optimizers, checkpoints, metrics, and what a person sees."""

from torchmask.training.checkpoint import (
    find_checkpoints,
    load_rank_state,
    load_tensors,
    restore_rng,
    save_checkpoint,
    verify,
)
from torchmask.training.console import Console
from torchmask.training.distributed import clip_grad_norm, inference, materialise, model_tensors, shard
from torchmask.training.loss_curve import loss_png
from torchmask.training.loss_groups import LossGroups
from torchmask.training.memory import checkpoint_activations, compile_layers
from torchmask.training.metric_loggers import MLflowLogger, TensorBoardLogger, WandBLogger
from torchmask.training.metrics import MetricsLog, peak_memory_gib, read_metrics, token_rates
from torchmask.training.muon import MuonAdamW
from torchmask.training.optim import Optimizer, build_optimizer
from torchmask.training.record import write_record
from torchmask.training.resume import check_belongs, choose_checkpoint, load_checkpoint
from torchmask.training.run import Run, choose_device, start_run
from torchmask.training.schedules import constant_schedule, cosine_schedule, linear_schedule, wsd_schedule
from torchmask.training.seed import rng_state, seed_everything, set_rng_state
from torchmask.training.speed import Speed
from torchmask.training.steps import StepPlan, check_finite, due, plan_steps, step_rows, validation_rows

__all__ = [
    "Console",
    "LossGroups",
    "MLflowLogger",
    "MetricsLog",
    "MuonAdamW",
    "Optimizer",
    "Run",
    "Speed",
    "StepPlan",
    "TensorBoardLogger",
    "WandBLogger",
    "build_optimizer",
    "check_belongs",
    "check_finite",
    "checkpoint_activations",
    "choose_checkpoint",
    "choose_device",
    "clip_grad_norm",
    "compile_layers",
    "constant_schedule",
    "cosine_schedule",
    "due",
    "find_checkpoints",
    "inference",
    "linear_schedule",
    "load_checkpoint",
    "load_rank_state",
    "load_tensors",
    "loss_png",
    "materialise",
    "model_tensors",
    "peak_memory_gib",
    "plan_steps",
    "read_metrics",
    "restore_rng",
    "rng_state",
    "save_checkpoint",
    "seed_everything",
    "set_rng_state",
    "shard",
    "start_run",
    "step_rows",
    "token_rates",
    "validation_rows",
    "verify",
    "write_record",
    "wsd_schedule",
]
