"""Rules and the EOS policy as columns of a store."""

import numpy as np
import pytest

from torchmask.data import EosPolicy, Sample, Samples, SamplesBuilder
from torchmask.errors import ConfigError


def store(*rows, names=("bos", "strategy"), eos=None):
    """Samples of (tokens, rules or None)."""
    builder = SamplesBuilder(eos=eos)
    for tokens, rules in rows:
        builder.append(tokens, [0] * len(tokens), rules=rules, rule_names=None if rules is None else names)
    return builder.finish()


def named(samples):
    return [samples.rule_names[i] for i in samples.rules]


def test_a_store_without_rules_is_as_it_was():
    samples = store(([1, 2], None))
    assert samples.rules is None and samples.rule_names == () and samples.eos == EosPolicy()
    assert samples.fingerprint == Samples.from_samples([Sample([1, 2], [0, 0])]).fingerprint
    assert samples[0].rules is None


def test_rules_follow_slices_and_selections():
    samples = store(([1, 2], [0, 1]), ([3, 4, 5], [0, 1, 1]), ([6], [1]))
    assert samples[1].rules.tolist() == [0, 1, 1] and samples[1:].rules.tolist() == [0, 1, 1, 1]
    assert samples.select([2, 0]).rules.tolist() == [1, 0, 1]
    assert samples[1:].rule_names == samples.select([0]).rule_names == ("bos", "strategy")


def test_palettes_of_samples_are_merged():
    builder = SamplesBuilder()
    builder.append([1, 2], [0, 0], rules=[0, 1], rule_names=("bos", "a"))
    builder.append([3, 4], [0, 0], rules=[0, 1], rule_names=("b", "bos"))
    assert named(builder.finish()) == ["bos", "a", "b", "bos"]


def test_palettes_of_stores_are_merged_and_rows_without_rules_brought_their_flags():
    one, other = store(([1, 2], [0, 1])), store(([3], [0]), names=("regex", "bos"))
    both = Samples.concatenate([one, store(([9], None)), other])
    assert named(both) == ["bos", "strategy", "data", "regex"]
    assert named(store(([9], None), ([1, 2], [0, 1]))) == ["data", "bos", "strategy"]


def test_fingerprints_tell_rules_names_and_policies_apart():
    prints = [
        store(([1, 2], [0, 1])).fingerprint,
        store(([1, 2], [1, 1])).fingerprint,
        store(([1, 2], [0, 1]), names=("bos", "x")).fingerprint,
        store(([1, 2], [0, 1]), eos=EosPolicy.preset("boundary")).fingerprint,
        store(([1, 2], None)).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


def test_a_token_costs_six_bytes():
    samples = store(([1, 2], [0, 1]))
    assert samples.tokens.itemsize + samples.mask.itemsize + samples.rules.itemsize == 6


@pytest.mark.parametrize(
    ("rules", "text"), [([0], "one length"), ([0, 2], "rule 2 has no name"), ([0, 256], "0 to 255")]
)
def test_rules_that_cannot_be_are_refused(rules, text):
    with pytest.raises(ValueError, match=text):
        SamplesBuilder().append([1, 2], [0, 0], rules=rules, rule_names=("a", "b"))


def test_stores_whose_documents_meet_in_rows_need_one_policy_for_that():
    one, none = store(([1], None)), store(([2], None), eos=EosPolicy.preset("none"))
    assert len(Samples.concatenate([one, none])) == 2  # rows differ, what happens between them does not
    with pytest.raises(ConfigError, match="boundary_loss"):
        Samples.concatenate([one, store(([2], None), eos=EosPolicy.preset("boundary"))])
    with pytest.raises(ConfigError, match=r"eos\.append"):
        Samples.concatenate([one, store(([2], None), eos=EosPolicy.preset("virtual"))])


def test_finds_of_span_rules_are_counted_and_added_up():
    builder = SamplesBuilder()
    builder.count_span("json", places=1, tokens=2, where="a:1")
    builder.count_span("json", places=0, tokens=0, where="a:2")
    builder.count_span("json", places=2, tokens=0, where="a:3")
    part = builder.finish()
    assert part.report["spans"]["json"] == {"rows_matched": 1, "rows_unmatched": 1, "rows_no_token": 1, "rows_many": 1,
                                            "tokens": 2, "places": ["a:2", "a:3"]}  # fmt: skip
    both = Samples.concatenate([part, part]).report["spans"]["json"]
    assert both["rows_matched"] == 2 and both["places"] == ["a:2", "a:3", "a:2", "a:3"]


def test_bare_samples_keep_the_numbers_of_their_rules():
    samples = Samples.from_samples([Sample([1, 2], [0, 0], rules=[3, 0]), Sample([4], [0])])
    assert named(samples) == ["rule 3", "rule 0", "data"] and samples[0].rules.dtype == np.uint8
