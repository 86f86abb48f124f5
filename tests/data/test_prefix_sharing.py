"""Shared-prefix packs against references that handle one document at a time with plain lists."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.data import PackedDataset, Sample, Samples
from torchmask.data.segments import smaller_after, smaller_before
from torchmask.errors import ConfigError, DataError
from torchmask.messages import MaskFlag

IGN = -100


def document(prompt, answer, hidden=()):
    mask = [1] * len(prompt) + [0] * len(answer)
    for i in hidden:
        mask[i] |= MaskFlag.ATTENTION
    return Sample([*prompt, *answer], mask)


def rows_of(samples, **options):
    return PackedDataset(samples, **{"max_seq_len": 64, "share_prefixes": True, **options})


def documents_in(dataset):
    """(row, place in the row, sample) of every document."""
    return [(r, d, p.sample) for r in range(len(dataset)) for d, p in enumerate(dataset.documents(r))]


@st.composite
def families(draw, max_documents=14):
    """Documents grown from a few common prompts, so that any two may share any part; some targets and hidden tokens."""
    samples = []
    weighted = draw(st.booleans())
    for d in range(draw(st.integers(1, max_documents))):
        n = draw(st.integers(0, 10))
        if samples and draw(st.booleans()):
            base = draw(st.sampled_from(samples))
            keep = draw(st.integers(0, len(base)))
        else:
            base, keep = Sample([], []), 0
        tokens = [*base.tokens[:keep].tolist(), *draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))]
        mask = [*base.mask[:keep].tolist(), *draw(st.lists(st.sampled_from([1, 1, 1, 0, 3]), min_size=n, max_size=n))]
        if not tokens:
            tokens, mask = [7], [0]
        if draw(st.booleans()):
            tokens, mask = [*tokens, 50 + d], [*mask, 0]
        weights = [draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in tokens] if weighted else None
        samples.append(Sample(tokens, mask, weights))
    return samples


def alone(sample):
    """(tokens, labels, weights, what each token sees) of a document by itself, by the definition."""
    n = len(sample)
    w = [1.0] * n if sample.weights is None else sample.weights.tolist()
    has = [i + 1 < n and not sample.mask[i + 1] & 1 for i in range(n)]
    labels = [int(sample.tokens[i + 1]) if has[i] else IGN for i in range(n)]
    weights = [w[i + 1] if has[i] else 0.0 for i in range(n)]
    sees = [[k for k in range(q + 1) if k == q or not sample.mask[k] & MaskFlag.ATTENTION] for q in range(n)]
    return sample.tokens.tolist(), labels, weights, sees


@given(samples=families(), capacity=st.integers(10, 40), share=st.sampled_from([None, 1, 2, 3]))
def test_every_document_of_a_tree_is_what_it_is_alone(samples, capacity, share):
    try:
        dataset = rows_of(samples, max_seq_len=capacity, over_length="drop", no_targets="keep", max_share=share)
    except DataError:
        return
    for r, d, i in documents_in(dataset):
        pack, path = dataset[r], dataset.path(r, d)
        tokens, labels, weights, sees = alone(samples[i])
        om = (pack.labels != IGN) * 1.0 if pack.weights is None else pack.weights
        assert pack.tokens[path].tolist() == tokens
        assert pack.positions[path].tolist() == list(range(len(path)))
        assert pack.labels[path].tolist() == labels
        assert om[path].tolist() == weights
        for q, slot in enumerate(path.tolist()):
            seen = [k for k in range(slot + 1) if pack.visible_until[k] > slot]
            assert seen == path[sees[q]].tolist()


@given(samples=families(), capacity=st.integers(10, 40))
def test_the_slots_saved_are_those_of_a_flat_plan_that_are_not_used(samples, capacity):
    try:
        flat, tree = (
            rows_of(samples, max_seq_len=capacity, over_length="drop", share_prefixes=share) for share in (False, True)
        )
    except DataError:
        return
    assert tree.report["slots"] == sum(len(pack) for pack in tree) == tree.row_lengths.sum()
    assert tree.report["slots_without_sharing"] == flat.report["slots"]
    assert tree.report["slots_saved"] == flat.report["slots"] - tree.report["slots"] >= 0
    assert tree.row_targets.sum() == flat.row_targets.sum()
    assert sorted(i for *_, i in documents_in(tree)) == sorted(i for *_, i in documents_in(flat))
    assert all(0 < len(pack) <= capacity for pack in tree)


SYSTEM, CONTEXT_A, CONTEXT_B = [1, 100, 101, 102], [110, 111, 112], [120, 121, 122]


def test_a_tree_has_any_depth():
    samples = [
        document([*SYSTEM, *CONTEXT_A, 5], [6, 2]),
        document([*SYSTEM, *CONTEXT_B, 7], [8, 2]),
        document([*SYSTEM, *CONTEXT_A, 9], [10, 2]),
    ]
    dataset = rows_of(samples)
    assert len(dataset) == 1
    pack = dataset[0]
    assert pack.tokens.tolist() == [*SYSTEM, *CONTEXT_A, 5, 6, 2, 9, 10, 2, *CONTEXT_B, 7, 8, 2]
    assert pack.positions.tolist() == [*range(10), 7, 8, 9, 4, 5, 6, 7, 8, 9]
    assert pack.visible_until.tolist() == [19] * 4 + [13] * 3 + [10] * 3 + [13] * 3 + [19] * 6
    assert pack.labels.tolist() == [IGN] * 7 + [6, 2, IGN] + [10, 2, IGN] + [IGN] * 3 + [8, 2, IGN]
    assert dataset.report["slots_saved"] == 7 + 4
    placed = [(p.sample, p.start, p.stop, p.slot, p.parent) for p in dataset.documents(0)]
    assert placed == [(0, 0, 10, 0, -1), (2, 7, 10, 10, 0), (1, 4, 10, 13, 0)]
    assert dataset.path(0, 2).tolist() == [0, 1, 2, 3, 13, 14, 15, 16, 17, 18]


def test_the_slot_before_the_first_target_is_each_documents_own():
    prompt = [1, 10, 11, 12, 13]
    dataset = rows_of([document(prompt, [6, 2]), document(prompt, [7, 2])])
    assert dataset[0].tokens.tolist() == [1, 10, 11, 12, 13, 6, 2, 13, 7, 2]
    assert dataset[0].labels.tolist() == [IGN] * 4 + [6, 2, IGN] + [7, 2, IGN]


def test_sharing_never_crosses_a_target():
    same = [1, 10, 11, 12, 20, 21, 30, 31, 32]
    mask = [1, 1, 1, 1, 0, 0, 1, 1, 1]
    samples = [Sample([*same, 40, 2], [*mask, 0, 0]), Sample([*same, 41, 2], [*mask, 0, 0])]
    dataset = rows_of(samples)
    assert dataset.report["slots_saved"] == 3
    assert dataset.report["trained"] == 8


def test_a_token_that_only_one_of_them_hides_is_not_shared():
    prompt = [1, 10, 11, 12, 13, 14]
    agree = rows_of([document(prompt, [6, 2], hidden=[2]), document(prompt, [7, 2], hidden=[2])])
    assert agree.report["slots_saved"] == 5
    assert agree[0].visible_until[2] == 3
    differ = rows_of([document(prompt, [6, 2], hidden=[2]), document(prompt, [7, 2])])
    assert differ.report["slots_saved"] == 2
    assert differ.report["trained"] == 4


def test_a_common_first_token_ties_nothing_together():
    samples = [document([1, *range(100 * d, 100 * d + 12)], [6, 2]) for d in range(1, 21)]
    tree, flat = rows_of(samples), rows_of(samples, share_prefixes=False)
    assert tree.report["slots_saved"] == 0
    assert sorted(len(p) for p in tree) == sorted(len(p) for p in flat)


def test_a_group_too_large_for_a_row_repeats_what_it_shares():
    system = [1, *range(100, 119)]
    contexts = [[200 + 10 * c + k for k in range(10)] for c in range(6)]
    samples = [document([*system, *c, 300 + q, 50], [400 + q, 2]) for q in range(4) for c in contexts]
    dataset = rows_of(samples, max_seq_len=72)
    for pack in dataset:
        assert pack.tokens[:20].tolist() == system and (pack.visible_until[:20] == len(pack)).all()
    # 20 common slots leave 52 of a row: two contexts of 10 slots with four questions of 4 each.
    assert [len(pack) for pack in dataset] == [72, 72, 72]


def test_a_group_whose_parts_are_too_large_is_cut_at_every_depth():
    samples = [
        document([*range(1, 21), *range(100 * a, 100 * a + 20), 7000 + b, 50, 51], [60, 2])
        for a in (1, 2)
        for b in range(40)
    ]
    dataset = rows_of(samples, max_seq_len=80)
    assert sorted(i for *_, i in documents_in(dataset)) == list(range(80))
    assert max(map(len, dataset)) <= 80
    # 40 common slots leave 40 of a row: 8 documents of 5 slots.
    assert len(dataset) == 10


def test_a_chain_of_growing_conversations_is_cut_without_recursion():
    turns = np.arange(1, 1600)
    samples = [Sample([*turns[:n].tolist(), 9000 + n, 2], [1] * n + [0, 0]) for n in range(20, 1600, 4)]
    dataset = rows_of(samples, max_seq_len=1700)
    assert sorted(i for *_, i in documents_in(dataset)) == list(range(len(samples)))
    assert max(map(len, dataset)) <= 1700


@pytest.mark.parametrize("share", [1, 2, 3])
def test_max_share_bounds_the_documents_of_one_prefix_in_a_row(share):
    samples = [document([1, *range(100 * c, 100 * c + 30), q], [5, 2]) for c in range(1, 5) for q in range(50, 57)]
    dataset = rows_of(samples, max_seq_len=256, max_share=share)
    for r in range(len(dataset)):
        contexts = [p.sample // 7 for p in dataset.documents(r)]
        assert max(np.bincount(contexts)) <= share
    assert sorted(i for *_, i in documents_in(dataset)) == list(range(28))
    assert dataset.report["slots"] < rows_of(samples, share_prefixes=False).report["slots"] or share == 1


def test_max_share_counts_the_questions_of_a_passage_and_not_those_below_a_system_prompt():
    system = [1, *range(500, 540)]
    samples = [document([*system, *range(100 * c, 100 * c + 30), q], [5, 2]) for c in range(1, 5) for q in range(4)]
    dataset = rows_of(samples, max_seq_len=512, max_share=2)
    assert len(dataset) == 2
    for r in range(2):
        assert np.bincount([p.sample // 4 for p in dataset.documents(r)]).tolist() == [2, 2, 2, 2]


def test_the_plan_is_the_same_for_any_copy_of_the_samples():
    samples = [document([1, *range(50, 60), q], [5, 2]) for q in (3, 1, 2)] * 5
    a, b = rows_of(samples), rows_of(Samples.from_samples(samples))
    assert [p.tokens.tolist() for p in a] == [p.tokens.tolist() for p in b]
    assert a.row_order(0, 7).tolist() == b.row_order(0, 7).tolist()


def test_split_fragments_share_their_first_part_only():
    prompt = list(range(1, 13))
    samples = [document(prompt, [*range(30 + 20 * q, 40 + 20 * q)]) for q in range(2)]
    dataset = rows_of(samples, max_seq_len=16, over_length="split")
    found = {}
    for r in range(len(dataset)):
        for d, p in enumerate(dataset.documents(r)):
            path = dataset.path(r, d)
            found.setdefault(p.sample, []).append((p.stop, dataset[r].labels[path].tolist()))
    for i, sample in enumerate(samples):
        assert [y for _, part in sorted(found[i]) for y in part] == alone(sample)[1]


@pytest.mark.parametrize(
    "option", [{"strategy": "split"}, {"strategy": "none"}, {"strategy": "in_order"}, {"attention": "causal"},
               {"positions": "continue"}, {"prefix": "bidirectional"}]
)  # fmt: skip
def test_what_contradicts_sharing_is_refused(option):
    with pytest.raises(ConfigError, match="share_prefixes is true while") as error:
        rows_of([document([1, 5], [2])], **option)
    assert error.value.id == "C09"


def test_max_share_below_one_is_refused():
    with pytest.raises(ConfigError, match="max_share must be at least 1") as error:
        rows_of([document([1, 5], [2])], max_share=0)
    assert error.value.id == "C13"


@given(values=st.lists(st.integers(0, 5), max_size=40))
def test_neighbours_with_smaller_values_are_found(values):
    values = np.array([0, *values])
    before, after = smaller_before(values), smaller_after(values)
    for k in np.flatnonzero(values).tolist():
        assert before[k] == max(j for j in range(k) if values[j] < values[k])
        assert after[k] == min([j for j in range(k + 1, len(values)) if values[j] < values[k]], default=len(values))


@given(samples=families(), data=st.data())
def test_p9_the_order_of_the_samples_changes_only_the_layout(samples, data):
    order = data.draw(st.permutations(range(len(samples))))
    found = []
    for chosen in (range(len(samples)), order):
        dataset = rows_of([samples[i] for i in chosen], no_targets="keep")
        contents = []
        for r, d, i in documents_in(dataset):
            path = dataset.path(r, d)
            contents.append((chosen[i], dataset[r].tokens[path].tolist(), dataset[r].labels[path].tolist()))
        found.append((dataset.report["slots"], len(dataset), sorted(contents)))
    assert found[0] == found[1]


@given(samples=families(), capacity=st.integers(2, 12), virtual=st.booleans())
def test_p10_fragments_of_trees_concatenate_to_the_original_labels(samples, capacity, virtual):
    policy = "virtual" if virtual else "target"
    try:
        dataset = rows_of(samples, max_seq_len=capacity, over_length="split", no_targets="keep", eos=policy)
    except DataError:
        return
    parts = {}
    for r, d, i in documents_in(dataset):
        path = dataset.path(r, d)
        parts.setdefault(i, []).append((dataset.documents(r)[d].stop, dataset[r].labels[path].tolist()))
    for i, sample in enumerate(samples):
        labels = alone(sample)[1]
        expected = labels[:-1] if virtual and len(sample) > 1 else labels
        assert [y for _, part in sorted(parts[i]) for y in part] == expected
