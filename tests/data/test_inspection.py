"""What a row is said to hold is what its documents hold."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchmask.data import PackedDataset, Sample, Samples, SamplesBuilder
from torchmask.data.bracketed import bracketed
from torchmask.data.inspection import Document, chosen_documents, dead_rows, look_at, segments_of, slots_of
from torchmask.data.probe import WatchingTokenizer
from torchmask.data.readable import Readable
from torchmask.messages import Message, Rendered


@st.composite
def documents(draw):
    """A few documents, some of which begin alike, with weights and hidden tokens."""
    prefix = draw(st.lists(st.integers(3, 9), min_size=0, max_size=24))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        shared = prefix[: draw(st.integers(0, len(prefix)))]
        own = draw(st.lists(st.integers(3, 9), min_size=1, max_size=6))
        hidden = [draw(st.booleans()) for _ in own]
        mask = [1] * (1 + len(shared)) + [2 * h for h in hidden] + [0]
        weights = [1.0] * (1 + len(shared)) + [draw(st.sampled_from([0.25, 1.0, 2.0])) for _ in own] + [1.0]
        rows.append(Sample([1, *shared, *own, 2], mask, weights))
    return rows


@settings(deadline=None, max_examples=60)
@given(documents(), st.booleans())
def test_the_segments_of_all_rows_hold_every_document_with_its_weights(samples, share):
    packs = PackedDataset(samples, max_seq_len=40, share_prefixes=share)
    found = {}
    for i, pack in enumerate(packs):
        placements = packs.documents(i)
        segments = segments_of(placements)
        assert [s.slot for s in segments] == np.cumsum([0] + [s.stop - s.start for s in segments])[:-1].tolist()
        for k, placement in enumerate(placements):
            path = [s for s in segments if s.document == k]
            above = placement
            while above.parent >= 0:
                start, above = above.start, placements[above.parent]
                mine = [s for s in segments if placements[s.document] is above and s.stop <= start]
                path = mine + path
            parts = [slots_of(packs, pack, placements[s.document], s) for s in path]
            found[placement.sample] = [
                np.concatenate([getattr(p, n) for p in parts]) for n in ("tokens", "weights", "hidden")
            ]
    for i in range(len(samples)):
        document = look_at(packs.samples, i)
        for column, name in zip(found[i], ("tokens", "weights", "hidden")):
            np.testing.assert_array_equal(column, getattr(document, name))


@settings(deadline=None, max_examples=60)
@given(documents())
def test_a_stretch_belongs_to_the_documents_behind_it(samples):
    packs = PackedDataset(samples, max_seq_len=60, share_prefixes=True)
    for i in range(len(packs)):
        placements = packs.documents(i)
        slots_of_document = [set(packs.path(i, k).tolist()) for k in range(len(placements))]
        for segment in segments_of(placements):
            mine = set(range(segment.slot, segment.slot + segment.stop - segment.start))
            holders = [k for k, slots in enumerate(slots_of_document) if slots & mine]
            assert len(holders) == segment.num_documents
            assert all(mine <= slots_of_document[k] for k in holders)


def test_a_later_fragment_begins_with_a_target_of_the_row_before():
    packs = PackedDataset([Sample([1, 5, 6, 7, 8, 2], [0] * 6)], max_seq_len=3, strategy="split")
    whole = [slots_of(packs, packs[i], p, s) for i in range(2) for p in packs.documents(i) for s in segments_of([p])]
    assert np.concatenate([part.weights for part in whole]).tolist() == [0, 1, 1, 1, 1, 1]
    assert [part.next_label for part in whole] == [7, -1]
    assert [part.stop for part in whole] == [-1, 2]


def test_rules_are_given_by_name():
    builder = SamplesBuilder()
    builder.append([1, 5, 2], [1, 0, 0], rules=[0, 1, 2], rule_names=["bos", "strategy", "eos"])
    samples = builder.finish()
    assert look_at(samples, 0).rules == ["bos", "strategy", "eos"]
    packs = PackedDataset(samples, max_seq_len=4)
    [placement] = packs.documents(0)
    assert slots_of(packs, packs[0], placement, segments_of([placement])[0]).rules == ["bos", "strategy", "eos"]


def test_dead_rows_come_from_the_source_and_from_the_packs():
    builder = SamplesBuilder()
    builder.append([1, 5, 2], [1, 0, 0], source="t.jsonl", row=1)
    builder.append([1, 5, 2], [1, 1, 1], source="t.jsonl", row=2)
    builder.skip("empty_answer", "t.jsonl:3")
    report = PackedDataset(builder.finish(), max_seq_len=4).report
    assert dead_rows(report) == [("empty_answer", 1, ["t.jsonl:3"]), ("all_masked", 1, ["t.jsonl:2"])]


@pytest.mark.parametrize(("row", "chosen"), [("4", [0, 2]), ("a.jsonl:4", [0]), ("x/a.jsonl:4", [0]), ("jsonl:4", [])])
def test_documents_are_chosen_by_row(row, chosen):
    builder = SamplesBuilder()
    for source, number in (("/x/a.jsonl", 4), ("/x/a.jsonl", 5), ("/x/b.jsonl", 4)):
        builder.append([1, 2], [1, 0], source=source, row=number)
    assert list(chosen_documents(builder.finish(), [row], None)) == chosen


def test_bytes_of_one_character_are_joined_in_text_and_shown_apart():
    read = Readable([4, 5, 6], {4: "Ġcaf", 5: "Ã", 6: "©"}.__getitem__)
    assert read.text([4, 5, 6]) == " café"
    assert [read.visible(i) for i in (4, 5, 6)] == [" caf", "\\xc3", "\\xa9"]


def test_a_control_token_keeps_its_spelling():
    pieces = {3: "▁the", 4: "▁▁<s>"}.__getitem__
    assert Readable([3, 4], pieces, {4: "▁<s>"}).visible(4) == "▁<s>"


def read_back(text):
    """The characters of bracketed text with what each is marked as: (character, weight, hidden)."""
    found, weight, hidden, i = [], 0.0, False, 0
    while i < len(text):
        slashes = re.match(r"\\*", text[i:])[0]
        sign = text[i + len(slashes) : i + len(slashes) + 2]
        if slashes and (sign[:1] in "[]~" or i + len(slashes) == len(text)):
            odd = len(slashes) % 2
            found += [("\\", weight, hidden)] * (len(slashes) // 2)
            i += len(slashes)
            if odd:
                found.append((text[i], weight, hidden))
                i += 1
        elif sign == "[[":
            value = re.match(r"(-?[\d.][\d.e+-]*):", text[i + 2 :])
            weight = float(value[1]) if value else 1.0
            i += 2 + (value.end() if value else 0)
        elif sign == "]]":
            weight, i = 0.0, i + 2
        elif sign == "~~":
            hidden, i = not hidden, i + 2
        else:
            found.append((text[i], weight, hidden))
            i += 1
    return found


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.sampled_from("[]~\\a:0."), st.sampled_from([0.0, 1.0, 0.5]), st.booleans()), max_size=14))
def test_bracketed_text_can_be_read_back_whatever_the_data_holds(characters):
    tokens = np.array([ord(character) for character, *_ in characters], np.int32)
    mask = np.array([2 * hidden for *_, hidden in characters], np.uint8)
    weights = np.array([weight for _, weight, _ in characters], np.float32)
    read = Readable(tokens.tolist(), chr)
    assert read_back(bracketed(Document("a:1", tokens, mask, weights, None, -1), read)) == characters


def test_brackets_follow_weights_and_hidden_tokens():
    mask = np.array([1, 0, 2, 0, 0], np.uint8)
    document = Document("a:1", np.array([3, 3, 4, 3, 4]), mask, np.array([0, 1, 1, -0.5, -0.5], np.float32), None, -1)
    read = Readable([3, 4], {3: "a", 4: "b"}.__getitem__)
    assert bracketed(document, read) == "a[[a]][[~~b~~]][[-0.5:ab]]"


class Spelling:
    """A tokenizer that writes one token a message."""

    stop_ids = (9,)

    def write(self, messages):
        raise AssertionError("conversations must come one by one")

    def render(self, messages, tools=None, add_generation_prompt=False):
        count = len(messages)
        return Rendered(np.arange(10, 10 + count, dtype=np.int32), np.ones(count, np.uint8), np.arange(count))


def test_a_watching_tokenizer_knows_the_roles_of_what_it_has_seen():
    watching = WatchingTokenizer(Spelling())
    messages = [Message("system", "a"), Message("user", "b"), Message("assistant", "c")]
    watching.render(messages)
    watching.render(messages[:2], add_generation_prompt=True)
    assert watching.stop_ids == (9,) and not hasattr(watching, "write")
    assert watching.roles_of(np.array([10, 11, 12])) == ["system", "user", "assistant"]
    assert watching.roles_of(np.array([10, 11, 12, 2])) == ["system", "user", "assistant", "assistant"]
    assert watching.roles_of(np.array([10, 11])) is None and len(watching.conversations) == 1


def test_bare_samples_have_no_rules():
    assert look_at(Samples.from_samples([Sample([1, 2], [1, 0])]), 0).rules is None
