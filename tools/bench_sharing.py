"""Times a training step on shared-prefix packs beside flat packs of the same documents: SQuAD v2, Llama-2 tokens.

    python tools/bench_sharing.py [--rows 2] [--repeats 3] [--threads 1] [--slots 4096]

The documents are those of the first rows of the shared plan. Both ways train on all of them in one optimizer step (a
row a micro-batch, AdamW) with one random model of 4 layers, 512 wide, in fp32 on the CPU, and take turns; a time is the
best of the repeats. Processor time is given too, since it suffers less from whatever else the machine does. The prompt
is llama-squad's single-turn one. The last lines time the masks alone.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from torchmask.data import PackedDataset, collate, squad_dataset
from torchmask.modules import Decoder, DecoderSpec, build_attention_mask, linear_cross_entropy
from torchmask.tokenizers import from_pretrained

ASSETS = Path(os.environ.get("TORCHMASK_ASSETS", Path(__file__).resolve().parent.parent.parent / "shared" / "assets"))
SYSTEM_PROMPT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
PROMPT = (
    "Extract from the following context the minimal span word for word that best answers the question. Think step by "
    "step and explain your reasoning. Then give the answer in JSON format as follows:\n```json\n{\n"
    '  "answer": ...\n}\n```\nIf the answer is not in the context, the answer should be "?".\n'
    "Context: {context}\nQuestion: {question}"
)


def build_model(vocab_size):
    torch.manual_seed(0)
    return Decoder(
        DecoderSpec(
            vocab_size=vocab_size,
            embed_dim=512,
            intermediate_dim=1408,
            num_layers=4,
            num_heads=8,
            num_kv_heads=8,
            head_dim=64,
            max_seq_len=4096,
        )
    )


def step(model, optimizer, batches):
    """The loss of one optimizer step over the batches, its seconds and its seconds of processor time."""
    start, start_cpu = time.perf_counter(), time.process_time()
    num_targets, total = sum(batch.num_targets for batch in batches), 0.0
    for batch in batches:
        hidden = model(batch.tokens, batch.positions, batch.visible_until)
        loss = linear_cross_entropy(hidden, model.lm_head, batch.labels, batch.weights) / num_targets
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total, time.perf_counter() - start, time.process_time() - start_cpu


def attention_seconds(batches, repeats):
    """Processor time of forward and backward of one layer's attention alone."""
    from torchmask.modules.attention import attend

    best = 0.0
    for batch in batches:
        q, k, v = (torch.randn(1, batch.tokens.shape[1], 8, 64).transpose(1, 2).requires_grad_() for _ in range(3))
        mask = build_attention_mask(batch.visible_until, batch.tokens, backend="sdpa")
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            attend(q, k, v, mask).sum().backward()
            seconds.append(time.process_time() - start)
        best += min(seconds)
    return best


def time_masks(packs, name):
    """Milliseconds to build a 2 x 4096 batch's masks."""
    batch = collate([packs[0], packs[1]], pad_to=4096)
    for backend in ("sdpa", "flex"):
        seconds = []
        for _ in range(30):
            start = time.perf_counter()
            build_attention_mask(batch.visible_until, batch.tokens, backend=backend, positions=batch.positions)
            seconds.append(time.perf_counter() - start)
        print(f"mask of 2 x 4096, {name}, {backend}: {1e3 * np.median(seconds):.2f} ms (median of 30)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2, help="rows of the shared plan")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = from_pretrained(str(ASSETS / "tokenizers/llama2"), chat_format="llama2")
    samples = squad_dataset(
        tokenizer,
        source=str(ASSETS / "data/squad_v2_cs224n_dev.json"),
        prompt_template=PROMPT,
        new_system_prompt=SYSTEM_PROMPT,
    )
    every = {share: PackedDataset(samples, max_seq_len=args.slots, share_prefixes=share) for share in (False, True)}
    slots = {share: int(np.sum(packs.row_lengths)) for share, packs in every.items()}
    print(f"all {len(samples)} questions: flat {slots[False]} slots in {len(every[False])} rows, ", end="")
    print(f"shared {slots[True]} in {len(every[True])}: {slots[False] / slots[True]:.2f} times fewer")

    chosen = sorted({d.sample for row in range(args.rows) for d in every[True].documents(row)})
    packs = {
        share: PackedDataset([samples[i] for i in chosen], max_seq_len=args.slots, share_prefixes=share)
        for share in (False, True)
    }
    batches = {share: [collate([pack]) for pack in some] for share, some in packs.items()}
    model = build_model(tokenizer.vocab_size)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses, seconds, cpu = {}, {False: [], True: []}, {False: [], True: []}
    for _ in range(args.repeats):
        for share in (False, True):
            model.load_state_dict(state)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            losses[share], wall, busy = step(model, optimizer, batches[share])
            seconds[share].append(wall)
            cpu[share].append(busy)
    print(f"\n{len(chosen)} questions, torch {torch.__version__}, {args.threads} threads\n")
    print("| packs | rows | slots | step s | examples/s | CPU s | attention CPU s a layer | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for share, name in ((False, "flat"), (True, "shared")):
        best, num_slots = min(seconds[share]), sum(batch.num_tokens for batch in batches[share])
        alone = attention_seconds(batches[share], args.repeats)
        row = (
            len(batches[share]),
            num_slots,
            f"{best:.2f}",
            f"{len(chosen) / best:.1f}",
            f"{min(cpu[share]):.2f}",
            f"{alone:.3f}",
        )
        print("|", " | ".join(map(str, (name, *row, f"{losses[share]:.7f}"))), "|")
    ratio = min(seconds[False]) / min(seconds[True])
    ratio_cpu = min(cpu[False]) / min(cpu[True])
    print(f"\nexamples per second, shared / flat: {ratio:.2f} ({ratio_cpu:.2f} by processor time);", end=" ")
    print(f"losses differ by {abs(losses[0] - losses[1]):.1e}\n")
    for share, name in ((False, "flat"), (True, "shared")):
        time_masks(every[share], name)


if __name__ == "__main__":
    main()
