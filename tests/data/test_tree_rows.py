"""Shared-prefix packs on real rows, and their losses and gradients."""

import json

import numpy as np
import pytest

from torchmask.data import PackedDataset, Sample, chat_dataset
from torchmask.messages import MaskFlag

IGN = -100


def document(prompt, answer):
    return Sample([*prompt, *answer], [1] * len(prompt) + [0] * len(answer))


# Real rows

SYSTEM_PROMPT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
SINGLE_TURN = (
    "Extract from the following context the minimal span word for word that best answers the question. Think step by "
    "step and explain your reasoning. Then give the answer in JSON format as follows:\n```json\n{\n"
    '  "answer": ...\n}\n```\nIf the answer is not in the context, the answer should be "?".\n'
)


@pytest.fixture(scope="module")
def squad(assets, tmp_path_factory):
    """The development set as single-turn conversations of llama-squad, Llama-2 tokens."""
    from torchmask.data import squad_rows
    from torchmask.tokenizers import from_pretrained

    path = tmp_path_factory.mktemp("squad") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in squad_rows(str(assets / "data/squad_v2_cs224n_dev.json")):
            prompt = f"{SINGLE_TURN}Context: {row['context']}\nQuestion: {row['question']}"
            answer = f'```json\n{{\n  "answer": {json.dumps((row["answers"] or ["?"])[0])}\n}}\n```'
            roles = (("system", SYSTEM_PROMPT), ("user", prompt), ("assistant", answer))
            messages = [{"role": role, "content": text} for role, text in roles]
            file.write(json.dumps({"messages": messages}) + "\n")
    return chat_dataset(from_pretrained(str(assets / "tokenizers/llama2"), chat_format="llama2"), source=str(path))


def test_real_questions_take_6_and_a_half_times_fewer_slots(squad):
    flat, tree = (PackedDataset(squad, max_seq_len=4096, share_prefixes=share) for share in (False, True))
    assert flat.report["slots"] >= 6.5 * tree.report["slots"]
    assert len(flat) >= 6.5 * len(tree)
    assert tree.report["trained"] == flat.report["trained"]
    assert tree.report["fill"] > 0.95


# Losses and gradients


def tiny_model():
    import torch

    from torchmask.models import from_config
    from torchmask.modules import Decoder

    torch.manual_seed(0)
    facts = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    model = Decoder(from_config(facts).spec, attention="dense").to(torch.float64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def loss_and_gradients(model, dataset):
    """Per-token nll of each document in data order, and the gradients of the weighted sum over all rows."""
    import torch

    from torchmask.data import collate

    model.zero_grad()
    found = {}
    for r in range(len(dataset)):
        batch = collate([dataset[r]])
        hidden = model(batch.tokens, batch.positions, batch.visible_until)
        nll = torch.nn.functional.cross_entropy(
            model.lm_head(hidden)[0], batch.labels[0], ignore_index=IGN, reduction="none"
        )
        om = torch.ones_like(nll) if batch.weights is None else batch.weights[0]
        (nll * om).sum().backward()
        for d, p in enumerate(dataset.documents(r)):
            found[p.sample] = nll.detach().numpy()[dataset.path(r, d)]
    return found, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("seed", range(3))
def test_p3_losses_and_gradients_of_trees_are_those_of_separate_documents(seed):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    system = rng.integers(3, 64, 5).tolist()
    contexts = [rng.integers(3, 64, 6).tolist() for _ in range(3)]
    samples = []
    for _ in range(14):
        prompt = [1, *system, *contexts[rng.integers(3)], *rng.integers(3, 64, rng.integers(1, 5)).tolist()]
        answer = [*rng.integers(3, 64, rng.integers(1, 6)).tolist(), 2]
        mask = np.array([1] * len(prompt) + [0] * len(answer))
        mask[3] |= MaskFlag.ATTENTION
        mask[-2] |= MaskFlag.LOSS * int(rng.integers(2))
        samples.append(Sample([*prompt, *answer], mask, rng.choice([0.5, 1.0, 2.0], len(mask))))
    model = tiny_model()
    separate = PackedDataset(samples, max_seq_len=48, strategy="none")
    shared = PackedDataset(samples, max_seq_len=48, share_prefixes=True)
    assert 1 < len(shared) < 6 and shared.report["slots_saved"] > 60
    (nll, gradients), (nll_shared, gradients_shared) = (loss_and_gradients(model, d) for d in (separate, shared))
    for i in range(len(samples)):
        np.testing.assert_allclose(nll_shared[i], nll[i], atol=1e-12, rtol=0)
    for a, b in zip(gradients, gradients_shared):
        assert torch.allclose(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("share", [False, True])
def test_case_27_changing_one_document_changes_no_bit_of_anothers_logits(share):
    torch = pytest.importorskip("torch")
    from torchmask.data import collate

    prompt = [1, 10, 11, 12, 13, 14]
    model, found = tiny_model(), []
    for answer in ([20, 21, 2], [22, 23, 24]):
        samples = [document([*prompt, 30], answer), document([*prompt, 31], [40, 41, 2])]
        dataset = PackedDataset(samples, max_seq_len=32, share_prefixes=share)
        batch = collate([dataset[0]])
        with torch.no_grad():
            logits = model.lm_head(model(batch.tokens, batch.positions, batch.visible_until))[0]
        place = [p.sample for p in dataset.documents(0)].index(1)
        found.append(logits[torch.from_numpy(dataset.path(0, place))])
    assert torch.equal(*found)
