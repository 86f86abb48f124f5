"""Tokens a second of greedy decoding, with the key-value cache and without, measured in turn in one process.

.venv/bin/python tools/bench_generate.py                                  # a random model of 1.2 M parameters
.venv/bin/python tools/bench_generate.py --checkpoint FOLDER --dtype bf16 --device cuda
.venv/bin/python tools/bench_generate.py --window 4096 --prompt-length 4200 --batch-size 1 --max-new-tokens 100

With --window, the same weights with a sliding window and without one are compared, once the prompts have been read.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from torchmask.generation import generate
from torchmask.models import from_config, from_pretrained
from torchmask.modules import Decoder

SMALL = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

WIDE_CACHE = {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
"""Keys and values of a layer as large as those of Mistral 7B, which windows are about."""


@torch.no_grad()
def generate_without_cache(model: Decoder, prompts: list[list[int]], *, max_new_tokens: int) -> list[list[int]]:
    """The same tokens by reading everything again for each; prompts of one length."""
    tokens = torch.tensor(prompts, device=model.embed_tokens.weight.device)
    for _ in range(max_new_tokens):
        token = model.lm_head(model(tokens)[:, -1]).argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, token), dim=1)
    return tokens[:, len(prompts[0]) :].tolist()


def seconds_of(way: Callable[..., object], prompts: list[list[int]], *, max_new_tokens: int) -> float:
    """How long all of it takes."""
    start = time.perf_counter()
    way(prompts, max_new_tokens=max_new_tokens)
    return time.perf_counter() - start


def seconds_of_steps(model: Decoder, prompts: list[list[int]], *, max_new_tokens: int) -> float:
    """How long `max_new_tokens` steps of one token take, without reading the prompts."""
    stamps: list[float] = []
    generate(model, prompts, max_new_tokens=max_new_tokens + 1, on_token=lambda *_: stamps.append(time.perf_counter()))
    return stamps[-1] - stamps[len(prompts) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="model folder; without it a small random model")
    parser.add_argument("--window", type=int, help="of the random model, compared with none")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--prompt-length", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.checkpoint and args.window is not None:
        parser.error("--window is for the random model")
    if args.checkpoint:
        model = from_pretrained(args.checkpoint, dtype=args.dtype, device=args.device)
    else:
        config = SMALL if args.window is None else WIDE_CACHE
        model = from_config(config, dtype=args.dtype, device=args.device, seed=0)
    shape = (args.batch_size, args.prompt_length)
    prompts = torch.randint(3, model.spec.vocab_size, shape, generator=torch.Generator().manual_seed(0)).tolist()

    ways = {
        "with cache": partial(seconds_of, partial(generate, model)),
        "without cache": partial(seconds_of, partial(generate_without_cache, model)),
    }
    if args.window is not None:
        config = {**WIDE_CACHE, "model_type": "mistral", "sliding_window": args.window}
        windowed = from_config(config, dtype=args.dtype, device=args.device, seed=0)
        ways = {
            "with window": partial(seconds_of_steps, windowed),
            "without window": partial(seconds_of_steps, model),
        }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(args.repeats + 1):
        for name, way in ways.items():  # in turn, so that both meet the same noise; the first round warms up
            taken = way(prompts, max_new_tokens=args.max_new_tokens)
            if i:
                seconds[name].append(taken)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{num_parameters / 1e6:.1f} M parameters, {args.dtype}, {args.device}, {torch.get_num_threads()} threads; "
        f"{args.batch_size} prompts of {args.prompt_length} tokens, {args.max_new_tokens} new ones each; "
        f"median of {args.repeats}"
    )
    rates = {n: args.batch_size * args.max_new_tokens / statistics.median(times) for n, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:>14}: {rate:9,.0f} tokens/s  ({statistics.median(seconds[name]):.3f} s)")
    first, second = rates.values()
    print(f"{'ratio':>14}: {first / second:9.2f}")


if __name__ == "__main__":
    main()
