"""Complete one prompt, or a file of them, with a checkpoint: a base model or a run's `final/` folder.

    torchmask run generate --config generate checkpoint_dir=out/final prompt="Who wrote Faust?"
    torchmask run generate --config generate checkpoint_dir=out/final prompts_file=asked.jsonl output_file=answers.jsonl

Completions go to the terminal (one prompt's as it comes), and as JSON lines to `output_file`.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torchmask.config import Component, instantiate
from torchmask.data.chat_formats import chat_format
from torchmask.data.rows import Row
from torchmask.data.sources import open_source
from torchmask.errors import ConfigError, DataError, EnvironmentFault
from torchmask.generation import (
    OnToken,
    TextStream,
    before_stop,
    check_sampling,
    decode_continuation,
    generate,
    num_new_tokens,
    stop_on_text,
)
from torchmask.messages import Message
from torchmask.models import from_pretrained, load_adapter
from torchmask.modules import Decoder
from torchmask.tokenizers import Tokenizer
from torchmask.training.run import choose_device


@dataclass(frozen=True)
class Config:
    """What can be set; every key is checked before anything is loaded."""

    checkpoint_dir: str  # the model, in Hugging Face layout: a base model or a run's final/
    tokenizer: Component  # turns text into tokens: torchmask.tokenizers.from_pretrained
    adapter_dir: str | None = None  # adapters on top of it: a run's adapter/, or another folder in PEFT's layout

    prompt: str = ""  # the text to complete, or the user's message
    prompts_file: str | None = None  # in place of `prompt`: .txt with one a line, rows with `prompt` or `messages`
    chat: bool | None = None  # prompts are a user's messages; null = if the tokenizer has a chat format
    system_prompt: str | None = None  # before a user's message

    max_new_tokens: int = 256  # a completion ends here at the latest
    temperature: float = 0.0  # 0 = always the most probable token; above 0 = draw, the higher the more varied
    top_k: int | None = None  # draw from this many most probable tokens; null = from all
    top_p: float | None = None  # draw from the most probable tokens that have this mass together; null = from all
    seed: int | None = 0  # of the draws; null = other ones each time
    stop: list[str] = field(default_factory=list)  # texts that end a completion, beside the tokenizer's stop tokens

    batch_size: int = 16  # prompts completed at a time
    device: str = "auto"  # auto | cpu | cuda
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the parameters
    prefix: Literal["causal", "bidirectional"] = "causal"  # as in the packing it was trained with
    output_file: str | None = None  # JSON lines with prompt, completion, num_tokens, finish_reason

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError("C13", f"batch_size is {self.batch_size}, must be at least 1", where="batch_size")
        if "" in self.stop:
            raise ConfigError("C13", "an empty text is in everything", where="stop", fix="leave it out")
        if self.prompt and self.prompts_file:
            raise ConfigError("C09", "prompt and prompts_file are both set", fix="leave one of them out")
        if (
            self.output_file
            and self.prompts_file
            and Path(self.output_file).resolve() == Path(self.prompts_file).resolve()
        ):
            raise ConfigError("C09", "output_file is prompts_file, which would be lost", where="output_file")
        check_sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Prompt:
    """What the model is given, and where it came from."""

    given: str | list[dict[str, Any]]  # as in the file: a text, or messages
    tokens: list[int]
    where: str
    is_chat: bool


def main(cfg: Config) -> None:
    """Reads the prompts, completes them batch by batch, prints and writes."""
    device = choose_device(cfg.device)
    architecture = from_pretrained(cfg.checkpoint_dir, device="meta").spec
    tokenizer = instantiate(cfg.tokenizer)
    prompts = list(read_prompts(cfg, tokenizer))
    check_lengths(prompts, architecture.max_seq_len)  # before the weights are read
    model = from_pretrained(cfg.checkpoint_dir, dtype=cfg.dtype, device=device)
    if cfg.adapter_dir:
        load_adapter(model, cfg.adapter_dir, base=cfg.checkpoint_dir)

    is_streamed = len(prompts) == 1 and sys.stdout.isatty()
    num_tokens, start_time = 0, time.perf_counter()
    with open_output(cfg.output_file) as output:
        for first in range(0, len(prompts), cfg.batch_size):
            batch = prompts[first : first + cfg.batch_size]
            stream = TextStream(tokenizer, context=context_of(batch[0]), stop=cfg.stop)
            completions = generate(
                model,
                [prompt.tokens for prompt in batch],
                max_new_tokens=cfg.max_new_tokens,
                max_seq_len=architecture.max_seq_len,
                temperature=cfg.temperature,
                top_k=cfg.top_k,
                top_p=cfg.top_p,
                seed=cfg.seed,
                stop_ids=tokenizer.stop_ids,
                prefix=cfg.prefix,
                first_index=first,
                on_token=show_as_it_comes(stream) if is_streamed else watch_for(cfg.stop, tokenizer, batch),
            )
            for number, (prompt, tokens) in enumerate(zip(batch, completions), first + 1):
                record = record_of(cfg, model, tokenizer, prompt, tokens)
                if is_streamed:
                    print(stream.finish(), flush=True)
                elif len(prompts) == 1:
                    print(record["completion"])
                else:
                    print(f"[{number}/{len(prompts)}] {title(prompt)}\n{record['completion']}\n")
                if output:
                    output.write(json.dumps(record, ensure_ascii=False) + "\n")
                    output.flush()
                num_tokens += len(tokens)
    seconds = time.perf_counter() - start_time
    print(f"{num_tokens} tokens in {seconds:.1f} s, {num_tokens / seconds:.0f} a second", file=sys.stderr)


def read_prompts(cfg: Config, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """The prompts as tokens, chats with the header of the answer to come."""
    is_chat = tokenizer.has_chat_format if cfg.chat is None else cfg.chat
    if cfg.prompts_file is None:
        if not cfg.prompt:
            raise ConfigError("C05", "there is nothing to complete", fix="set prompt or prompts_file")
        yield tokenized(cfg, tokenizer, cfg.prompt, is_chat=is_chat, where="prompt")
        return
    if not Path(cfg.prompts_file).expanduser().exists():  # only here: never a name on the Hub
        where = str(Path(cfg.prompts_file).expanduser().absolute())
        raise DataError("D05", "no such file", where=where, fix="set prompts_file to a file of prompts")
    for row in open_source(cfg.prompts_file):
        if row.error is not None:
            raise row.error
        given = row.values.get("prompt", row.values.get("text") if cfg.prompts_file.endswith(".txt") else None)
        if given == "":
            raise DataError("D06", "the prompt is empty", where=row.where, fix="write one, or remove the row")
        if isinstance(given, str):
            yield tokenized(cfg, tokenizer, given, is_chat=is_chat, where=row.where)
        elif "messages" in row.values:
            yield conversation(cfg, tokenizer, row)
        else:
            found = ", ".join(row.values) or "none"
            message = f"the row has neither a text `prompt` nor `messages`; columns found: {found}"
            raise DataError("D04", message, where=row.where, fix="name the column `prompt` or `messages`")


def tokenized(cfg: Config, tokenizer: Tokenizer, text: str, *, is_chat: bool, where: str) -> Prompt:
    """A text to go on from, or a user's message to answer."""
    if is_chat:
        messages = [Message("system", cfg.system_prompt)] if cfg.system_prompt is not None else []
        rendered = tokenizer.render([*messages, Message("user", text)], add_generation_prompt=True)
        return Prompt(text, rendered.tokens.tolist(), where, is_chat=True)
    if cfg.system_prompt is not None:
        fix = "leave system_prompt out, or set chat=true and tokenizer.chat_format"
        raise ConfigError("C09", "system_prompt is for chats, the prompt is plain text", where="system_prompt", fix=fix)
    return Prompt(text, tokenizer.encode(text, add_bos=True), where, is_chat=False)


def conversation(cfg: Config, tokenizer: Tokenizer, row: Row) -> Prompt:
    """A row's `messages`, without the last answer where there is one: that is the one to generate."""
    if cfg.chat is False:
        raise ConfigError("C09", "the row has `messages`, but chat=false", where=row.where, fix="leave chat out")
    turns = row.values["messages"]
    if isinstance(turns, list):
        while turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
            turns = turns[:-1]
        if turns and all(isinstance(turn, dict) and turn.get("role") == "system" for turn in turns):
            raise DataError("D06", "there is no message to answer", where=row.where, fix="add the user's message")
        # chat_format checks rows for training, which end with an answer
        answered = [*turns, {"role": "assistant", "content": "..."}] if turns else []
        row = Row(row.source, row.number, {**row.values, "messages": answered})
    parsed = chat_format(row)
    messages = parsed.messages[:-1]
    if cfg.system_prompt is not None:
        others = [message for message in messages if message.role != "system"]
        messages = [Message("system", cfg.system_prompt), *others]
    rendered = tokenizer.render(messages, parsed.tools, add_generation_prompt=True)
    return Prompt(turns, rendered.tokens.tolist(), row.where, is_chat=True)


def check_lengths(prompts: list[Prompt], max_seq_len: int) -> None:
    """Refuses a prompt that leaves the model no room to answer."""
    for prompt in prompts:
        if len(prompt.tokens) >= max_seq_len:
            message = f"{len(prompt.tokens)} tokens leave no room to answer; the model's max_seq_len is {max_seq_len}"
            raise DataError("D09", message, where=prompt.where, fix="shorten the prompt")


def record_of(cfg: Config, model: Decoder, tokenizer: Tokenizer, prompt: Prompt, tokens: list[int]) -> dict[str, Any]:
    """A line of the output file."""
    completion, has_stop = before_stop(decode_continuation(tokenizer, context_of(prompt), tokens), cfg.stop)
    is_stopped = has_stop or len(tokens) < num_new_tokens(
        model, len(prompt.tokens), cfg.max_new_tokens, model.spec.max_seq_len
    )
    return {
        "prompt": prompt.given,
        "completion": completion,
        "num_tokens": len(tokens),
        "finish_reason": "stop" if is_stopped else "length",
    }


def context_of(prompt: Prompt) -> list[int]:
    """The tokens whose text a completion goes on from: an answer stands for itself."""
    return [] if prompt.is_chat else prompt.tokens


def show_as_it_comes(stream: TextStream) -> OnToken:
    """Prints each token's text at once, until a text of `stop` comes."""

    def show(index: int, token: int) -> bool:
        print(stream.push(token), end="", flush=True)
        return stream.is_stopped

    return show


def watch_for(texts: list[str], tokenizer: Tokenizer, prompts: list[Prompt]) -> OnToken | None:
    """Ends completions at the texts of `stop`; tokens are not looked at where there are none."""
    return stop_on_text(tokenizer, texts, contexts=[context_of(prompt) for prompt in prompts]) if texts else None


def title(prompt: Prompt) -> str:
    """A prompt in one line."""
    text = prompt.given if isinstance(prompt.given, str) else str(prompt.given[-1].get("content"))
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:99] + "…"


def open_output(path: str | None) -> Any:
    """The output file, its folder made; nothing without a path."""
    if path is None:
        return nullcontext()
    target = Path(path).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open("w", encoding="utf-8")
    except OSError as error:
        message = f"the output file cannot be written: {error.strerror}"
        fix = "set output_file to a place you may write to"
        raise EnvironmentFault("K05", message, where=str(target.absolute()), fix=fix) from error
