"""Times training steps on all cores with and without `GOMP_SPINCOUNT=1000`, on idle cores and beside busy processes.

    python tools/bench_spin.py [--seconds 8] [--busy 2]

`torchmask run` makes this setting where neither it nor `OMP_WAIT_POLICY` is set. Each figure is from a process of its
own, as libgomp reads it once: steps of a random model of 0.9 M parameters (4 layers, 128 wide), fp32, on the CPU.
The settings take turns, twice; the better of the two counts.
"""

import argparse
import os
import subprocess
import sys

STEPS = """
import sys, time, torch
from torchmask.models.llama import FAMILY
from torchmask.models.family import build_model
from torchmask.modules import DecoderSpec, linear_cross_entropy
spec = DecoderSpec(vocab_size=512, embed_dim=128, intermediate_dim=384, num_layers=4, num_heads=8, num_kv_heads=8,
                   head_dim=16, max_seq_len=512)
model = build_model(FAMILY, spec, dtype="fp32", device="cpu")
tokens = torch.randint(0, 512, (2, 512))
def step():
    linear_cross_entropy(model(tokens), model.lm_head, tokens.roll(-1, 1)).backward()
    model.zero_grad()
step()
start, steps = time.perf_counter(), 0
while time.perf_counter() - start < float(sys.argv[1]):
    step()
    steps += 1
print(steps * tokens.numel() / (time.perf_counter() - start))
"""


def tokens_per_second(seconds: float, spin: str | None) -> float:
    """Of a process of its own."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    }
    environment |= {} if spin is None else {"GOMP_SPINCOUNT": spin}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(seconds)], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--busy", type=int, default=2, help="processes that compute beside it")
    args = parser.parse_args()
    for num_busy in (0, args.busy):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
        try:
            rates = dict.fromkeys((None, "1000"), 0.0)
            for _ in range(2):
                for spin in rates:
                    rates[spin] = max(rates[spin], tokens_per_second(args.seconds, spin))
        finally:
            for other in others:
                other.kill()
                other.wait()
        default, short = rates[None], rates["1000"]
        figures = f"default {default:,.0f} tokens/s, 1000 {short:,.0f}, ratio {short / default:.2f}"
        print(f"{num_busy} busy processes beside: {figures}")


if __name__ == "__main__":
    main()
