"""Properties P1 to P10 of masking.md from conversations to rows: random talks, rules, tokenizers, lengths and packers.

Rows of small made-up ids, which say where each label came from, are the business of the tests named beside these:

| norm | here | elsewhere (`tests/data/` where no folder is named) |
|---|---|---|
| P1 | `test_p1_...` | test_packing_properties, test_edges |
| P2 | `test_p2_...` | test_packing_properties; trees: `test_every_document_of_a_tree...` in test_prefix_sharing |
| P3, P4 | `test_p3_...`, `test_p4_...` | test_tree_rows; other kernels: modules/test_attention*, test_decoder_masks |
| P5 | `test_p5_...` | test_packing_properties, test_edges, test_eos |
| P6 | `test_p6_...` | test_eos |
| P7, P8 | `test_p7_...`, `test_p8_...` | test_packing_properties, test_edges |
| P9, P10 | `test_p9_...`, `test_p10_...` | test_packing_properties, test_prefix_sharing |
| cases 1, 2 | | test_masks, test_packing |
| cases 3, 4, 12, 15, 16 | | test_masks; 12 also test_span_tokens, 15 also test_row_flags |
| cases 5, 6, 18, 20, 22, 24, 25, 28 | | test_packing; 6 also test_edges |
| cases 8, 10, 11 | | test_span_tokens; 8, 10 also test_trl_parity |
| cases 17; 27; 30, 31 | | test_serving; test_tree_rows; test_row_options, modules/test_loss |
"""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from torchmask.data import EosPolicy, MaskPolicy, PackedDataset, SamplesBuilder, collate
from torchmask.data.formats import Conversation
from torchmask.data.masks import finish_chat
from torchmask.data.rendering import documents_of
from torchmask.errors import DataError
from torchmask.messages import MaskFlag, Message

IGN = -100
ASSETS = Path(os.environ.get("TORCHMASK_ASSETS", Path(__file__).resolve().parents[3] / "shared" / "assets"))
FORMATS = {"llama2": "llama2", "llama3": "llama3", "qwen3": None, "gpt2": None, "stories260k": None}
NAMES = [name for name in FORMATS if (ASSETS / "tokenizers" / name).is_dir()]

if not NAMES:
    pytest.skip(f"no tokenizers at {ASSETS}", allow_module_level=True)

LAYOUTS = ({}, {"strategy": "first_fit"}, {"strategy": "in_order"}, {"strategy": "none"}, {"share_prefixes": True})
quick = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
few = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])


@cache
def tokenizer(name):
    from torchmask.tokenizers import from_pretrained

    return from_pretrained(ASSETS / "tokenizers" / name, FORMATS[name])


# Random conversations and rules

words = st.sampled_from(
    ["a", " b", "\n", '{"x": 1}', "</s>", "<think>t</think>", "é", "日本", "12", " [[x]]", "<|eot_id|>"]
)
texts = st.lists(words, min_size=1, max_size=5).map("".join).filter(str.strip)
own_says = st.sampled_from([{}, {}, {}, {"weight": 0.5}, {"masked": True}, {"visible": False}])
prefixes = ("You are brief.", "You are brief. Answer from this passage: the sky is blue and the grass is green.")


@st.composite
def talks(draw, name):
    """A conversation, or for a tokenizer without a chat format a prompt and its answer."""
    first = draw(st.sampled_from(["", *prefixes]))
    if not tokenizer(name).has_chat_format:
        return [Message("user", first + draw(texts)), Message("assistant", draw(texts), **draw(own_says))]
    messages = [Message("system", first)] if first else []
    for _ in range(draw(st.integers(1, 2))):
        messages += [Message("user", draw(texts)), Message("assistant", draw(texts), **draw(own_says))]
    return messages


eos_policies = st.builds(
    EosPolicy,
    append=st.sampled_from(["auto", "always", "virtual"]),
    train_on_eos=st.sampled_from(["turn", "all", "last", "none"]),
    weight=st.sampled_from([1.0, 0.5]),
) | st.builds(EosPolicy, train_on_eos=st.sampled_from(["turn", "all"]), boundary_loss=st.just("train"))
span_rules = st.sampled_from(
    [
        (),
        ({"tag": "think", "weight": 0.25},),
        ({"regex": r"\d+", "train": "only"},),
        ({"regex": "b", "visible": False},),
    ]
)
policies = st.builds(
    MaskPolicy,
    masking_strategy=st.sampled_from(["train_on_assistant", "train_on_last", "train_on_all"]),
    train_on_header=st.booleans(),
    spans=span_rules,
    straddle=st.sampled_from(["overlap", "inside", "split"]),
    eos=eos_policies,
    unstable_template=st.just("expand"),
)


@st.composite
def data_sets(draw, *, boundary=True):
    """(samples, policy, name): all documents of a few conversations."""
    name, policy = draw(st.sampled_from(NAMES)), draw(policies)
    assume(boundary or policy.eos.boundary_loss == "ignore")
    builder = SamplesBuilder(eos=policy.eos)
    for row in range(draw(st.integers(1, 5))):
        conversation = Conversation(draw(talks(name)))
        for rendered, d in documents_of(tokenizer(name), conversation, policy, chat=tokenizer(name).has_chat_format):
            builder.append(rendered.tokens, d.mask, d.weights, source="t", row=row, stop=d.stop)
    return builder.finish(), policy, name


def pack_or_none(samples, **options):
    try:
        return PackedDataset(samples, **{"max_seq_len": int(samples.lengths.max()), "no_targets": "keep", **options})
    except DataError as error:
        assert error.id in ("D09", "D11"), error
        return None


def om_of(pack):
    return (pack.labels != IGN) * 1.0 if pack.weights is None else pack.weights.astype(np.float64)


def documents(dataset, *, aside=True):
    """(document, its y, its om) of all rows, E2 aside: what the last slot predicts of the next document."""
    for r in range(len(dataset)):
        pack, om = dataset[r], om_of(dataset[r])
        for d, p in enumerate(dataset.documents(r)):
            path = dataset.path(r, d)
            y, weights = pack.labels[path].copy(), om[path].copy()
            if aside and dataset.report["eos_policy"]["boundary_loss"] == "train":
                y[-1], weights[-1] = IGN, 0.0
            yield p, y.tolist(), weights.tolist()


def alone(sample, stop, policy):
    """(y, om) of one document by the definition; a virtual stop is a label and no slot, nor is what follows it."""
    w = np.ones(len(sample)) if sample.weights is None else sample.weights.astype(np.float64)
    w = np.where(sample.trained, w, 0)
    y, om = np.append(np.where(w[1:] != 0, sample.tokens[1:], IGN), IGN), np.append(w[1:], 0.0)
    if policy.eos.append == "virtual" and stop >= 1 and not w[stop + 1 :].any():
        y, om = y[:stop], om[:stop]
    return y.tolist(), om.tolist()


# The properties


@quick
@given(data_sets(), st.sampled_from(LAYOUTS))
def test_p1_weights_in_rows_are_those_of_the_documents(made, layout):
    samples, policy, _ = made
    dataset = pack_or_none(samples, **layout)
    if dataset is None:
        return
    before = sum(sum(alone(s, int(stop), policy)[1]) for s, stop in zip(samples, samples.stops))
    after = sum(sum(om) for _, _, om in documents(dataset))
    assert np.isclose(before, after) and not dataset.report["weights"]["dropped"]
    boundary = dataset.report["weights"].get("boundary", 0.0)
    assert np.isclose(sum(om_of(pack).sum() for pack in dataset), after + boundary)


@quick
@given(data_sets(), st.sampled_from(LAYOUTS))
def test_p2_labels_in_a_pack_are_those_of_the_document_alone(made, layout):
    samples, policy, _ = made
    dataset = pack_or_none(samples, **layout)
    if dataset is None:
        return
    found = {p.sample: (y, om) for p, y, om in documents(dataset)}
    assert found == {i: alone(s, int(samples.stops[i]), policy) for i, s in enumerate(samples)}


def tiny_model():
    import torch

    from torchmask.models import from_config
    from torchmask.modules import Decoder

    torch.manual_seed(0)
    facts = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    model = Decoder(from_config(facts).spec, attention="dense").to(torch.float64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def folded(samples):
    """The samples with ids that a model of 64 tokens has."""
    return replace(samples, tokens=(samples.tokens % 61 + 3).astype(np.int32))


def losses_and_gradients(model, dataset):
    import torch

    model.zero_grad()
    found = {}
    for r in range(len(dataset)):
        batch = collate([dataset[r]])
        logits = model.lm_head(model(batch.tokens, batch.positions, batch.visible_until))[0]
        nll = torch.nn.functional.cross_entropy(logits, batch.labels[0], ignore_index=IGN, reduction="none")
        (nll * torch.from_numpy(om_of(dataset[r]))).sum().backward()
        for d, p in enumerate(dataset.documents(r)):
            found[p.sample] = nll.detach().numpy()[dataset.path(r, d)]
    return found, [parameter.grad.clone() for parameter in model.parameters()]


@few
@given(data_sets(boundary=False), st.sampled_from(LAYOUTS))
def test_p3_losses_and_gradients_in_packs_are_those_of_separate_documents(made, layout):
    torch = pytest.importorskip("torch")
    samples = folded(made[0])
    assume(int(samples.lengths.sum()) < 600)
    packed = pack_or_none(samples, **{**layout, "max_seq_len": int(samples.lengths.sum())})
    if packed is None:
        return
    model = tiny_model()
    nll, gradients = losses_and_gradients(model, packed)
    nll_alone, gradients_alone = losses_and_gradients(model, pack_or_none(samples, strategy="none"))
    assert nll.keys() == nll_alone.keys()
    for i in nll:
        np.testing.assert_allclose(nll[i], nll_alone[i], atol=1e-12, rtol=0)
    for a, b in zip(gradients, gradients_alone):
        assert torch.allclose(a, b, atol=1e-10, rtol=0)


@few
@given(data_sets(boundary=False), st.sampled_from(LAYOUTS), st.data())
def test_p4_changing_one_document_changes_no_bit_of_anothers_logits(made, layout, data):
    torch = pytest.importorskip("torch")
    samples = folded(made[0])
    assume(len(samples) > 1 and int(samples.lengths.sum()) < 600)
    changed = data.draw(st.integers(0, len(samples) - 1))
    targets = np.flatnonzero(samples[changed].trained[1:])
    assume(len(targets))  # what comes after a target is no prefix that others share, so the rows stay as they are
    tokens, first = samples.tokens.copy(), int(samples.offsets[changed] + targets[0] + 1)
    tokens[first : samples.offsets[changed + 1]] = 3 + (tokens[first : samples.offsets[changed + 1]] - 2) % 61
    model, found = tiny_model(), []
    for some in (samples, replace(samples, tokens=tokens)):
        dataset = pack_or_none(some, **{**layout, "max_seq_len": int(samples.lengths.sum())})
        found.append({})
        for r in range(len(dataset)):
            batch = collate([dataset[r]])
            with torch.no_grad():
                logits = model.lm_head(model(batch.tokens, batch.positions, batch.visible_until))[0]
            for d, p in enumerate(dataset.documents(r)):
                found[-1][p.sample] = logits[torch.from_numpy(dataset.path(r, d))]
    for i in found[0].keys() - {changed}:
        assert torch.equal(found[0][i], found[1][i])


@quick
@given(data_sets(), st.sampled_from(LAYOUTS))
def test_p5_trained_stops_are_the_documents_whose_stop_is_trained(made, layout):
    samples, policy, _ = made
    dataset = pack_or_none(samples, **layout)
    if dataset is None:
        return
    trained = sum(
        stop > 0 and not samples[i].mask[stop] & MaskFlag.LOSS for i, stop in enumerate(samples.stops.tolist())
    )
    stops = dataset.report["eos"]
    assert stops["trained_stops"] == trained and stops["cut"] == 0
    if policy.eos.train_on_eos == "none":
        assert trained == 0


@quick
@given(st.data())
def test_p6_appending_is_idempotent(data):
    name, policy = data.draw(st.sampled_from(NAMES)), data.draw(policies)
    mine = tokenizer(name)
    assume(mine.has_chat_format)
    talk = data.draw(talks(name))
    for rendered, _ in documents_of(mine, Conversation(talk), policy, chat=True):
        if rendered.turns.max() == len(talk) - 1:  # a sample of an earlier turn ends with that
            assert finish_chat(rendered, talk, mine.eos_id, policy.eos) is rendered


@quick
@given(data_sets(), st.sampled_from(LAYOUTS))
def test_p7_the_result_does_not_depend_on_the_pad_id(made, layout):
    samples, _, name = made
    dataset = pack_or_none(samples, **layout)
    if dataset is None:
        return
    size = max(map(len, dataset)) + 3
    ids = (0, tokenizer(name).eos_id, int(samples.tokens[-1]))  # padding, EOS itself, any other
    batches = [collate(list(dataset), pad_to=size, pad_id=id) for id in ids]
    for batch in batches[1:]:
        for column in ("labels", "positions", "visible_until"):
            assert (getattr(batch, column) == getattr(batches[0], column)).all()
        assert batch.num_targets == batches[0].num_targets


@quick
@given(data_sets(), st.sampled_from(LAYOUTS), st.tuples(st.integers(0, 80), st.integers(0, 80)))
def test_p8_the_result_does_not_depend_on_a_limit_that_cuts_nothing(made, layout, extra):
    samples = made[0]
    longest = int(samples.lengths.max())
    found = [pack_or_none(samples, **{**layout, "max_seq_len": longest + more}) for more in extra]
    if found[0] is None:
        return
    assert len({str(sorted((p.sample, y, om) for p, y, om in documents(dataset))) for dataset in found}) == 1


@quick
@given(data_sets(), st.sampled_from(LAYOUTS), st.data())
def test_p9_the_order_of_documents_changes_only_the_layout(made, layout, data):
    samples = made[0]
    order = data.draw(st.permutations(range(len(samples))))
    one, other = pack_or_none(samples, **layout), pack_or_none(samples.select(order), **layout)
    if one is None:
        return
    mine = sorted((p.sample, y, om) for p, y, om in documents(one))
    assert mine == sorted((order[p.sample], y, om) for p, y, om in documents(other))


@quick
@given(
    data_sets(boundary=False), st.sampled_from([{"over_length": "split"}, {"strategy": "split"}]), st.integers(2, 30)
)
def test_p10_fragments_concatenate_to_the_original_labels(made, layout, capacity):
    samples, policy, _ = made
    dataset = pack_or_none(samples, **{**layout, "max_seq_len": capacity})
    if dataset is None:
        return
    found = {}
    for p, y, om in sorted(documents(dataset), key=lambda one: (one[0].sample, one[0].start)):
        labels, weights = found.setdefault(p.sample, ([], []))
        labels += y
        weights += om
    for i, (y, om) in found.items():
        assert (y, om) == alone(samples[i], int(samples.stops[i]), policy)
