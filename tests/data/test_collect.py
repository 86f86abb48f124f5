"""Rows are tokenised together or by several processes; what comes out is what each row gives alone."""

import json
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchmask import Message
from torchmask.data import chat_dataset, instruct_dataset, text_completion_dataset
from torchmask.data.bulk import Bulk
from torchmask.data.collect import collect
from torchmask.data.eos import EosPolicy
from torchmask.data.formats import Conversation
from torchmask.data.policy import MaskPolicy
from torchmask.data.rendering import documents_of
from torchmask.data.rows import BadRows, Row, RowError
from torchmask.data.sample import Samples
from torchmask.data.sample_builder import SamplesBuilder
from torchmask.errors import ConfigError, DataError
from torchmask.tokenizers import from_pretrained

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same(one, other):
    for field in fields(Samples):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.tolist() == b.tolist(), field.name
        elif field.name != "report":
            assert a == b, field.name
    for key in ("rows_read", "samples", "skipped", "straddlers", "spans"):
        assert one.report.get(key) == other.report.get(key), key


@pytest.fixture(scope="module")
def tokenizers(assets):
    return {
        "llama3": from_pretrained(assets / "tokenizers/llama3", "llama3"),
        "chatml": from_pretrained(assets / "tokenizers/qwen3", "chatml"),
        "template": from_pretrained(assets / "tokenizers/qwen3"),
    }


words = st.sampled_from(["a", " b", "\n", "  ", "é", "<|eot_id|>", "</s>", "<think>x</think>y", "Hello there", ""])
contents = st.lists(words, max_size=4).map("".join)
sayings = st.sampled_from([{}] * 8 + [{"masked": True}, {"masked": False}, {"weight": 0.5}, {"weight": 0.0},
                           {"visible": False}, {"eot": False}, {"train": True}])  # fmt: skip


@st.composite
def conversations(draw):
    messages = [Message("system", draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        messages.append(Message("user", draw(contents), **draw(sayings)))
        messages.append(Message("assistant", draw(contents), **draw(sayings)))
    if draw(st.integers(0, 5)) == 0:
        messages.append(Message("user", draw(contents)))
    if draw(st.integers(0, 9)) == 0:
        messages = [Message("user", "half a pair \ud83d"), Message("assistant", "a")]
    return messages


policies = st.builds(
    MaskPolicy,
    st.sampled_from(["train_on_assistant", "train_on_last", "train_on_all"]),
    st.sampled_from([None, None, ("user",), ("assistant", "system")]),
    st.booleans(),
    st.sampled_from([(), (), ({"regex": "a", "train": True},)]),
    st.sampled_from(["overlap", "split"]),
    st.builds(
        EosPolicy,
        st.sampled_from(["auto", "always", "never", "virtual"]),
        st.sampled_from(["turn", "all", "last", "none"]),
        st.sampled_from([None, "turn", "all", "last", "none"]),
        st.sampled_from([1.0, 0.5]),
    ),
)


def one_by_one(tokenizer, talks, policy):
    """The rows as `documents_of` makes them, stored one after the other."""
    store = SamplesBuilder(eos=policy.eos)
    for number, talk in enumerate(talks, 1):
        try:
            documents = documents_of(tokenizer, Conversation(talk), policy, chat=True)
        except DataError as error:
            cause = {"D02": "invalid_utf8", "D07": "bad_roles", "D14": "unstable_template"}[error.id]
            store.skip(cause, f"talks:{number}")
            continue
        for rendered, decision in documents:
            store.append(
                rendered.tokens,
                decision.mask,
                decision.weights,
                source="talks",
                row=number,
                stop=decision.stop,
                num_straddlers=rendered.num_straddlers + decision.straddlers,
                rules=decision.rules,
                rule_names=decision.rule_names,
                unmatched=decision.is_unmatched,
            )
            for name, places, tokens, _ in decision.spans:
                store.count_span(name, places=places, tokens=tokens, where=f"talks:{number}")
    return store.finish()


def collected(tokenizer, talks, policy, num_workers=0):
    return collect(
        [Row("talks", number, {"messages": talk}) for number, talk in enumerate(talks, 1)],
        lambda row: Conversation(row.values["messages"]),
        partial(documents_of, tokenizer, policy=policy, chat=True),
        policy=policy,
        bad=BadRows("skip", max_bad_share=1),
        num_workers=num_workers,
    )


@pytest.mark.parametrize("name", ["llama3", "chatml", "template"])
@given(talks=st.lists(conversations(), min_size=1, max_size=8), policy=policies)
@few
def test_rows_tokenised_together_are_what_each_is_alone(tokenizers, name, talks, policy):
    expected = one_by_one(tokenizers[name], talks, policy)
    if not len(expected):
        with pytest.raises(DataError, match="no row is left"):
            collected(tokenizers[name], talks, policy)
        return
    assert_same(collected(tokenizers[name], talks, policy), expected)


def test_plain_rows_do_go_together(tokenizers):
    policy = MaskPolicy()
    bulk = Bulk.of(partial(documents_of, tokenizers["llama3"], policy=policy, chat=True))
    talk = Conversation([Message("user", "q"), Message("assistant", "a")])
    found = bulk.documents([talk, talk], [bulk.write(talk), bulk.write(talk)])
    assert found.places.tolist() == [0, 1]
    hidden = Conversation([Message("user", "q", visible=False), Message("assistant", "a")])
    assert bulk.write(hidden) is None
    assert (
        Bulk.of(partial(documents_of, tokenizers["llama3"], policy=MaskPolicy(train_on_header=True), chat=True)) is None
    )


ROWS = [{"input": f"q{i}", "output": f"a{i}"} for i in range(300)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_changes_nothing(char_tokenizer, tokenizers, write, num_workers):
    source = write("a.jsonl", ROWS)
    for tokenizer in (char_tokenizer(), tokenizers["llama3"]):
        assert_same(
            instruct_dataset(tokenizer, source=source, num_workers=num_workers),
            instruct_dataset(tokenizer, source=source),
        )
    text = write("t.jsonl", [{"text": f"line {i}"} for i in range(100)])
    assert_same(
        text_completion_dataset(char_tokenizer(), source=text, num_workers=num_workers),
        text_completion_dataset(char_tokenizer(), source=text),
    )


def talk(user, assistant="a"):
    return json.dumps({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]})


def with_bad_rows(write):
    lines = [talk(f"q{i}") for i in range(200)]
    lines[70], lines[150] = '{"messages": [', '{"messages": "no list"}'
    lines[90] = json.dumps({"messages": [{"role": "user", "content": "a"}] * 2})
    return write("bad.jsonl", "\n".join(lines))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_rows_are_named_in_order_with_file_and_row(tokenizers, write, num_workers):
    source = with_bad_rows(write)
    with pytest.raises(RowError) as caught:
        chat_dataset(tokenizers["llama3"], source=source, num_workers=num_workers)
    message = str(caught.value)
    assert message.startswith(f"{source}:71: not valid JSON")
    assert message.index("bad.jsonl:71") < message.index("bad.jsonl:151")
    skipped = chat_dataset(tokenizers["llama3"], source=source, on_bad_row="skip", num_workers=num_workers)
    report = skipped.report
    assert report["skipped"]["malformed"]["places"] == [f"{source}:71"]
    assert len(skipped) + sum(entry["count"] for entry in report["skipped"].values()) == 200 == report["rows_read"]
    assert (np.diff(skipped.source_rows) > 0).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_the_tokenizer_finds_bad_has_its_row_too(assets, write, num_workers):
    tokenizer = from_pretrained(assets / "tokenizers/llama2", "llama2")
    lines = [talk("q") for _ in range(60)]
    roles = ("user", "assistant", "tool", "assistant")  # which Llama-2's format does not write
    lines[45] = json.dumps({"messages": [{"role": role, "content": "a"} for role in roles]})
    with pytest.raises(RowError, match=r"a\.jsonl:46: .*llama2"):
        chat_dataset(tokenizer, source=write("a.jsonl", "\n".join(lines)), num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_after_a_bad_row_no_chunk_is_tokenised_any_more(char_tokenizer, write, num_workers):
    tokenizer = char_tokenizer()
    source = write("a.jsonl", "[1]\n" + "\n".join(json.dumps(row) for row in ROWS))
    with pytest.raises(RowError):
        instruct_dataset(tokenizer, source=source, num_workers=num_workers)
    assert tokenizer.num_encoded == 0


def test_filters_and_max_rows_count_alike_with_workers(char_tokenizer, write):
    source = write("a.jsonl", [{**row, "lang": "en" if i % 3 else "fr"} for i, row in enumerate(ROWS)])
    options = {"source": source, "filter_fn": {"lang": "en"}, "max_rows": 77}
    one = instruct_dataset(char_tokenizer(), **options)
    assert_same(instruct_dataset(char_tokenizer(), **options, num_workers=2), one)
    assert len(one) == 77


def test_fewer_than_no_workers_are_refused(char_tokenizer, write):
    with pytest.raises(ConfigError, match="num_workers is -1"):
        instruct_dataset(char_tokenizer(), source=write("a.jsonl", ROWS), num_workers=-1)
