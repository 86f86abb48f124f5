from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchmask.data import PackedDataset, mixture_dataset
from torchmask.data.mixture import interleaved, mixture_size, shuffled_passes
from torchmask.errors import ConfigError

weights = st.lists(st.floats(0.05, 10), min_size=1, max_size=4)


@given(weights=weights, total=st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_every_stretch_holds_the_proportions(weights, total):
    of = interleaved(weights, total)
    shares = np.array(weights) / np.sum(weights)
    given = np.cumsum(of[:, None] == np.arange(len(weights)), axis=0)
    wanted = shares * np.arange(1, total + 1)[:, None]
    assert len(of) == total and (np.abs(given - wanted) <= len(weights)).all()
    assert interleaved(weights, max(total - 7, 0)).tolist() == of[: max(total - 7, 0)].tolist()  # a prefix is a prefix


@given(data=st.data(), weights=weights)
@settings(max_examples=60, deadline=None)
def test_a_mixture_is_as_long_as_its_rule_says(data, weights):
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=len(weights), max_size=len(weights)))

    def given_of(total):
        return np.bincount(interleaved(weights, total), minlength=len(sizes))

    first = mixture_size(sizes, weights, stop="first_exhausted")
    assert (given_of(first) <= sizes).all() and (given_of(first + 1) > sizes).any()
    every = mixture_size(sizes, weights, stop="all_exhausted")
    assert (given_of(every) >= sizes).all() and (given_of(every - 1) < sizes).any()


def test_passes_are_whole_and_each_in_another_order():
    places = shuffled_passes(10, 25, seed=(0, 1)).reshape(-1)
    assert sorted(places[:10].tolist()) == sorted(places[10:20].tolist()) == list(range(10))
    assert places[:10].tolist() != places[10:20].tolist() and len(set(places[20:].tolist())) == 5
    assert shuffled_passes(10, 25, seed=(0, 1)).tolist() == places.tolist()
    assert shuffled_passes(10, 25, seed=(0, 2)).tolist() != places.tolist()


@pytest.fixture
def two(write):
    """Descriptions of a large and a small data set."""
    names = [("a", "instruct_dataset", 90), ("b", "text_completion_dataset", 20)]
    sources = [
        write(f"{name}.jsonl", [{"input": f"{name}{i}", "output": name, "text": f"{name}{i}"} for i in range(size)])
        for name, _, size in names
    ]
    return [{"builder": builder, "source": source} for (_, builder, _), source in zip(names, sources)]


def kinds(tokenizer, samples):
    return ["a" if "a" in tokenizer.text(sample.tokens) else "b" for sample in samples]


def test_documents_come_in_the_proportion_of_the_weights(char_tokenizer, two):
    tokenizer = char_tokenizer(chat=False)
    samples = mixture_dataset(tokenizer, datasets=[{**two[0], "weight": 3}, two[1]])
    counts = Counter(kinds(tokenizer, samples))
    assert counts == {"b": 20, "a": 62} or abs(counts["a"] - 3 * counts["b"]) <= 3
    texts = [tokenizer.text(sample.tokens) for sample in samples]
    assert len(set(texts)) == len(texts)  # first_exhausted: none comes twice
    assert [m["given"] for m in samples.report["mixture"]] == [counts["a"], counts["b"]]
    assert samples.report["samples"] == len(samples)
    first = Counter(kinds(tokenizer, samples[:20]))
    assert abs(first["a"] - 15) <= 1
    assert len({samples.where(i) for i in range(len(samples))}) == len(samples)


def test_until_all_are_exhausted_small_sets_come_again(char_tokenizer, two):
    tokenizer = char_tokenizer(chat=False)
    samples = mixture_dataset(tokenizer, datasets=two, stop="all_exhausted")
    counts = Counter(tokenizer.text(sample.tokens) for sample in samples)
    assert len(counts) == 110 and {n for text, n in counts.items() if "a" in text} == {1}
    assert {n for text, n in counts.items() if "b" in text} <= {4, 5}


def test_the_seed_decides_and_nothing_else(char_tokenizer, two):
    tokenizer = char_tokenizer(chat=False)
    build = lambda seed: mixture_dataset(tokenizer, datasets=two, seed=seed)  # noqa: E731
    assert build(0).fingerprint == build(0).fingerprint != build(1).fingerprint
    packs = PackedDataset(build(0), max_seq_len=32)
    assert packs.report["documents"] == len(build(0))


def test_every_part_can_keep_what_it_made(char_tokenizer, two, tmp_path):
    (tmp_path / "v").write_text("1")

    class Known(char_tokenizer):
        def identity(self):
            return {"files": [tmp_path / "v"]}

    tokenizer = Known(chat=False)
    one = mixture_dataset(tokenizer, datasets=two, cache=str(tmp_path / "cache"))
    before = tokenizer.num_encoded
    assert mixture_dataset(tokenizer, datasets=two, cache=str(tmp_path / "cache")).fingerprint == one.fingerprint
    assert tokenizer.num_encoded == before


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ([], "needs datasets"),
        ([{"builder": "alpaca_datset"}], "did you mean 'alpaca_dataset'"),
        ([{"builder": "mixture_dataset"}], "builder is 'mixture_dataset'"),
        ([{"builder": "alpaca_dataset", "sauce": "x"}], "takes no argument 'sauce'"),
        ([{"builder": "alpaca_dataset", "weight": 0}], "weight is 0"),
    ],
)
def test_mistakes_in_a_mixture_are_named(char_tokenizer, datasets, message):
    with pytest.raises(ConfigError, match=message):
        mixture_dataset(char_tokenizer(), datasets=datasets)
