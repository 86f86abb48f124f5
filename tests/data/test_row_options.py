"""What a row may be besides isolated documents: one text, prefix-LM, other normalisations, other rows each epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.data import PackedDataset, Sample, SamplesBuilder, collate, filler
from torchmask.errors import ConfigError
from torchmask.messages import MaskFlag

IGN = -100


def trained(*tokens):
    return Sample(list(tokens), [0] * len(tokens))


def answered(prompt, answer, **options):
    return Sample([*prompt, *answer], [1] * len(prompt) + [0] * len(answer), **options)


def pack(samples, **options):
    return PackedDataset(samples, **{"max_seq_len": 16, **options})


# attention, positions, prefix


def test_a_causal_row_is_one_text():
    row = pack([trained(1, 5, 2), trained(1, 6)], attention="causal", positions="continue")[0]
    assert row.visible_until.tolist() == [5] * 5
    assert row.positions.tolist() == [0, 1, 2, 3, 4]
    assert row.labels.tolist() == [5, 2, IGN, 6, IGN]


def test_hidden_tokens_stay_hidden_in_a_causal_row():
    row = pack([Sample([1, 5, 2], [0, MaskFlag.ATTENTION, 0]), trained(1, 6)], attention="causal")[0]
    assert row.visible_until.tolist() == [5, 2, 5, 5, 5]
    assert row.positions.tolist() == [0, 1, 2, 0, 1]


def test_a_bidirectional_prompt_is_seen_from_its_first_slot():
    samples = [answered([1, 5, 6], [7, 2]), answered([1, 8], [9, 2])]
    row = pack(samples, prefix="bidirectional")[0]
    assert row.visible_from.tolist() == [0, 0, 0, 3, 4, 5, 5, 7, 8]
    assert row.visible_until.tolist() == [5] * 5 + [9] * 4
    assert row.visible_from.dtype == np.int32
    assert pack(samples)[0].visible_from is None


def test_a_hidden_token_of_a_bidirectional_prompt_sees_and_is_seen_by_nobody_else():
    sample = Sample([1, 5, 6, 7, 2], [1, 1 | MaskFlag.ATTENTION, 1, 0, 0])
    row = pack([sample], prefix="bidirectional")[0]
    assert row.visible_from.tolist() == [0, 1, 0, 3, 4]
    assert row.visible_until.tolist() == [5, 2, 5, 5, 5]


@pytest.mark.parametrize("options", [{"over_length": "split"}, {"strategy": "split"}])
def test_the_prompt_of_a_split_document_ends_where_the_documents_does(options):
    sample = Sample([1, 5, 6, 7, 8, 9, 3, 4, 2], [1, 1, 1, 1, 0, 0, 1, 1, 0])
    dataset = pack([sample], max_seq_len=3, prefix="bidirectional", **options)
    assert [p.visible_from.tolist() for p in dataset] == [[0, 0, 0], [0, 1, 2], [0, 1, 2]]


def test_the_prompt_of_a_document_cut_on_the_left_is_what_is_left_of_it():
    sample = Sample([1, 5, 6, 7, 8, 9, 2], [1, 1, 0, 1, 1, 0, 0])
    options = {"over_length": "truncate", "truncate_side": "left"}
    row = pack([sample], max_seq_len=5, prefix="bidirectional", **options)[0]
    assert row.tokens.tolist() == [1, 7, 8, 9, 2]
    assert row.visible_from.tolist() == [0, 0, 0, 3, 4]


@given(
    masks=st.lists(st.lists(st.sampled_from([0, 1, 1, 3]), min_size=2, max_size=9), min_size=1, max_size=6),
    capacity=st.integers(2, 20),
    strategy=st.sampled_from(["best_fit", "split"]),
)
def test_no_slot_sees_the_token_that_it_predicts(masks, capacity, strategy):
    samples = [Sample([*range(len(m))], [*m[:-1], 0]) for m in masks]
    dataset = pack(samples, max_seq_len=capacity, prefix="bidirectional", strategy=strategy, over_length="split")
    for row in dataset:
        slots = np.arange(len(row))
        sees = (row.visible_from <= slots[:, None]) & (slots[:, None] < row.visible_until)
        assert sees[slots, slots].all()
        for q in np.flatnonzero(row.labels[:-1] != IGN):
            assert not sees[q, q + 1 :].any()


def test_batches_carry_visible_from_and_padding_sees_itself():
    samples = [answered([1, 5], [2]), answered([1, 5, 6, 7], [2])]
    batch = collate(pack(samples, prefix="bidirectional", strategy="none"))
    assert batch.visible_from.tolist() == [[0, 0, 2, 3, 4], [0, 0, 0, 0, 4]]
    mixed = collate([*pack(samples[:1], prefix="bidirectional"), *pack(samples[1:])])
    assert mixed.visible_from.tolist() == [[0, 0, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert collate(pack(samples)).visible_from is None


# loss normalisation


WEIGHTED = [
    Sample([1, 5, 6, 7, 2], [1, 0, 0, 0, 0], [1, 0.5, 1, 1, 1]),
    Sample([1, 8, 2], [1, 1, 0], [1, 1, 3]),
]


@pytest.mark.parametrize(
    ("kind", "normalizer", "weights"),
    [
        ("tokens", 5, [0.5, 1, 1, 1, 0, 0, 3, 0]),
        ("weights", 6.5, [0.5, 1, 1, 1, 0, 0, 3, 0]),
        ("sequence", 2, [0.125, 0.25, 0.25, 0.25, 0, 0, 3, 0]),
        ("none", 0, [0.5, 1, 1, 1, 0, 0, 3, 0]),
    ],
)
def test_the_loss_is_divided_by_what_was_asked_for(kind, normalizer, weights):
    dataset = pack(WEIGHTED, loss_normalization=kind)
    assert dataset[0].normalizer == normalizer
    assert dataset[0].weights.tolist() == weights
    assert collate([dataset[0], dataset[0], filler()]).normalizer == 2 * normalizer
    assert dataset.report["weights"] == {"before": 6.5, "after": 6.5, "dropped": {}}


def test_the_normalizer_of_a_hand_made_row_is_its_number_of_targets():
    from torchmask.data import Pack

    column = np.array([1, 2, IGN], np.int32)
    assert collate([Pack(column, column, column, column)]).normalizer == 2


@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=8),
    capacity=st.integers(2, 24),
    options=st.sampled_from(
        [
            {},
            {"strategy": "split", "over_length": "split"},
            {"over_length": "split"},
            {"share_prefixes": True, "over_length": "split"},
        ]
    ),
)
def test_the_mean_over_documents_depends_on_no_packing(lengths, capacity, options):
    samples = [Sample([*range(20 * d, 20 * d + n)], [1] * (n // 2) + [0] * (n - n // 2)) for d, n in enumerate(lengths)]
    if not options and min(lengths) > capacity:
        return
    dataset = pack(samples, max_seq_len=capacity, **{"over_length": "drop", **options}, loss_normalization="sequence")
    loss = total = 0.0
    for row in dataset:
        loss += float((row.weights * np.where(row.labels == IGN, 0, row.labels)).sum())  # the nll of a token is its id
        total += row.normalizer
    expected = [
        np.mean([t for t, m in zip(s.tokens.tolist()[1:], s.mask.tolist()[1:]) if not m])
        for s in samples
        if len(s) <= capacity or options
    ]
    assert np.isclose(total, len(expected))
    assert np.isclose(loss, sum(expected))


def test_a_mean_over_documents_has_no_place_for_boundaries():
    with pytest.raises(ConfigError, match="in no document's mean") as error:
        pack([trained(1, 2)], loss_normalization="sequence", eos="boundary")
    assert error.value.id == "C09"


def test_case_30_a_batch_without_targets_is_divided_by_nothing():
    torch = pytest.importorskip("torch")
    batch = collate([filler()])
    logits = torch.zeros(1, 1, 5, requires_grad=True)
    nll = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], ignore_index=IGN, reduction="sum")
    loss = nll / (batch.normalizer or 1.0)
    loss.backward()
    assert loss.item() == 0.0 and loss.requires_grad and (logits.grad == 0).all()


def test_case_31_micro_batches_are_weighted_by_their_targets():
    one, nine = answered([1, 5], [6]), answered([1, 5], range(10, 19))
    batches = [collate(pack([sample])) for sample in (one, nine)]
    total = sum(b.normalizer for b in batches)
    assert [b.normalizer for b in batches] == [1, 9]
    assert (2.0 * 1 + 1.0 * 9) / total == 1.1


# loss of documents and of groups


@given(seed=st.integers(0, 1000), kind=st.sampled_from(["tokens", "sequence"]), tree=st.booleans())
def test_the_loss_of_a_document_is_the_same_in_any_row(seed, kind, tree):
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(6):
        prompt = [1, 10, 11, 12, *rng.integers(20, 23, 2).tolist()]
        answer = rng.integers(30, 99, rng.integers(1, 5)).tolist()
        samples.append(answered(prompt, answer, weights=rng.choice([0.5, 2.0], len(prompt) + len(answer))))
    dataset = pack(samples, max_seq_len=24, share_prefixes=tree, loss_normalization=kind)
    for r in range(len(dataset)):
        row = dataset[r]
        nll = np.where(row.labels == IGN, np.nan, np.sqrt(np.abs(row.labels)))
        for found in dataset.document_losses(r, nll):
            sample = samples[found.sample]
            targets = np.flatnonzero(sample.trained[1:]) + 1
            expected = (np.sqrt(sample.tokens[targets]) * sample.weights[targets]).sum()
            assert np.isclose(found.loss, expected) and found.num_targets == len(targets)


def test_the_loss_of_a_document_has_no_boundary_in_it_and_fragments_add_up():
    dataset = pack([trained(1, 5, 2), trained(1, 6, 2)], eos="boundary")
    losses = dataset.document_losses(0, np.ones(6))
    assert [tuple(d) for d in losses] == [(0, 2.0, 2), (1, 2.0, 2)]
    parts = pack([trained(1, 5, 6, 7, 2)], max_seq_len=2, over_length="split")
    assert sum(d.loss for r in range(3) for d in parts.document_losses(r, np.ones(2))) == 4


def test_rows_say_which_rule_decided_each_label():
    builder = SamplesBuilder()
    names = ("header", "strategy", "eos")
    builder.append([1, 5, 6, 2], [1, 1, 0, 0], rules=[0, 0, 1, 2], rule_names=names)
    builder.append([1, 7, 2], [1, 0, 0], rules=[0, 1, 2], rule_names=names)
    dataset = pack(builder.finish())
    row = dataset[0]
    found = [dataset.rule_names[r] for r, label in zip(row.rules, row.labels) if label != IGN]
    assert found == ["strategy", "eos", "strategy", "eos"]
    assert row.rules.dtype == np.uint8
    batch = collate([row], pad_to=8)
    assert batch.rules[0].tolist() == [*row.rules.tolist(), 0]
    assert collate(pack([trained(1, 2)])).rules is None


def test_the_rule_of_a_label_is_kept_across_a_cut():
    builder = SamplesBuilder()
    builder.append([1, 5, 6, 2], [1, 0, 0, 0], rules=[0, 1, 2, 3], rule_names=("bos", "a", "b", "c"))
    dataset = pack(builder.finish(), max_seq_len=2, over_length="split")
    assert [p.rules.tolist() for p in dataset] == [[1, 2], [3, 0]]


# other rows each epoch

REPACKED = ({}, {"strategy": "first_fit"}, {"strategy": "none"}, {"strategy": "split"}, {"share_prefixes": True},
            {"share_prefixes": True, "max_share": 2}, {"eos": "boundary"}, {"eos": "virtual"})  # fmt: skip


@pytest.mark.parametrize("options", REPACKED, ids=str)
def test_every_epoch_has_other_rows_of_the_same_documents_and_as_many(options):
    rng = np.random.default_rng(0)
    samples = []
    for d in range(60):
        own = range(1000 + 20 * d, 1000 + 20 * d + rng.integers(2, 9))
        samples.append(answered([1, *range(100 * (d % 7), 100 * (d % 7) + 9), own[0]], own[1:]))
    dataset = pack(samples, max_seq_len=48, epoch_repack=True, **options)
    contents = []
    for epoch in range(3):
        rows = dataset.for_epoch(epoch, seed=5)
        assert len(rows) == len(dataset)
        assert rows.row_order(epoch, 5).tolist() == dataset.row_order(epoch, 5).tolist()
        assert rows.row_lengths.tolist() == [len(row) for row in rows]
        assert rows.row_targets.tolist() == [int((row.labels != IGN).sum()) for row in rows]
        labels = [label for row in rows for label in row.labels.tolist() if label >= 1000]
        assert sorted(labels) == sorted(t for s in samples for t in s.tokens[s.trained].tolist())
        contents.append([row.tokens.tolist() for row in rows])
    if options.get("strategy") != "none" and "max_share" not in options:  # whose groups are of few equal sizes
        assert contents[0] != contents[1] != contents[2] != contents[0]
    again = pack(samples, max_seq_len=48, epoch_repack=True, **options).for_epoch(2, seed=5)
    assert [row.tokens.tolist() for row in again] == contents[2]


def test_without_repacking_every_epoch_has_the_same_rows():
    dataset = pack([trained(1, 2), trained(1, 3)])
    assert dataset.for_epoch(3, seed=1) is dataset


@pytest.mark.parametrize("option", [{"strategy": "in_order"}, {"strategy": "split", "trim_tail": True}])
def test_what_contradicts_repacking_is_refused(option):
    with pytest.raises(ConfigError, match="epoch_repack is true while strategy is") as error:
        pack([trained(1, 2)], epoch_repack=True, **option)
    assert error.value.id == "C09"


@pytest.mark.parametrize("key", ["attention", "positions", "prefix", "loss_normalization"])
def test_an_unknown_choice_is_refused(key):
    with pytest.raises(ConfigError, match="one of") as error:
        pack([trained(1, 2)], **{key: "sequenc"})
    assert error.value.id == "C06"


def test_a_bound_on_sharing_without_sharing_is_refused():
    with pytest.raises(ConfigError, match="max_share is 2 while share_prefixes is false") as error:
        pack([Sample([1, 5, 2], [1, 0, 0])], max_seq_len=8, max_share=2)
    assert error.value.id == "C09"
