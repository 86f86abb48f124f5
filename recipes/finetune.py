"""Fine-tune a causal language model, all weights or low-rank adapters (LoRA); one device or many.

    torchmask run finetune --config tiny/qa
    torchmask run --nproc-per-node 8 finetune --config llama3_2/1b_full
    torchmask run finetune --config llama3_2/1b_lora lora.rank=32

What is learned is decided by the dataset's masks, what is seen by the packs. The loss of an optimizer step is the sum
over all its trained tokens divided by their number, whatever the micro-batches and ranks. A run can be stopped at any
time (Ctrl-C, SIGTERM) and goes on bit for bit where it was with `resume_from_checkpoint=true`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from torchmask.config import Component, component, instantiate
from torchmask.data import (
    Batch,
    PackedDataset,
    collate_rows,
    format_ledger,
    render_prompt,
    squad_conversation,
    squad_rows,
    write_masks_html,
)
from torchmask.data.pack_options import check_options
from torchmask.errors import ConfigError, StopRequested
from torchmask.evaluation import SquadEvaluation, evaluate_squad, format_before_after
from torchmask.generation import generate
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
    StepPlan,
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
    loss_png,
    materialise,
    model_tensors,
    plan_steps,
    save_checkpoint,
    shard,
    start_run,
    step_rows,
    validation_rows,
    write_record,
)

# What a resumed run keeps:
FIXED = ("model", "lora", "dtype", "packing", "loss_normalization", "max_steps_per_epoch", "seed")
FIXED_UPDATES = ("optimizer", "bf16_updates", "clip_grad_norm")
RESUME = "the same command with resume_from_checkpoint=true goes on from here"
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 2e-5}
COSINE = {"_component_": "torchmask.training.cosine_schedule", "warmup_ratio": 0.03}


@dataclass(frozen=True)
class Packing:
    """How documents become rows."""

    max_seq_len: int = 2048  # slots of a row
    strategy: Literal["best_fit", "first_fit", "in_order", "split", "none"] = "best_fit"  # split cuts at row ends
    share_prefixes: bool = False  # store the common beginning of documents once: trees instead of copies
    max_share: int | None = None  # at most so many documents of one prefix in a row
    attention: Literal["document", "causal"] = "document"  # causal: a row is one text
    positions: Literal["reset", "continue"] = "reset"  # counted from each document's start, or from the row's
    prefix: Literal["causal", "bidirectional"] = "causal"  # bidirectional: a prompt sees itself both ways (prefix-LM)
    epoch_repack: bool = False  # pack anew, from another order, in each epoch
    over_length: Literal["error", "truncate", "split", "drop"] = "error"  # a document longer than a row
    truncate_side: Literal["right", "left"] = "right"  # which end is cut off; left keeps the first token
    no_targets: Literal["drop", "keep", "error"] = "drop"  # a document without a trained token
    max_truncated_away: float = 0.05  # share of the documents that truncation may rob of all targets
    trim_tail: bool = False  # leave out what follows a document's last trained token

    def __post_init__(self) -> None:
        check_options(asdict(self))


@dataclass(frozen=True)
class Evaluate:
    """Questions answered before and after training, scored by exact match."""

    source: str  # SQuAD v2 shaped JSON
    prompt_template: str | None = None  # as in the dataset; null = the default one
    num_questions: int | None = 200  # the first so many; null = all
    batch_size: int = 100  # questions answered at a time
    max_new_tokens: int = 48  # tokens an answer may have


@dataclass(frozen=True)
class Config:
    """What can be set; every key is checked before anything is loaded."""

    output_dir: str  # where everything is written
    model: Component = component("dtype=", "device=")  # architecture: torchmask.models.from_pretrained, a builder, ...
    tokenizer: Component  # turns text into tokens: torchmask.tokenizers.from_pretrained
    dataset: Component = component("tokenizer")  # training rows
    dataset_val: Component | None = component("tokenizer", default=None)  # validation rows
    packing: Packing = field(default_factory=Packing)  # how documents become rows
    loss_normalization: Literal["tokens", "weights", "sequence", "none"] = "tokens"  # what a step's loss is divided by
    checkpoint_dir: str | None = None  # weights to start from; null = those of the model's folder, else random ones
    lora: LoRA | None = None  # train low-rank adapters on frozen weights; null = train all weights

    epochs: int = 1  # passes over the data
    max_steps_per_epoch: int | None = None  # stop an epoch early
    batch_size: int = 1  # rows of a micro-batch, on each device
    gradient_accumulation_steps: int = 1  # micro-batches an optimizer step
    optimizer: Component = component("params", default=ADAMW)  # any torch optimizer
    lr_scheduler: Component = component("num_steps=", default=COSINE)  # torchmask.training.*_schedule
    bf16_updates: Literal["master_weights", "stochastic_rounding"] = "master_weights"  # how bf16 takes small updates
    clip_grad_norm: float | None = 1.0  # the gradient is scaled down to this norm; null = never
    seed: int = 0  # of weights, data order and dropout
    device: str = "auto"  # auto | cpu | cuda
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"  # of the parameters
    compile: bool = False  # torch.compile each layer
    enable_activation_checkpointing: bool = False  # compute activations again in the backward pass to save memory
    run_val_every_n_steps: int | None = None  # null = at the end of each epoch
    evaluate: Evaluate | None = None  # questions to answer before and after
    log_every_n_steps: int = 1  # a line in metrics.jsonl and the log
    metric_logger: Component | None = None  # beside metrics.jsonl: torchmask.training.TensorBoardLogger, WandBLogger
    save_every_n_steps: int | None = None  # checkpoints beside those at the end of each epoch
    keep_last_n: int | None = 2  # checkpoints kept; null = all
    resume_from_checkpoint: bool | str = False  # true = the newest in output_dir; or a checkpoint's path

    def __post_init__(self) -> None:
        if self.evaluate and min(self.evaluate.batch_size, self.evaluate.max_new_tokens) < 1:
            raise ConfigError("C13", "batch_size and max_new_tokens must be at least 1", where="evaluate")
        if not self.output_dir or not 0 <= self.seed < 2**32:
            raise ConfigError("C13", "output_dir must not be empty, seed is from 0 to 4294967295", where="config")
        counts = ("epochs", "batch_size", "gradient_accumulation_steps", "max_steps_per_epoch", "keep_last_n")
        for name in (*counts, "log_every_n_steps", "save_every_n_steps", "run_val_every_n_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError("C13", f"{name} is {value}, must be at least 1", where=name)
        if self.clip_grad_norm is not None and not 0 < self.clip_grad_norm < math.inf:
            raise ConfigError("C13", f"it is {self.clip_grad_norm}, must be above 0", where="clip_grad_norm")


def main(cfg: Config) -> None:
    """Trains, from configuration to exported model."""
    resume = cfg.resume_from_checkpoint is not False
    with (
        start_run(cfg.output_dir, device=cfg.device, seed=cfg.seed, resume=resume) as run,
        Console(enabled=run.is_main) as console,
    ):
        write_record(run, asdict(cfg))
        loggers = [instantiate(cfg.metric_logger)] if cfg.metric_logger and run.is_main else []

        questions = squad_rows(cfg.evaluate.source, max_rows=cfg.evaluate.num_questions) if cfg.evaluate else []
        tokenizer = instantiate(cfg.tokenizer)
        pack = partial(PackedDataset, loss_normalization=cfg.loss_normalization, **asdict(cfg.packing))
        packs = pack(instantiate(cfg.dataset, tokenizer))
        console.say(format_ledger(packs.report))
        packs_val = None
        if cfg.dataset_val is not None:
            packs_val = pack(instantiate(cfg.dataset_val, tokenizer))
            console.say(format_ledger(packs_val.report, title="validation data"))

        base = cfg.checkpoint_dir or cfg.model.get("folder")
        facts = {"data": packs.samples.fingerprint, **{name: asdict(cfg)[name] for name in (*FIXED, *FIXED_UPDATES)}}
        facts["base"] = weights_fingerprint(base) if cfg.lora and base else None
        checkpoint = choose_checkpoint(run, cfg.resume_from_checkpoint, console.say)
        state = check_belongs(checkpoint, facts) if checkpoint else {"step": 0, "global_batch": None}
        plan = plan_steps(
            packs,
            run,
            batch_size=cfg.batch_size,
            gradient_accumulation_steps=cfg.gradient_accumulation_steps,
            epochs=cfg.epochs,
            max_steps_per_epoch=cfg.max_steps_per_epoch,
            seed=cfg.seed,
            global_batch=state["global_batch"],
        )
        schedule = instantiate(cfg.lr_scheduler, num_steps=plan.num_steps)

        model = instantiate(cfg.model, dtype=cfg.dtype, device="meta")
        if tokenizer.num_added:  # rows for the configuration's own tokens
            size = resize_embeddings(model, max(tokenizer.vocab_size, model.spec.vocab_size))
            console.say(f"{tokenizer.num_added} tokens added to the vocabulary; the embedding has {size:,} rows now")
        for rows in filter(None, (packs, packs_val)):
            rows.check_fits(model.spec, warn=console.say)
        adapt(model, cfg.lora, has_new_tokens=tokenizer.num_added > 0)
        checkpoint_activations(model, cfg.enable_activation_checkpointing)
        compile_layers(model, cfg.compile)
        shard(model, run)
        materialise(model, run)
        make_optimizer = partial(instantiate, cfg.optimizer)
        optimizer = build_optimizer(model, make_optimizer, bf16_updates=cfg.bf16_updates, seed=cfg.seed)
        if not checkpoint or cfg.lora:  # a checkpoint holds what is trained
            load_or_init(model, base, seed=cfg.seed)
        if checkpoint:
            load_checkpoint(run, checkpoint, model, optimizer)
        console.header(
            model=model,
            packs=packs.report,
            plan=plan,
            optimizer=optimizer.describe(),
            run=run,
            weights=checkpoint or base,
            schedule=schedule,
            first_step=state["step"],
        )

        before = answer_questions(cfg, model, tokenizer, questions)
        save = partial(save_run, cfg, run, model, optimizer, plan, facts)
        steps = console.track(range(state["step"], plan.num_steps), plan.num_steps)
        with MetricsLog(run.output_dir, resume_step=state["step"], loggers=loggers, enabled=run.is_main) as metrics:
            train(cfg, run, model, optimizer, schedule, steps, plan, packs, packs_val, save, metrics, console)
        run.stop.end_deferral()
        after = answer_questions(cfg, model, tokenizer, questions)

        save_pretrained(model, run.final_dir)
        if cfg.lora:
            save_adapter(model, run.adapter_dir, base=base, fingerprint=facts["base"])
        if run.is_main:
            tokenizer.save(run.final_dir)
            write_masks_html(run.output_dir / "masks.html", packs, tokenizer.id_to_piece)
            loss_png(run.output_dir / "metrics.jsonl", run.output_dir / "loss.png")
            console.summary(run.output_dir)
            if before and after:
                console.say(format_before_after(before, after))


def train(
    cfg: Config,
    run: Run,
    model: Decoder,
    optimizer: Optimizer,
    schedule: Callable[[int], float],
    steps: Iterable[int],
    plan: StepPlan,
    packs: PackedDataset,
    packs_val: PackedDataset | None,
    save: Callable[[int], None],
    metrics: MetricsLog,
    console: Console,
) -> None:
    """Takes the optimizer steps; validates, logs and saves when due."""
    speed, groups = Speed(run), LossGroups(packs.rule_names)
    pad_to = cfg.packing.max_seq_len if cfg.compile else None  # one length, so that one compilation serves
    run.stop.deferred = True  # from here on a signal waits for the end of the step
    for step in steps:
        rows = packs.for_epoch(plan.epoch(step), plan.seed)
        batches = [collate_rows(rows, ids, pad_to) for ids in step_rows(rows, plan, step, run)]
        normalizer, num_targets, stop = run.agree(
            sum(b.normalizer for b in batches), sum(b.num_targets for b in batches), run.stop.is_set
        )
        if stop:
            save(step)
            raise StopRequested("R03", f"stopped by {run.stop.signal_name} after step {step}: it is saved", fix=RESUME)

        optimizer.set_lr(schedule(step))
        losses = [backward(model, batch.to(run.device), normalizer, groups) for batch in batches]
        grad_norm = float(clip_grad_norm(model, cfg.clip_grad_norm))
        loss, num_tokens, num_slots = run.agree(
            float(sum(losses)), sum(b.num_tokens for b in batches), sum(b.tokens.numel() for b in batches)
        )
        check_finite(loss, grad_norm, step=step + 1)
        if num_targets:  # a step without any target changes nothing
            optimizer.step()
        optimizer.zero_grad()
        speed.add(num_tokens=num_tokens, num_trained_tokens=num_targets, num_slots=num_slots)

        done, ends_epoch = step + 1, plan.ends_epoch(step)
        validates = packs_val is not None and due(done, cfg.run_val_every_n_steps, ends_epoch)
        if validates or done == plan.num_steps or due(done, cfg.log_every_n_steps, False):
            values = {"loss": loss, "lr": optimizer.lr, "grad_norm": grad_norm, **speed.take(), **groups.take(run)}
            if validates:
                values["val_loss"] = validate(cfg, run, model, packs_val)
            metrics.log(done, num_targets=int(num_targets), **values)
            console.step(done, values)
        if ends_epoch or due(done, cfg.save_every_n_steps, False):
            save(done)
        if validates or ends_epoch:
            speed.restart()


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


def answer_questions(cfg: Config, model: Decoder, tokenizer: Any, questions: list[Any]) -> SquadEvaluation | None:
    """Scores of greedy answers to the evaluation's questions, with a few of them; every rank computes the same."""
    if cfg.evaluate is None:
        return None
    chosen = cfg.evaluate

    def answer(questions: Sequence[Mapping[str, Any]]) -> list[str]:
        asked = [squad_conversation(q, prompt_template=chosen.prompt_template, with_answer=False) for q in questions]
        prompts = [render_prompt(tokenizer, conversation) for conversation in asked]
        options = {"max_new_tokens": chosen.max_new_tokens, "prefix": cfg.packing.prefix}  # seen as in training
        new = generate(model, prompts, stop_ids=tokenizer.stop_ids, **options)
        return [tokenizer.decode(tokens) for tokens in new]

    with inference(model):
        return evaluate_squad(questions, answer, batch_size=chosen.batch_size)


def save_run(
    cfg: Config, run: Run, model: Decoder, optimizer: Optimizer, plan: StepPlan, facts: dict[str, Any], step: int
) -> None:
    """A checkpoint after `step` optimizer steps."""
    tensors = {"model": model_tensors(model), "optim": optimizer.state_dict()}
    state = {"facts": facts, "global_batch": plan.global_batch}
    save_checkpoint(run, step, tensors, state, keep_last_n=cfg.keep_last_n)
