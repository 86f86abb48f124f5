"""The embedded default: its size, its data, and (slow) what `finetune --config tiny/qa` makes of it."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from torchmask.data import render_prompt, squad_conversation, squad_rows
from torchmask.evaluation import evaluate_squad
from torchmask.generation import generate
from torchmask.models import from_pretrained
from torchmask.tokenizers import from_pretrained as tokenizer_from_pretrained

REPO = Path(__file__).resolve().parent.parent
TINY = REPO / "configs" / "tiny"
PROMPT = "{context}\n{question}"


@pytest.fixture
def make_tiny_base(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    spec = importlib.util.spec_from_file_location("make_tiny_base", REPO / "tools" / "make_tiny_base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("tiny_facts", None)


def paragraphs(name):
    return [p for a in json.loads((TINY / "data" / f"{name}.json").read_text())["data"] for p in a["paragraphs"]]


def names(name):
    """Every capitalised word of the passages."""
    return {word for p in paragraphs(name) for word in re.findall("[A-Z][a-z]+", p["context"])}


def test_the_base_and_the_data_are_small():
    size = {kind: sum(f.stat().st_size for f in (TINY / kind).iterdir()) for kind in ("base", "data")}
    assert size["base"] <= 4e6
    assert size["data"] <= 2.5e6


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_every_answer_stands_where_the_data_says(name):
    for paragraph in paragraphs(name):
        for question in paragraph["qas"]:
            assert question["is_impossible"] == (not question["answers"])
            for answer in question["answers"]:
                start = answer["answer_start"]
                assert paragraph["context"][start : start + len(answer["text"])] == answer["text"]
                assert paragraph["context"].count(answer["text"]) == 1


def test_ids_are_unique_and_200_questions_are_held_out_a_quarter_of_them_without_an_answer():
    questions = [q for p in paragraphs("heldout") for q in p["qas"]]
    assert len(questions) == len({q["id"] for q in questions}) == 200
    assert sum(q["is_impossible"] for q in questions) == 50


def test_no_name_of_the_held_out_questions_is_in_the_training_questions_or_the_pretraining_text(make_tiny_base):
    heldout = names("heldout")
    assert len(heldout) > 300
    assert not heldout & names("train")
    rows = make_tiny_base.pretraining_rows(300, seed=0, lists=0.3, is_plain=False)
    text = " ".join(row["prompt"] + row["completion"] for row in rows)
    assert not heldout & set(re.findall("[A-Z][a-z]+", text))


def test_the_same_relation_and_the_same_person_occur_more_than_once_so_that_neither_alone_gives_the_answer(
    make_tiny_base,
):
    import random

    from tiny_facts import make_passage

    rng = random.Random(0)
    for _ in range(50):
        passage = make_passage(rng, "heldout", num_people=3, num_relations=3, num_facts=6)
        assert len({f.subject for f in passage.facts}) <= 3
        assert len({f.relation for f in passage.facts}) <= 3
        assert len({(f.subject, f.relation) for f in passage.facts}) == 6


def test_the_script_makes_the_same_data_again(make_tiny_base, tmp_path):
    make_tiny_base.make_data(tmp_path, seed=0)
    for name in ("train", "heldout"):
        assert (tmp_path / f"{name}.json").read_bytes() == (TINY / "data" / f"{name}.json").read_bytes()


def test_the_script_makes_the_same_tokenizer_again(make_tiny_base, tmp_path):
    make_tiny_base.make_tokenizer(tmp_path, seed=0)
    assert (tmp_path / "tokenizer.json").read_bytes() == (TINY / "base" / "tokenizer.json").read_bytes()


def test_a_name_has_the_same_tokens_after_a_space_and_in_the_json_answer():
    tokenizer = tokenizer_from_pretrained(TINY / "base")
    for name in sorted(names("heldout"))[:50]:
        pieces = tokenizer.encode(name)
        assert tokenizer.encode(f" lives in {name}.")[1:-1] == pieces
        assert tokenizer.encode(f'{{"answer": "{name}"}}')[1:-1] == pieces


def test_transformers_loads_the_base_and_computes_the_same_logits():
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(4, 700, (2, 50), generator=torch.Generator().manual_seed(0))
    ours, theirs = from_pretrained(TINY / "base"), transformers.AutoModelForCausalLM.from_pretrained(TINY / "base")
    with torch.no_grad():
        torch.testing.assert_close(ours.lm_head(ours(tokens)), theirs.float()(tokens).logits, atol=1e-4, rtol=1e-4)


def test_transformers_writes_the_same_prompt():
    transformers = pytest.importorskip("transformers")
    ours, theirs = tokenizer_from_pretrained(TINY / "base"), transformers.AutoTokenizer.from_pretrained(TINY / "base")
    row = squad_rows(str(TINY / "data" / "heldout.json"), max_rows=1)[0]
    prompt = render_prompt(ours, squad_conversation(row, prompt_template=PROMPT, with_answer=False))
    message = {"role": "user", "content": PROMPT.format(context=row["context"], question=row["question"])}
    expected = theirs.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(prompt) == list(expected)


def exact_match(folder, rows):
    """Per cent of greedy answers that are right."""
    model, tokenizer = from_pretrained(folder), tokenizer_from_pretrained(folder)

    def answer(questions):
        conversations = [squad_conversation(q, prompt_template=PROMPT, with_answer=False) for q in questions]
        prompts = [list(render_prompt(tokenizer, c)) for c in conversations]
        return [
            tokenizer.decode(ids) for ids in generate(model, prompts, max_new_tokens=24, stop_ids=tokenizer.stop_ids)
        ]

    with torch.no_grad():
        return evaluate_squad(rows, answer).exact_match


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_fine_tuning_brings_exact_match_from_under_10_to_90_and_it_needs_the_context(tmp_path, seed):
    import subprocess

    rows = squad_rows(str(TINY / "data" / "heldout.json"))
    assert exact_match(TINY / "base", rows) < 10
    command = [sys.executable, "-m", "torchmask", "run", "finetune", "--config", "tiny/qa"]
    subprocess.run([*command, f"output_dir={tmp_path / 'run'}", f"seed={seed}"], check=True, timeout=600, cwd=tmp_path)
    assert exact_match(tmp_path / "run" / "final", rows) >= 90

    contexts = [row["context"] for row in rows]
    shuffled = [{**row, "context": contexts[(i + 97) % len(rows)]} for i, row in enumerate(rows)]
    assert exact_match(tmp_path / "run" / "final", shuffled) < 30
