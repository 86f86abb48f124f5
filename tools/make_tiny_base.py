"""Makes the embedded default: `configs/tiny/data` (questions), `configs/tiny/base` (model and tokenizer).

    python tools/make_tiny_base.py data       # seconds: the questions, the same bytes each time
    python tools/make_tiny_base.py base       # about 20 minutes on one core: tokenizer, then `finetune` from scratch

The base is a Llama of 0.9 million parameters that has learned to copy: it reads invented passages and writes notes on
them (tiny_facts.py says which). It goes through torchmask's own `finetune` recipe with configs/tiny/pretrain.yaml, in
two stages: mostly drills, then mostly passages.

Training starts from random weights in which every head's key projection equals its query projection and its output
projection is the transpose of its value projection, so that attention begins by looking for equal tokens and copying
them (after Trockman and Kolter, "Mimetic initialization", arXiv:2305.09828). Without it, the same loss takes about
three times as many tokens.
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

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# A name is cut off from the space or quotation mark in front of it, so that its tokens are the same wherever it stands
# and can be copied one by one; other words take their space along. Digits stand alone.
WORDS = r" ?[a-z]+|[A-Z][a-z]+|[A-Z]|[0-9]|\n+| |\?|[^\sA-Za-z0-9?]+|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 640
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
STAGES = (("drills", 12_000, 1.0), ("notes", 80_000, 0.25))  # name, rows, share of drills


def make_data(folder: Path, *, seed: int) -> None:
    """The questions: 1,600 answerable and 400 not to train on, 150 and 50 held out."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {
        "train": squad_set("train", num_passages=400, num_answerable=4, num_impossible=1, seed=seed),
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
    text = [f"{row['prompt']}{row['completion']}" for row in pretraining_rows(20_000, seed=seed, drills=0.25)]
    for paragraph in squad_set("pretrain", num_passages=1000, num_answerable=4, num_impossible=1, seed=seed)["data"][0][
        "paragraphs"
    ]:
        text += [f'user\n{q["question"]}\nassistant\n{{"answer": "?"}}' for q in paragraph["qas"]]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, TURN, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END,
        "model_max_length": MODEL["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0, "do_sample": False})


def make_start(folder: Path, *, seed: int) -> None:
    """Random weights whose attention begins by copying."""
    import torch

    from torchmask.models import from_config, save_pretrained

    model = from_config(MODEL, seed=seed)
    with torch.no_grad():
        for layer in model.layers:
            layer.attn.k_proj.weight.copy_(layer.attn.q_proj.weight)
            layer.attn.o_proj.weight.copy_(layer.attn.v_proj.weight.T)
    save_pretrained(model, folder)


def pretrain(work: Path, *, seed: int, overrides: list[str]) -> Path:
    """Runs the stages; the folder of the trained model."""
    folder = work / "start"
    for number, (name, num_rows, drills) in enumerate(STAGES):
        rows = work / f"{name}.jsonl"
        with rows.open("w") as file:
            for row in pretraining_rows(num_rows, seed=seed * len(STAGES) + number, drills=drills):
                file.write(json.dumps(row) + "\n")
        output = work / name
        shutil.rmtree(output, ignore_errors=True)
        settings = [f"output_dir={output}", f"model.folder={folder}", f"dataset.source={rows}", f"seed={seed}"]
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
    make_start(work / "start", seed=seed)
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
