"""Tokens a second of greedy decoding, with the key-value cache and without, measured in turn in one process.

.venv/bin/python tools/bench_generate.py                                  # a random model of 1.2 M parameters
.venv/bin/python tools/bench_generate.py --checkpoint FOLDER --dtype bf16 --device cuda
"""

import argparse
import statistics
import time

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


@torch.no_grad()
def generate_without_cache(model: Decoder, prompts: list[list[int]], *, max_new_tokens: int) -> list[list[int]]:
    """The same tokens by reading everything again for each; prompts of one length."""
    tokens = torch.tensor(prompts, device=model.embed_tokens.weight.device)
    for _ in range(max_new_tokens):
        token = model.lm_head(model(tokens)[:, -1]).argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, token), dim=1)
    return tokens[:, len(prompts[0]) :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="model folder; without it a small random model")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--prompt-length", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.checkpoint:
        model = from_pretrained(args.checkpoint, dtype=args.dtype, device=args.device)
    else:
        model = from_config(SMALL, dtype=args.dtype, device=args.device)
    shape = (args.batch_size, args.prompt_length)
    prompts = torch.randint(3, model.spec.vocab_size, shape, generator=torch.Generator().manual_seed(0)).tolist()

    seconds: dict[str, list[float]] = {"with cache": [], "without cache": []}
    ways = {"with cache": generate, "without cache": generate_without_cache}
    for i in range(args.repeats + 1):
        for name, way in ways.items():  # in turn, so that both meet the same noise; the first round warms up
            start = time.perf_counter()
            way(model, prompts, max_new_tokens=args.max_new_tokens)
            if i:
                seconds[name].append(time.perf_counter() - start)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{num_parameters / 1e6:.1f} M parameters, {args.dtype}, {args.device}, {torch.get_num_threads()} threads; "
        f"{args.batch_size} prompts of {args.prompt_length} tokens, {args.max_new_tokens} new ones each; "
        f"median of {args.repeats}"
    )
    rates = {n: args.batch_size * args.max_new_tokens / statistics.median(times) for n, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:>14}: {rate:9,.0f} tokens/s  ({statistics.median(seconds[name]):.3f} s)")
    print(f"{'ratio':>14}: {rates['with cache'] / rates['without cache']:9.2f}")


if __name__ == "__main__":
    main()
