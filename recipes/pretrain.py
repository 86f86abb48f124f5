"""Go on with the pre-training of a causal language model, on a weighted mixture of streams that need not fit in memory.

    torchmask run pretrain --config tiny/stream
    torchmask run --nproc-per-node 8 pretrain --config llama3_2/1b_pretrain

Sources are read piece by piece: a window of rows is tokenised, masked, packed and forgotten, by each device another
one. A run has steps and no epochs. It can be stopped at any time (Ctrl-C, SIGTERM) and goes on bit for bit where it
was with `resume_from_checkpoint=true`: each device's place in the stream lies in the checkpoint.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from torchmask.config import Component, component, instantiate, prepare
from torchmask.data import (
    Batch,
    PackedDataset,
    PackedStream,
    collate,
    collate_rows,
    format_ledger,
    stream_part,
    write_masks_html,
)
from torchmask.data.pack_options import check_options
from torchmask.data.stream_ledger import save_ledger
from torchmask.data.stream_options import LOOSE, check_streamed
from torchmask.data.stream_steps import take_rows
from torchmask.errors import ConfigError, StopRequested
from torchmask.lora import LoRA
from torchmask.models import adapt, load_or_init, resize_embeddings, save_adapter, save_pretrained, weights_fingerprint
from torchmask.modules import Decoder, linear_cross_entropy
from torchmask.training import (
    Console,
    LossGroups,
    MetricsLog,
    Optimizer,
    Run,
    Speed,
    build_optimizer,
    check_belongs,
    check_finite,
    checkpoint_activations,
    choose_checkpoint,
    clip_grad_norm,
    compile_layers,
    due,
    inference,
    load_checkpoint,
    load_rank_state,
    loss_png,
    materialise,
    model_tensors,
    save_checkpoint,
    shard,
    start_run,
    validation_rows,
    write_record,
)

FIXED = ("model", "lora", "dtype", "window", "repeat", "loss_normalization", "seed")  # what a resumed run keeps
FIXED_UPDATES = ("optimizer", "bf16_updates", "clip_grad_norm")
CURE = "when it resumes, on_bad_row and packing.{over_length,no_targets,max_truncated_away} may be others"
RESUME = "the same command with resume_from_checkpoint=true goes on from here"
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 2e-5}
COSINE = {"_component_": "torchmask.training.cosine_schedule", "warmup_ratio": 0.03}


@dataclass(frozen=True)
class Source:
    """One of the sources that are mixed."""

    dataset: Component = component("tokenizer")  # a data set builder, as in finetune; its rows are streamed
    weight: float = 1.0  # share of the rows that pass its filter_fn, relative to the other sources


@dataclass(frozen=True)
class Packing:
    """How the documents of a window become rows."""

    max_seq_len: int = 2048  # slots of a row
    strategy: Literal["best_fit", "first_fit", "in_order", "split", "none"] = "best_fit"  # split cuts at row ends
    share_prefixes: bool = False  # store the common beginning of documents once: trees instead of copies
    max_share: int | None = None  # at most so many documents of one prefix in a row
    attention: Literal["document", "causal"] = "document"  # causal: a row is one text
    positions: Literal["reset", "continue"] = "reset"  # counted from each document's start, or from the row's
    prefix: Literal["causal", "bidirectional"] = "causal"  # bidirectional: a prompt sees itself both ways (prefix-LM)
    over_length: Literal["error", "truncate", "split", "drop"] = "error"  # a document longer than a row
    truncate_side: Literal["right", "left"] = "right"  # which end is cut off; left keeps the first token
    no_targets: Literal["drop", "keep", "error"] = "drop"  # a document without a trained token
    max_truncated_away: float = 0.05  # share of all documents so far that truncation may rob of all targets
    trim_tail: bool = False  # leave out what follows a document's last trained token

    def __post_init__(self) -> None:
        check_options({**asdict(self), "epoch_repack": False})


@dataclass(frozen=True)
class Config:
    """What can be set; every key is checked before anything is loaded."""

    output_dir: str  # where everything is written
    model: Component = component("dtype=", "device=")  # architecture: torchmask.models.from_pretrained, a builder, ...
    tokenizer: Component  # turns text into tokens: torchmask.tokenizers.from_pretrained
    sources: list[Source]  # what is streamed and mixed
    window: int = 4096  # rows that pass filters, over all sources, that are in memory and packed together
    repeat: bool = False  # begin a source again when it ends
    dataset_val: Component | None = component("tokenizer", default=None)  # validation rows; these are kept in memory
    packing: Packing = field(default_factory=Packing)  # how the documents of a window become rows
    loss_normalization: Literal["tokens", "weights", "sequence", "none"] = "tokens"  # what a step's loss is divided by
    checkpoint_dir: str | None = None  # weights to start from; null = those of the model's folder, else random ones
    lora: LoRA | None = None  # train low-rank adapters on frozen weights; null = train all weights

    num_steps: int | None = None  # optimizer steps; null = until the sources end
    batch_size: int = 1  # rows of a micro-batch, on each device
    gradient_accumulation_steps: int = 1  # micro-batches an optimizer step
    optimizer: Component = component("params", default=ADAMW)  # any torch optimizer
    lr_scheduler: Component = component("num_steps=", default=COSINE)  # torchmask.training.*_schedule
    schedule_steps: int | None = None  # steps that lr_scheduler is made for; null = num_steps
    bf16_updates: Literal["master_weights", "stochastic_rounding"] = "master_weights"  # how bf16 takes small updates
    clip_grad_norm: float | None = 1.0  # the gradient is scaled down to this norm; null = never
    seed: int = 0  # of weights, row order and dropout
    device: str = "auto"  # auto | cpu | cuda
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"  # of the parameters
    compile: bool = False  # torch.compile each layer
    enable_activation_checkpointing: bool = False  # compute activations again in the backward pass to save memory
    run_val_every_n_steps: int | None = None  # null = at the end
    log_every_n_steps: int = 1  # a line in metrics.jsonl and the log
    metric_logger: Component | None = None  # beside metrics.jsonl: torchmask.training.TensorBoardLogger, WandBLogger
    save_every_n_steps: int | None = 1000  # checkpoints beside the one at the end; null = none
    keep_last_n: int | None = 2  # checkpoints kept; null = all
    resume_from_checkpoint: bool | str = False  # true = the newest in output_dir; or a checkpoint's path

    def __post_init__(self) -> None:
        if not self.output_dir or not 0 <= self.seed < 2**32:
            raise ConfigError("C13", "output_dir must not be empty, seed is from 0 to 4294967295", where="config")
        counts = ("window", "num_steps", "batch_size", "gradient_accumulation_steps", "schedule_steps", "keep_last_n")
        for name in (*counts, "log_every_n_steps", "save_every_n_steps", "run_val_every_n_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError("C13", f"{name} is {value}, must be at least 1", where=name)
        if self.clip_grad_norm is not None and not 0 < self.clip_grad_norm < math.inf:
            raise ConfigError("C13", f"it is {self.clip_grad_norm}, must be above 0", where="clip_grad_norm")
        for i, source in enumerate(self.sources):
            if not 0 < source.weight < math.inf:
                raise ConfigError("C13", f"it is {source.weight}, must be above 0", where=f"sources.{i}.weight")
        if not self.sources:
            raise ConfigError("C13", "there are none", where="sources", fix="sources: [{dataset: {_component_: ...}}]")
        check_streamed([source.dataset for source in self.sources])
        if self.num_steps is None and self.repeat:
            raise ConfigError("C09", "repeated sources have no end", where="repeat", fix="set num_steps")
        if self.num_steps is None and self.schedule_steps is None:
            fix = "set num_steps, or schedule_steps: about how many there will be"
            raise ConfigError("C09", "lr_scheduler needs to know for how many steps it is made", fix=fix)


def main(cfg: Config) -> None:
    """Trains, from configuration to exported model."""
    resume = cfg.resume_from_checkpoint is not False
    with (
        start_run(cfg.output_dir, device=cfg.device, seed=cfg.seed, resume=resume) as run,
        Console(enabled=run.is_main) as console,
    ):
        write_record(run, asdict(cfg))
        loggers = [instantiate(cfg.metric_logger)] if cfg.metric_logger and run.is_main else []

        tokenizer = instantiate(cfg.tokenizer)
        parts = [stream_part(prepare(source.dataset, tokenizer), weight=source.weight) for source in cfg.sources]
        schedule = instantiate(cfg.lr_scheduler, num_steps=cfg.schedule_steps or cfg.num_steps)
        model = instantiate(cfg.model, dtype=cfg.dtype, device="meta")
        if tokenizer.num_added:  # rows for the configuration's own tokens
            resize_embeddings(model, max(tokenizer.vocab_size, model.spec.vocab_size))
        packing = {**asdict(cfg.packing), "loss_normalization": cfg.loss_normalization}
        stream = PackedStream(
            parts,
            max_seq_len=cfg.packing.max_seq_len,
            window=cfg.window,
            packing=packing,
            seed=cfg.seed,
            repeat=cfg.repeat,
            rank=run.rank,
            world_size=run.world_size,
            check=lambda rows: rows.check_fits(model.spec, warn=lambda text: None),  # the first rows have warned
            warn=console.say,
        )
        console.say(format_ledger(stream.preview.report, title="the first rows of the stream"))
        packs_val = None
        if cfg.dataset_val is not None:
            packs_val = PackedDataset(instantiate(cfg.dataset_val, tokenizer), **packing)
            console.say(format_ledger(packs_val.report, title="validation data"))
        for rows in filter(None, (stream.preview, packs_val)):
            rows.check_fits(model.spec, warn=console.say)

        facts = {"data": stream.fingerprint, **{name: asdict(cfg)[name] for name in (*FIXED, *FIXED_UPDATES)}}
        facts["packing"] = {key: value for key, value in asdict(cfg.packing).items() if key not in LOOSE}
        facts["weights of sources"] = [source.weight for source in cfg.sources]
        facts["rows of a step"] = cfg.batch_size * cfg.gradient_accumulation_steps
        base = cfg.checkpoint_dir or cfg.model.get("folder")
        facts["base"] = weights_fingerprint(base) if cfg.lora and base else None
        checkpoint = choose_checkpoint(run, cfg.resume_from_checkpoint, console.say)
        state = check_belongs(checkpoint, facts) if checkpoint else {"step": 0}
        if checkpoint:
            stream.load_state_dict(load_rank_state(run, checkpoint))
        adapt(model, cfg.lora, has_new_tokens=tokenizer.num_added > 0)
        checkpoint_activations(model, cfg.enable_activation_checkpointing)
        compile_layers(model, cfg.compile)
        shard(model, run)
        materialise(model, run)
        make = partial(instantiate, cfg.optimizer)
        optimizer = build_optimizer(model, make, bf16_updates=cfg.bf16_updates, seed=cfg.seed)
        if not checkpoint or cfg.lora:  # a checkpoint holds what is trained
            load_or_init(model, base, seed=cfg.seed)
        if checkpoint:
            load_checkpoint(run, checkpoint, model, optimizer)
        told = {"facts": describe(cfg, run, stream, state["step"]), "optimizer": optimizer.describe()}
        console.header(model=model, run=run, weights=checkpoint or base, schedule=schedule, **told)

        def save(step: int, place: dict[str, Any]) -> None:
            tensors = {"model": model_tensors(model), "optim": optimizer.state_dict()}
            save_checkpoint(run, step, tensors, {"facts": facts}, keep_last_n=cfg.keep_last_n, rank_state=place)
            save_ledger(run.output_dir, run.gather(stream.report), enabled=run.is_main)

        steps = console.track(range(state["step"], cfg.num_steps or 10**12), cfg.num_steps)
        with MetricsLog(run.output_dir, resume_step=state["step"], loggers=loggers, enabled=run.is_main) as metrics:
            train(cfg, run, model, optimizer, schedule, steps, state["step"], stream, packs_val, save, metrics, console)
        tell_data(run, console, stream)
        run.stop.end_deferral()

        save_pretrained(model, run.final_dir)
        if cfg.lora:
            save_adapter(model, run.adapter_dir, base=base, fingerprint=facts["base"])
        if run.is_main:
            tokenizer.save(run.final_dir)
            write_masks_html(run.output_dir / "masks.html", stream.preview, tokenizer.id_to_piece)
            loss_png(run.output_dir / "metrics.jsonl", run.output_dir / "loss.png")
            console.summary(run.output_dir)


def train(
    cfg: Config,
    run: Run,
    model: Decoder,
    optimizer: Optimizer,
    schedule: Callable[[int], float],
    steps: Iterable[int],
    done: int,
    stream: PackedStream,
    packs_val: PackedDataset | None,
    save: Callable[[int, dict[str, Any]], None],
    metrics: MetricsLog,
    console: Console,
) -> None:
    """Takes the optimizer steps until `num_steps` are done or no device has a row; one that has none takes fillers."""
    speed, groups = Speed(run), LossGroups(stream.rule_names)
    pad_to = cfg.packing.max_seq_len if cfg.compile else None  # one length, so that one compilation serves
    wanted = cfg.batch_size * cfg.gradient_accumulation_steps
    place, rows = stream.state_dict(), take_rows(stream, wanted if done != cfg.num_steps else 0)
    (num_going_on,) = run.agree(not rows.is_end)
    run.stop.deferred = True  # from here on a signal waits for the end of the step
    for step in steps if num_going_on else ():
        batches = [collate(rows.packs[i : i + cfg.batch_size], pad_to) for i in range(0, wanted, cfg.batch_size)]
        own = sum(b.normalizer for b in batches), sum(b.num_targets for b in batches)
        normalizer, num_targets, fails, stop = run.agree(*own, rows.problem is not None, run.stop.is_set)
        if fails:
            if step:
                save(step, place)
                console.say(f"step {step:,} is saved, with the place before the rows that are at fault. {CURE}")
            raise rows.problem or StopRequested("R03", f"another process cannot use its rows, after step {step}")
        if stop:
            save(step, place)
            raise StopRequested("R03", f"stopped by {run.stop.signal_name} after step {step}: it is saved", fix=RESUME)

        optimizer.set_lr(schedule(step))
        losses = [backward(model, batch.to(run.device), normalizer, groups) for batch in batches]
        done = step + 1
        place = stream.state_dict()
        rows = take_rows(stream, wanted if done != cfg.num_steps else 0)  # the next ones, while a GPU computes
        grad_norm = float(clip_grad_norm(model, cfg.clip_grad_norm))
        own = sum(b.num_tokens for b in batches), sum(b.tokens.numel() for b in batches)
        loss, num_tokens, num_slots, num_going_on = run.agree(float(sum(losses)), *own, not rows.is_end)
        check_finite(loss, grad_norm, step=done)
        if num_targets:  # a step without any target changes nothing
            optimizer.step()
        optimizer.zero_grad()
        speed.add(num_tokens=num_tokens, num_trained_tokens=num_targets, num_slots=num_slots)

        is_last = done == cfg.num_steps or num_going_on == 0
        validates = packs_val is not None and (is_last or due(done, cfg.run_val_every_n_steps, False))
        if validates or is_last or due(done, cfg.log_every_n_steps, False):
            values = {"loss": loss, "lr": optimizer.lr, "grad_norm": grad_norm, **speed.take(), **groups.take(run)}
            if validates:
                values["val_loss"] = validate(cfg, run, model, packs_val)
                speed.restart()
            metrics.log(done, num_targets=int(num_targets), **values)
            console.step(done, values)
        if is_last or due(done, cfg.save_every_n_steps, False):
            save(done, place)
        if is_last:
            break


def loss_of(model: Decoder, batch: Batch, groups: LossGroups | None = None) -> torch.Tensor:
    """The sum of the weighted negative log likelihoods of a micro-batch, fp32 scalar: change it here."""
    hidden = model(batch.tokens, batch.positions, batch.visible_until, batch.visible_from)
    observe = partial(groups.add, batch.rules) if groups and batch.rules is not None else None
    return linear_cross_entropy(hidden, model.lm_head, batch.labels, batch.weights, observe=observe)


def backward(model: Decoder, batch: Batch, normalizer: float, groups: LossGroups) -> torch.Tensor:
    """Adds the micro-batch's share of the step's gradient; returns its share of the step's loss."""
    loss = loss_of(model, batch, groups) / (normalizer or 1.0)
    loss.backward()
    return loss.detach()


def validate(cfg: Config, run: Run, model: Decoder, packs: PackedDataset) -> float:
    """The mean loss of the validation rows."""
    loss = normalizer = 0.0
    with inference(model):
        for ids in validation_rows(packs, cfg.batch_size, run):
            batch = collate_rows(packs, ids)
            loss += float(loss_of(model, batch.to(run.device)))
            normalizer += batch.normalizer or batch.num_targets
    loss, normalizer = run.agree(loss, normalizer)
    return loss / normalizer if normalizer else math.nan


def describe(cfg: Config, run: Run, stream: PackedStream, first_step: int) -> list[tuple[str, str]]:
    """What a person is told of the data and the steps, line by line."""
    rows = cfg.batch_size * cfg.gradient_accumulation_steps * run.world_size
    steps = f"{cfg.num_steps:,}" if cfg.num_steps else "until the sources end"
    going_on = f"; going on after step {first_step:,}" if first_step else ""
    return [
        ("data", "rows that pass filters: " + ", ".join(f"{share:.3%} of {name}" for name, share in stream.shares)),
        ("window", f"{cfg.window:,} rows, {'repeated without end' if cfg.repeat else 'to the end of the sources'}"),
        ("steps", f"{steps}, of {rows} rows, {rows * cfg.packing.max_seq_len:,} slots{going_on}"),
    ]


def tell_data(run: Run, console: Console, stream: PackedStream) -> None:
    """Says what was packed, by all devices and before a resume too, and how much of it was not trained."""
    ledger = save_ledger(run.output_dir, run.gather(stream.report), enabled=run.is_main)
    console.say(format_ledger(ledger, title="all windows so far"))
    if num_left := run.agree(stream.num_left)[0]:
        console.say(f"{num_left:,.0f} of these rows were not trained: num_steps came first")
