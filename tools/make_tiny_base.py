"""Makes the embedded default: `configs/tiny/data` (questions), `configs/tiny/base` (model and tokenizer).

    python tools/make_tiny_base.py data       # seconds: the questions, the same bytes each time
    python tools/make_tiny_base.py base       # about 15 minutes on 2 cores: tokenizer, then `finetune` from scratch

The base is a Llama of 0.9 million parameters that has learned to look things up: it reads invented passages and writes
notes on them (tiny_facts.py says which). It goes through torchmask's own `finetune` recipe with
configs/tiny/pretrain.yaml, in three stages: lists and plain notes first, then notes in other words, twice.

Training starts from random weights with two hints. Every head's key projection equals its query projection and its
output projection is the transpose of its value projection, so that attention begins by looking for equal tokens and
copying them (after Trockman and Kolter, "Mimetic initialization", arXiv:2305.09828); and the first layer's heads begin
by looking 1, 2, 3 or 4 tokens back, which rotary positions can say exactly (`look_back`).
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from tiny_facts import UNKNOWN, pretraining_rows, squad_set

REPO = Path(__file__).resolve().parent.parent
TINY = REPO / "configs" / "tiny"

END, USER, ASSISTANT, TURN_END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
# A name is cut off from the words around it, so that its tokens are the same wherever it stands and can be copied one
# by one. Words in lower case that follow each other become one token, as do the first words of a question and the
# beginning of a JSON answer: a small model's attention need not reach far.
WORDS = (
    r"\{\"[a-z]+\": \"|(?:What|Who|Where|Which|By)(?: ?[a-z]+)* |(?: ?[a-z]+)+[ ?.]*"
    r"|[A-Z][a-z]+|[A-Z]|[0-9]|[^A-Za-z0-9]+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_VOCAB_SIZE, MIN_FREQUENCY = 800, 300  # whatever is rarer, as whole names are, stays in pieces
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# name, rows, share of lists, whether notes are plain, learning rate
STAGES = (
    ("plain", 30_000, 0.6, True, 3e-3),
    ("notes", 26_000, 0.15, False, 2e-3),
    ("more", 26_000, 0.15, False, 2e-3),
)
START_SEED = 2  # of the random weights: look-ups begin after 0.5 to 2 million tokens, early with this one


def make_data(folder: Path, *, seed: int) -> None:
    """The questions: 8,000 answerable and 4,000 not to train on, 150 and 50 held out."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {
        "train": squad_set("train", num_passages=2000, num_answerable=4, num_impossible=2, seed=seed),
        "heldout": squad_set("heldout", num_passages=50, num_answerable=3, num_impossible=1, seed=seed),
    }
    for name, questions in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(questions, separators=(",", ":")) + "\n")


def make_tokenizer(folder: Path, *, seed: int) -> None:
    """A byte-level BPE of the pre-training text and the words of questions and chat turns."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = []
    for is_plain in (True, False):
        rows = pretraining_rows(2500, seed=seed, lists=0.3, is_plain=is_plain)
        text += [row["prompt"] + row["completion"] for row in rows]
    (article,) = squad_set("pretrain", num_passages=5000, num_answerable=4, num_impossible=1, seed=seed)["data"]
    for paragraph in article["paragraphs"]:
        text.append(paragraph["context"])
        for question in paragraph["qas"]:
            text += [question["question"], '{"answer": "?"}']
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[END, USER, TURN_END, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "add_bos_token": True,
        "eos_token": TURN_END,
        "pad_token": END,
        "model_max_length": MODEL["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0, "do_sample": False})


def make_start(folder: Path, *, seed: int) -> None:
    """Random weights whose attention begins by looking back and by copying."""
    import torch

    from torchmask.models import from_config, save_pretrained

    vocab_size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    model = from_config({**MODEL, "vocab_size": vocab_size}, seed=seed)
    with torch.no_grad():
        model.embed_tokens.weight[:, 0] = 4 * MODEL["initializer_range"]  # a constant that `look_back` can read
        for layer in model.layers:
            layer.attn.k_proj.weight.copy_(layer.attn.q_proj.weight)
            layer.attn.o_proj.weight.copy_(layer.attn.v_proj.weight.T)
        for head, (distance, is_broad) in enumerate(
            ((1, False), (2, False), (3, False), (4, False), (2, True), (4, True))
        ):
            look_back(model, head, distance, is_broad=is_broad)
    save_pretrained(model, folder)


def look_back(model, head: int, distance: int, *, is_broad: bool) -> None:
    """Makes a head of the first layer attend `distance` tokens back, whatever stands there.

    Queries and keys are one constant vector, the keys' turned by `distance` positions, so that after the rotary turns
    their product is largest where key and query are that far apart; `is_broad` leaves out the fastest and the slowest
    turns, which gives a wide bump instead of a peak.
    """
    import torch

    size = model.spec.head_dim
    turns = model.spec.rope_base ** (-torch.arange(0, size, 2) / size)  # radians a token
    strength = 1.4 * (((turns > 0.05) & (turns < 0.5)).float() if is_broad else torch.ones_like(turns))
    rows = slice(head * size, (head + 1) * size)
    query, key = (proj.weight[rows] for proj in (model.layers[0].attn.q_proj, model.layers[0].attn.k_proj))
    query.zero_()
    key.zero_()
    query[: size // 2, 0] = strength
    key[: size // 2, 0] = strength * torch.cos(turns * distance)
    key[size // 2 :, 0] = strength * torch.sin(turns * distance)


def pretrain(work: Path, *, seed: int, overrides: list[str]) -> Path:
    """Runs the stages; the folder of the trained model."""
    folder = work / "start"
    for number, (name, num_rows, lists, is_plain, lr) in enumerate(STAGES):
        rows = work / f"{name}.jsonl"
        with rows.open("w") as file:
            for row in pretraining_rows(num_rows, seed=seed * len(STAGES) + number, lists=lists, is_plain=is_plain):
                file.write(json.dumps(row) + "\n")
        output = work / name
        shutil.rmtree(output, ignore_errors=True)
        settings = [f"output_dir={output}", f"model.folder={folder}", f"dataset.source={rows}", f"seed={seed}"]
        settings.append(f"optimizer.lr={lr}")
        command = [sys.executable, "-m", "torchmask", "run", "finetune", "--config", str(TINY / "pretrain.yaml")]
        subprocess.run([*command, *settings, *overrides], cwd=REPO, check=True)
        folder = output / "final"
    return folder


def make_base(folder: Path, work: Path, *, seed: int, overrides: list[str]) -> None:
    """The base model as it is shipped: trained in fp32, stored in bf16."""
    import torch

    from torchmask.models import from_pretrained, save_pretrained

    shutil.rmtree(work / "start", ignore_errors=True)
    make_tokenizer(work / "start", seed=seed)
    make_start(work / "start", seed=START_SEED)
    final = pretrain(work, seed=seed, overrides=overrides)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_pretrained(from_pretrained(final), folder, dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(work / "start" / name, folder / name)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB; a note on what a passage does not tell ends in {UNKNOWN!r}")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "base"))
    parser.add_argument("--output", type=Path, default=TINY, help="configs/tiny")
    parser.add_argument("--work", type=Path, default=REPO / "outputs" / "tiny_base", help="files made on the way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="for the recipe, such as epochs=2")
    args = parser.parse_intermixed_args()
    if args.what == "data":
        make_data(args.output / "data", seed=args.seed)
    else:
        make_base(args.output / "base", args.work.resolve(), seed=args.seed, overrides=args.overrides)


if __name__ == "__main__":
    main()
