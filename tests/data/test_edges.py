"""The six edges of EOS in packs (masking.md section 2), over every way to lay out rows."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.data import PackedDataset, Sample, SamplesBuilder, collate
from torchmask.data.eos import EosPolicy
from torchmask.errors import ConfigError, DataError

IGN = -100
A, B = Sample([1, 11, 12, 2], [0] * 4), Sample([1, 21, 2], [0] * 3)
LAYOUTS = ({}, {"strategy": "first_fit"}, {"strategy": "in_order"}, {"strategy": "split"}, {"share_prefixes": True})


def pack(samples, **options):
    return PackedDataset(samples, **{"max_seq_len": 8, **options})


# The table


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("policy", "y"),
    [
        ("target", [11, 12, 2, IGN, 21, 2, IGN, IGN]),
        ("boundary", [11, 12, 2, 1, 21, 2, IGN, IGN]),
        ("none", [11, 12, IGN, IGN, 21, IGN, IGN, IGN]),
    ],
)
def test_the_table_of_presets(layout, policy, y):
    dataset = pack([A, B], eos=policy, **layout)
    batch = collate(dataset, pad_to=8)
    assert batch.tokens.tolist() == [[1, 11, 12, 2, 1, 21, 2, 0]]
    assert batch.labels.tolist() == [y]
    assert dataset.report["trained"] == batch.num_targets == dataset.row_targets.sum() == sum(t != IGN for t in y)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_table_of_presets_virtual(layout):
    dataset = pack([A, B], eos="virtual", **layout)
    assert len(dataset) == 1
    assert dataset[0].tokens.tolist() == [1, 11, 12, 1, 21]
    assert dataset[0].labels.tolist() == [11, 12, 2, 21, 2]
    assert dataset.report["trained"] == 5 and dataset.report["tokens_in"] == 7 and dataset.report["masked"] == 2
    assert dataset.report["eos"]["virtual"] == 2 and dataset.report["eos"]["trained_stops"] == 2


# E1


def test_e1_every_stop_can_be_trained_although_its_document_is_masked_there():
    samples = [Sample([1, 5, 6, 2], [1, 1, 0, 1]), Sample([1, 7, 2], [1, 0, 1], [1, 1, 0])]
    assert [p.labels.tolist() for p in pack(samples, eos="target", strategy="none")] == [
        [IGN, 6, IGN, IGN],
        [7, IGN, IGN],
    ]
    everything = pack(samples, eos={"train_on_eos": "all"}, strategy="none")
    assert [p.labels.tolist() for p in everything] == [[IGN, 6, 2, IGN], [7, 2, IGN]]
    assert everything[1].weights.tolist() == [1, 1, 0]


def test_e1_a_weight_scales_the_stop_on_top_of_its_own():
    weighted = pack([Sample([1, 5, 2], [0, 0, 0], [1, 2, 4])], eos={"weight": 0.5})
    assert weighted[0].weights.tolist() == [2, 2, 0]
    plain = pack([Sample([1, 5, 2], [0, 0, 0])], eos={"weight": 0.5})
    assert plain[0].weights.tolist() == [1, 0.5, 0]
    assert plain.report["weights"]["before"] == 1.5
    silent = pack([Sample([1, 5, 2], [0, 0, 0])], eos={"weight": 0})
    assert silent[0].labels.tolist() == [5, IGN, IGN]


def test_e1_stops_are_known_by_their_place_and_not_by_their_id():
    builder = SamplesBuilder()
    builder.append([1, 2, 5, 2, 9], [0] * 5, stop=3)
    assert pack(builder.finish(), eos="none")[0].labels.tolist() == [2, 5, IGN, 9, IGN]


def test_e1_a_document_without_a_stop_keeps_its_last_token():
    builder = SamplesBuilder()
    builder.append([1, 5, 6], [0] * 3, stop=-1)
    assert pack(builder.finish(), eos="none")[0].labels.tolist() == [5, 6, IGN]


def test_e1_the_samples_are_not_changed():
    pack([A], eos="none")
    assert A.mask.tolist() == [0] * 4


# E2


def test_e2_the_boundary_has_a_weight_of_its_own():
    dataset = pack([A, B], eos={"train_on_eos": "all", "boundary_loss": "train", "boundary_weight": 0.25})
    assert dataset[0].labels.tolist() == [11, 12, 2, 1, 21, 2, IGN]
    assert dataset[0].weights.tolist() == [1, 1, 1, 0.25, 1, 1, 0]
    assert dataset.report["weights"] == {"before": 5.0, "after": 5.25, "dropped": {}, "boundary": 0.25}
    assert dataset.report["eos"]["boundaries"] == 1


def test_e2_a_boundary_of_weight_0_is_ignored():
    dataset = pack([A, B], eos={"train_on_eos": "all", "boundary_loss": "train", "boundary_weight": 0})
    assert dataset[0].labels.tolist() == [11, 12, 2, IGN, 21, 2, IGN]


def test_e2_the_last_document_of_a_row_predicts_nothing_after_itself():
    dataset = pack([A, B], eos="boundary", max_seq_len=4)
    assert [p.labels.tolist() for p in dataset] == [[11, 12, 2, IGN], [21, 2, IGN]]


def test_e2_the_first_token_of_the_next_document_is_learned_although_it_is_masked():
    samples = [A, Sample([7, 8, 2], [1, 1, 0])]
    assert pack(samples, eos="boundary")[0].labels.tolist() == [11, 12, 2, 7, IGN, 2, IGN]


def test_e2_a_cut_document_and_one_without_a_stop_have_no_boundary():
    cut = pack([Sample([1, 5, 6, 7, 2], [0] * 5), B], eos="boundary", max_seq_len=3, over_length="truncate")
    assert [p.labels.tolist() for p in cut] == [[5, 6, IGN], [21, 2, IGN]]
    long = pack([Sample([1, 5, 6, 7, 8, 2], [0] * 6), Sample([1, 2], [0, 0])], eos="boundary", max_seq_len=4,
                over_length="truncate", strategy="in_order")  # fmt: skip
    assert long[0].labels.tolist() == [5, 6, 7, IGN]
    builder = SamplesBuilder()
    builder.append([1, 5], [0, 0], stop=-1)
    builder.append([1, 6, 2], [0, 0, 0])
    assert pack(builder.finish(), eos="boundary")[0].labels.tolist() == [5, IGN, 6, 2, IGN]


def test_e2_in_a_stream_boundaries_are_between_documents_and_not_between_fragments():
    dataset = pack([A, Sample([1, *range(30, 36), 2], [0] * 8)], eos="boundary", strategy="split", max_seq_len=6)
    assert [p.tokens.tolist() for p in dataset] == [[1, 11, 12, 2, 1, 30], [31, 32, 33, 34, 35, 2]]
    assert [p.labels.tolist() for p in dataset] == [[11, 12, 2, 1, 30, 31], [32, 33, 34, 35, 2, IGN]]


def test_e2_in_a_tree_the_next_document_is_the_next_in_depth_first_order():
    prompt = [1, 10, 11, 12]
    samples = [Sample([*prompt, q, 20 + q, 2], [1] * 5 + [0, 0]) for q in (5, 6)]
    dataset = pack(samples, eos="boundary", max_seq_len=16, share_prefixes=True)
    assert dataset[0].tokens.tolist() == [1, 10, 11, 12, 5, 25, 2, 6, 26, 2]
    assert dataset[0].labels.tolist() == [IGN] * 4 + [25, 2, 1] + [26, 2, IGN]


def test_e2_the_boundary_has_a_rule_of_its_own():
    builder = SamplesBuilder()
    for d in (A, B):
        builder.append(d.tokens, d.mask, rules=[0] * (len(d) - 1) + [1], rule_names=("text", "eos"))
    samples = builder.finish()
    dataset = pack(samples, eos={"boundary_loss": "train"})
    assert dataset.rule_names == (*samples.rule_names, "boundary")
    names = [dataset.rule_names[r] for r in dataset[0].rules]
    assert names == ["text", "text", "eos", "boundary", "text", "eos", dataset.rule_names[0]]


# E3, E5, E6 and truncation


@given(pad_id=st.integers(0, 30), policy=st.sampled_from(["target", "boundary", "none", "virtual"]))
def test_e3_padding_is_never_trained(pad_id, policy):
    dataset = pack([A, B], eos=policy)
    batch = collate(dataset, pad_to=12, pad_id=pad_id)
    assert (batch.labels[0, len(dataset[0]) :] == IGN).all()
    assert batch.labels[0, len(dataset[0]) - 1] == (2 if policy == "virtual" else IGN)


def test_e5_a_label_is_kept_across_the_cut_and_a_virtual_stop_after_the_last_one():
    dataset = pack([Sample([1, 11, 12, 13, 14, 2], [0] * 6)], eos="virtual", max_seq_len=3, over_length="split")
    assert [p.tokens.tolist() for p in dataset] == [[1, 11, 12], [13, 14]]
    assert [p.labels.tolist() for p in dataset] == [[11, 12, 13], [14, 2]]


CASE_5 = Sample([1, 10, 11, 20, 21, 22, 23, 2], [1, 1, 1, 0, 0, 0, 0, 0])


def truncated(sample, **eos):
    return pack([sample], max_seq_len=6, over_length="truncate", eos=eos)


def test_e6_a_cut_document_can_be_given_a_stop_in_place_of_its_last_token():
    dataset = truncated(CASE_5, on_truncate="terminate")
    assert dataset[0].tokens.tolist() == [1, 10, 11, 20, 21, 2]
    assert dataset[0].labels.tolist() == [IGN, IGN, 20, 21, 2, IGN]
    assert dataset.report["eos"] == {
        "documents": 1, "trained_stops": 1, "masked_stops": 0, "without_stop": 0, "cut": 0, "terminated": 1
    }  # fmt: skip


def test_case_6_a_stop_in_place_of_a_masked_token_is_not_trained():
    sample = Sample([1, 10, 20, 2, 11, 12, 13, 21, 2], [1, 1, 0, 0, 1, 1, 1, 0, 0])
    dataset = truncated(sample, on_truncate="terminate")
    assert dataset[0].tokens.tolist() == [1, 10, 20, 2, 11, 2]
    assert dataset[0].labels.tolist() == [IGN, 20, 2, IGN, IGN, IGN]
    assert dataset.report["eos"]["trained_stops"] == 0 and dataset.report["eos"]["cut"] == 1


def test_a_stop_put_in_place_is_not_trained_where_stops_are_not():
    dataset = truncated(CASE_5, on_truncate="terminate", train_on_eos="none")
    assert dataset[0].labels.tolist() == [IGN, IGN, 20, 21, IGN, IGN]
    assert dataset.report["trained"] == 2 == dataset.row_targets.sum()


def test_a_document_without_a_stop_is_cut_and_not_terminated():
    builder = SamplesBuilder()
    builder.append([1, 5, 6, 7], [0] * 4, stop=-1)
    dataset = pack(builder.finish(), max_seq_len=3, over_length="truncate", eos={"on_truncate": "terminate"})
    assert dataset[0].tokens.tolist() == [1, 5, 6]


def test_cut_documents_can_be_dropped_instead():
    dataset = pack([CASE_5, B], max_seq_len=6, over_length="truncate", eos={"on_truncate": "drop"})
    assert dataset[0].tokens.tolist() == [1, 21, 2]
    assert dataset.report["dropped_documents"]["over_length"]["count"] == 1


def test_a_virtual_stop_that_is_cut_off_is_no_label():
    dataset = pack([CASE_5], max_seq_len=6, over_length="truncate", eos="virtual")
    assert dataset[0].tokens.tolist() == [1, 10, 11, 20, 21, 22]
    assert dataset[0].labels.tolist() == [IGN, IGN, 20, 21, 22, IGN]
    fits = pack([CASE_5], max_seq_len=7, eos="virtual")
    assert fits[0].labels.tolist() == [IGN, IGN, 20, 21, 22, 23, 2]


def test_a_virtual_stop_takes_what_follows_it_along():
    builder = SamplesBuilder()
    builder.append([1, 5, 6, 2, 13], [1, 1, 0, 0, 1], stop=3)
    dataset = pack(builder.finish(), eos="virtual")
    assert dataset[0].tokens.tolist() == [1, 5, 6] and dataset[0].labels.tolist() == [IGN, 6, 2]
    assert dataset.report["dropped"] == {"trimmed": 1}


def test_a_virtual_stop_that_is_not_trained_is_trimmed_with_the_tail():
    dataset = pack([Sample([1, 5, 6, 2], [1, 0, 1, 1])], eos="virtual", trim_tail=True)
    assert dataset[0].tokens.tolist() == [1, 5]
    assert dataset.report["dropped"] == {"trimmed": 2}


def test_a_policy_that_the_tokenised_rows_do_not_have_is_refused():
    builder = SamplesBuilder()
    builder.append([1, 5, 2], [0, 0, 0], rules=[0, 0, 1], rule_names=("text", "eos"))
    samples = builder.finish()
    with pytest.raises(ConfigError, match="another EOS policy than the packs ask for: train_on_eos none") as error:
        pack(samples, eos="none")
    assert error.value.id == "C09"
    assert pack(samples, eos={"on_truncate": "drop"})[0].labels.tolist() == [5, 2, IGN]


def test_fields_of_a_policy_go_on_top_of_the_one_the_samples_were_made_with():
    builder = SamplesBuilder()
    builder.append([1, 5, 2], [0, 0, 1], rules=[0, 0, 1], rule_names=("text", "eos"))
    samples = replace(builder.finish(), eos=EosPolicy.preset("none"))
    dataset = pack(samples, eos={"append": "virtual"})
    assert (dataset.eos.train_on_eos, dataset.eos.append) == ("none", "virtual")
    assert dataset[0].tokens.tolist() == [1, 5] and dataset[0].labels.tolist() == [5, IGN]


# Properties over all policies and layouts


@st.composite
def stopped(draw):
    """Documents that may share a prompt and have a stop; their own tokens are unique, so that labels say whose."""
    builder, count = SamplesBuilder(), draw(st.integers(1, 9))
    documents = []
    for d in range(count):
        shared = list(range(draw(st.integers(1, 5))))
        own = list(range(100 * d + 100, 100 * d + 100 + draw(st.integers(1, 8))))
        mask = [1] * len(shared) + draw(st.lists(st.sampled_from([0, 0, 1]), min_size=len(own), max_size=len(own)))
        stop = draw(st.sampled_from([len(mask) - 1, len(mask) - 1, -1]))
        builder.append([*shared, *own], mask, stop=stop)
        documents.append(([*shared, *own], mask, stop))
    return builder.finish(), documents


policies = st.builds(
    EosPolicy,
    append=st.just("auto"),
    train_on_eos=st.sampled_from(["turn", "all"]),
    boundary_loss=st.sampled_from(["ignore", "train"]),
    boundary_weight=st.sampled_from([1.0, 0.5]),
    on_truncate=st.sampled_from(["keep", "terminate", "drop"]),
) | st.builds(
    EosPolicy,
    append=st.sampled_from(["auto", "virtual"]),
    train_on_eos=st.sampled_from(["turn", "all", "none"]),
    on_truncate=st.sampled_from(["keep", "terminate", "drop"]),
)
rows = st.fixed_dictionaries(
    {
        "max_seq_len": st.integers(1, 20),
        "over_length": st.sampled_from(["truncate", "split", "drop"]),
        "truncate_side": st.sampled_from(["right", "left"]),
        "no_targets": st.sampled_from(["drop", "keep"]),
        "trim_tail": st.booleans(),
        "loss_normalization": st.sampled_from(["tokens", "weights"]),
    }
)


def packed_or_none(samples, **options):
    try:
        return PackedDataset(samples, **{"max_truncated_away": 1.0, **options})
    except DataError as error:
        assert error.id in ("D09", "D11")
        return None


@given(case=stopped(), policy=policies, layout=st.sampled_from(LAYOUTS), options=rows)
def test_p1_weights_and_counts_are_those_in_the_rows_for_every_policy(case, policy, layout, options):
    dataset = packed_or_none(case[0], eos=policy, **layout, **options)
    if dataset is None:
        return
    report = dataset.report
    weights = [np.where(p.labels == IGN, 0, 1) if p.weights is None else p.weights for p in dataset]
    assert report["trained"] == dataset.row_targets.sum() == sum(int((p.labels != IGN).sum()) for p in dataset)
    assert np.isclose(report["weights"]["after"], sum(w.sum() for w in weights))
    expected = dataset.row_targets if options["loss_normalization"] == "tokens" else [w.sum() for w in weights]
    assert np.allclose([p.normalizer for p in dataset], expected)
    assert report["slots"] == sum(map(len, dataset)) and max(map(len, dataset)) <= options["max_seq_len"]


@given(case=stopped(), policy=policies, layout=st.sampled_from(LAYOUTS), options=rows)
def test_p5_trained_stop_labels_are_the_documents_whose_stop_is_trained(case, policy, layout, options):
    samples, documents = case
    dataset = packed_or_none(samples, eos=policy, **layout, **options)
    if dataset is None:
        return
    trained = 0
    for r in range(len(dataset)):
        labels = dataset[r].labels
        for d, p in enumerate(dataset.documents(r)):
            tokens, mask, stop = documents[p.sample]
            own = labels[dataset.path(r, d)].tolist()
            if stop < 0:
                continue
            found = own.count(tokens[stop])
            assert found <= 1
            if found and policy.train_on_eos != "all" and not dataset.report["eos"].get("terminated"):
                assert mask[stop] == 0
            assert not (found and policy.train_on_eos == "none")
            trained += found
    assert trained == dataset.report["eos"]["trained_stops"]


@given(case=stopped(), policy=policies, layout=st.sampled_from(LAYOUTS), limits=st.tuples(*[st.integers(16, 60)] * 2))
def test_p8_the_limit_changes_no_label_when_nothing_is_cut(case, policy, layout, limits):
    if layout.get("strategy") == "split":
        return
    found = []
    for limit in limits:
        dataset = packed_or_none(case[0], eos=policy, max_seq_len=limit, **layout)
        documents = []
        for r in range(len(dataset) if dataset else 0):
            for d, p in enumerate(dataset.documents(r)):
                own = dataset[r].labels[dataset.path(r, d)].tolist()
                documents.append((p.sample, own[:-1] if policy.boundary_loss == "train" else own))
        found.append(sorted(documents))
    assert found[0] == found[1]


@given(case=stopped(), layout=st.sampled_from(LAYOUTS[:4]), capacity=st.integers(12, 40))
def test_boundaries_are_the_neighbours_in_rows(case, layout, capacity):
    dataset = packed_or_none(case[0], eos="boundary", max_seq_len=capacity, **layout)
    if dataset is None:
        return
    expected = 0
    for r in range(len(dataset)):
        here = dataset.documents(r)
        for a, b in pairwise(here):
            whole = a.stop == len(case[1][a.sample][0]) and case[1][a.sample][2] >= 0
            expected += whole and b.start == 0
    assert dataset.report["eos"].get("boundaries", 0) == expected
