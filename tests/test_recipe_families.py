"""The recipe on other families than Llama, and on a tokenizer with tokens of the user's own."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from torchmask.cli.main import main
from torchmask.models import from_config, from_pretrained, save_pretrained
from torchmask.tokenizers import from_pretrained as load_tokenizer

transformers = pytest.importorskip("transformers")

REPO = Path(__file__).parent.parent
BASE = REPO / "configs" / "tiny" / "base"
CASES = ("gpt2_small", "bloom_alibi", "gemma3_text_usual", "phi3_longrope", "qwen3_moe_some_layers", "gpt_oss_yarn")


@pytest.fixture
def folder(tmp_path):
    """Rows with a common system prompt, and a configuration that trains on them for a few steps."""
    generator = random.Random(0)
    rows = []
    for _ in range(24):
        words = [generator.choice(["red", "blue", "up", "down"]) for _ in range(generator.randint(1, 5))]
        turns = [("system", "Say it again."), ("user", " ".join(words)), ("assistant", " ".join(words))]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my.yaml").write_text(
        f"""# finetune: a test
output_dir: {tmp_path}/out
model: {{_component_: torchmask.models.from_pretrained, folder: {tmp_path}/model}}
tokenizer: {{_component_: torchmask.tokenizers.from_pretrained, folder: {BASE}, chat_format: chatml,
             add_tokens: ["<|im_start|>", "<|im_end|>"]}}
dataset: {{_component_: torchmask.data.chat_dataset, source: {tmp_path}/train.jsonl}}
packing: {{max_seq_len: 96, share_prefixes: true}}
batch_size: 2
epochs: 3
optimizer: {{_component_: torch.optim.AdamW, lr: 3.0e-3}}
device: cpu
"""
    )
    return tmp_path


def write_model(folder, case):
    config = json.loads((REPO / "tests/models/configs" / f"{case}.json").read_text())
    config.pop("_note", None)
    long = {"original_max_position_embeddings": 96} if case.startswith("phi3") else {}
    tokenizer = load_tokenizer(BASE)
    save_pretrained(from_config({**config, **long, "vocab_size": tokenizer.vocab_size}), folder)
    return tokenizer


@pytest.mark.parametrize("case", CASES)
def test_a_family_trains_on_shared_packs_with_added_tokens_and_loads_in_transformers(folder, case, capfd):
    tokenizer = write_model(folder / "model", case)
    assert main(["run", "finetune", "--config", str(folder / "my.yaml")]) == 0, capfd.readouterr()
    losses = [json.loads(line)["loss"] for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]

    final = folder / "out/final"
    saved, ours = load_tokenizer(final), from_pretrained(final)
    assert saved.vocab_size == ours.spec.vocab_size == tokenizer.vocab_size + 2
    ids = saved.render([], add_generation_prompt=True).tokens.tolist()
    assert tokenizer.vocab_size in ids  # <|im_start|>
    theirs = transformers.AutoModelForCausalLM.from_pretrained(final, attn_implementation="eager").eval()
    tokens = torch.randint(0, saved.vocab_size, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.lm_head(ours(tokens)), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_documents_beyond_learned_positions_are_refused_before_training(folder, capfd):
    write_model(folder / "model", "gpt2_small")
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps({**config, "n_positions": 12}))
    assert main(["run", "finetune", "--config", str(folder / "my.yaml")]) == 3
    assert "the model has learned 12 positions" in capfd.readouterr().err
