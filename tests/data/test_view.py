import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from torchmask.data import PackedDataset, Samples, SamplesBuilder, write_masks_html

SENTENCEPIECE = {1: "<s>", 2: "</s>", 3: "▁the", 4: "<script>alert('x')</script>", 5: "<0x0A>", 6: "▁▁", 7: "▁Paris"}
BYTE_LEVEL = {1: "<|im_start|>", 3: "Ġcaf", 4: "Ã©", 5: "Ċ", 6: "Ã"}


class Page(HTMLParser):
    """(tag, class, text) of the tokens of each document, and the attributes of their boxes."""

    def __init__(self, text):
        super().__init__()
        self.boxes, self.tokens, self.tags, self._open = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "div" and "data-ids" in dict(attrs):
            self.boxes.append(dict(attrs))
            self.tokens.append([])
        elif tag in "bi" and self.boxes and self._open is None:
            self._open = [tag, dict(attrs).get("class", ""), ""]

    def handle_data(self, data):
        if self._open:
            self._open[2] += data

    def handle_endtag(self, tag):
        if self._open and tag == self._open[0]:
            if self.get_starttag_text() and len(self.tokens[-1]) < len(self.boxes[-1]["data-ids"].split()):
                self.tokens[-1].append(tuple(self._open))
            self._open = None


def page(tmp_path, samples, pieces, **options):
    dataset = PackedDataset(samples, **{"max_seq_len": 16, **options})
    write_masks_html(tmp_path / "masks.html", dataset, pieces.__getitem__)
    return (tmp_path / "masks.html").read_text(encoding="utf-8")


@pytest.fixture
def samples():
    builder = SamplesBuilder()
    builder.append([1, 3, 4, 5, 6, 7, 2], [1, 1, 0, 0, 3, 0, 0], [1, 1, 0.1, 1, 1, 0.5, 2], source="a<b>.jsonl", row=3)
    builder.append([1, 3, 7, 2], [1, 1, 0, 1], source="/x/a<b>.jsonl", row=4)
    return builder.finish()


def test_tokens_are_marked_as_trained_context_hidden_and_stop(tmp_path, samples):
    tokens = Page(page(tmp_path, samples, SENTENCEPIECE)).tokens
    assert tokens[0] == [
        ("i", "", "<s>"),
        ("i", "", " the"),
        ("b", "", "<script>alert('x')</script>"),
        ("b", "", "⏎\n"),
        ("i", "h", "␣␣"),
        ("b", "", " Paris"),
        ("b", "e m", "</s>"),
    ]
    assert [kind for kind, *_ in tokens[1]] == ["i", "i", "b", "i"]
    assert tokens[1][3][1] == "e"


def test_what_hovering_shows_is_on_the_page(tmp_path, samples):
    boxes = Page(page(tmp_path, samples, SENTENCEPIECE)).boxes
    assert boxes[0]["data-ids"] == "1 3 4 5 6 7 2" and boxes[0]["data-slot"] == "0"
    assert boxes[0]["data-weights"] == "0 0 0.1 1 0 0.5 2"
    assert boxes[1]["data-slot"] == "7"


def test_nothing_of_the_data_becomes_markup_and_nothing_is_loaded(tmp_path, samples):
    text = page(tmp_path, samples, SENTENCEPIECE)
    tags = Page(text).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert "a&lt;b&gt;.jsonl:3" in text and "/x/" not in text
    assert not re.search(r"""(src|href)=["'](?!data:,)""", text)
    assert "http:" not in text and "https:" not in text
    assert "{{" not in text


def test_the_ledger_is_on_the_page(tmp_path):
    builder = SamplesBuilder()
    for row in range(30):
        builder.append([1, 3, 7, 2], [1] * 4 if row == 7 else [1, 1, 0, 0], source="t.jsonl", row=row)
    text = page(tmp_path, builder.finish(), SENTENCEPIECE)
    assert "dropped: all_masked" in text and "1 document: t.jsonl:7" in text
    assert ">58<" in text and "48.33 %" in text


def test_a_fragment_says_that_its_label_is_in_the_next(tmp_path, samples):
    parsed = Page(page(tmp_path, samples[1:], {**SENTENCEPIECE}, max_seq_len=2, strategy="split"))
    assert parsed.boxes[0]["data-next"] == "7 “Paris”, in the next fragment"
    assert [kind for kind, *_ in parsed.tokens[1]] == ["b", "i"]  # its first token is trained, from the row before


def test_byte_level_pieces_are_read_as_text(tmp_path):
    builder = SamplesBuilder()
    builder.append([1, 3, 4, 5, 6], [1, 0, 0, 0, 0])
    tokens = Page(page(tmp_path, builder.finish(), BYTE_LEVEL)).tokens[0]
    assert [text for *_, text in tokens] == ["<|im_start|>", " caf", "é", "⏎\n", "\\xc3"]


def test_plain_pieces_stay_as_they_are(tmp_path):
    builder = SamplesBuilder()
    builder.append([0, 1, 2, 3], [1, 0, 0, 0])
    tokens = Page(page(tmp_path, builder.finish(), {0: " a", 1: "\n\n", 2: "\x00", 3: ""})).tokens[0]
    assert [text for *_, text in tokens] == [" a", "⏎\n⏎\n", "\\x00", "∅"]


def test_a_large_data_set_gives_a_page_below_one_megabyte_that_says_what_is_left_out(tmp_path):
    n = 200
    samples = Samples.from_samples(SamplesBuilder().finish())
    builder = SamplesBuilder()
    for _ in range(500):
        builder.append(np.arange(n) + 1, np.zeros(n, bool), np.full(n, 0.25, np.float32))
    samples = builder.finish()
    pieces = {i: f"▁piece{i}" for i in range(n + 1)}
    text = page(tmp_path, samples, pieces, max_seq_len=8192)
    assert 500_000 < len(text.encode()) < 1_000_000
    assert "more in this row, not shown" in text


def test_shared_prefixes_are_a_tree_of_stretches(tmp_path):
    builder = SamplesBuilder()
    for answer in (7, 3):
        builder.append([1, *[4] * 20, answer, 7, 2], [1] * 22 + [0, 0], source="t.jsonl", row=answer)
    parsed = Page(page(tmp_path, builder.finish(), SENTENCEPIECE, share_prefixes=True, max_seq_len=64))
    assert [box["data-slot"] for box in parsed.boxes] == ["0", "21", "24"]
    assert [box["data-position"] for box in parsed.boxes] == ["0", "21", "21"]
    styles = [attrs["style"] for tag, attrs in parsed.tags if attrs.get("class", "").startswith("doc")]
    assert [style.split("--depth:")[1] for style in styles] == ["0", "1", "1"]
    text = (tmp_path / "masks.html").read_text(encoding="utf-8")
    assert text.count("shared by 2 documents") == 1
    assert "Shared prefixes save 21 slots" in text


def test_rules_and_roles_lie_on_the_page_as_runs(tmp_path):
    builder = SamplesBuilder()
    builder.append([1, 3, 7, 2], [1, 1, 0, 0], rules=[0, 1, 1, 2], rule_names=["bos", "a<b>", "eos"])
    dataset = PackedDataset(builder.finish(), max_seq_len=8)
    roles = ["", "user", "assistant", "assistant"]
    write_masks_html(tmp_path / "m.html", dataset, SENTENCEPIECE.__getitem__, roles_of=lambda sample: roles)
    [box] = Page((tmp_path / "m.html").read_text(encoding="utf-8")).boxes
    assert json.loads(box["data-rules"]) == [["bos", 1], ["a<b>", 2], ["eos", 1]]
    assert json.loads(box["data-roles"]) == [["", 1], ["user", 1], ["assistant", 2]]


def test_what_a_slot_sees_lies_on_the_page(tmp_path, samples):
    page(tmp_path, samples, SENTENCEPIECE, prefix="bidirectional")
    [row] = [a for tag, a in Page((tmp_path / "masks.html").read_text(encoding="utf-8")).tags if "data-until" in a]
    pack = PackedDataset(samples, max_seq_len=16, prefix="bidirectional")[0]
    for key, column in (("data-until", pack.visible_until), ("data-from", pack.visible_from)):
        assert [value for value, count in json.loads(row[key]) for _ in range(count)] == column.tolist()


def test_chosen_rows_are_shown_and_named(tmp_path):
    builder = SamplesBuilder()
    for row in range(6):
        builder.append([1, 3, 7, 2], [1, 1, 0, 0], source="t.jsonl", row=row)
    dataset = PackedDataset(builder.finish(), max_seq_len=4)
    write_masks_html(tmp_path / "m.html", dataset, SENTENCEPIECE.__getitem__, rows=[4, 2], config="tiny/qa")
    text = (tmp_path / "m.html").read_text(encoding="utf-8")
    assert "Rows 4, 2 of 6" in text and "from tiny/qa" in text
    assert text.index("t.jsonl:4") < text.index("t.jsonl:2")


def test_rows_that_teach_nothing_are_listed(tmp_path):
    builder = SamplesBuilder()
    builder.append([1, 3, 7, 2], [1, 1, 0, 0], source="t.jsonl", row=1)
    builder.append([1, 3, 7, 2], [1] * 4, source="t.jsonl", row=2)
    builder.skip("empty_answer", "t.jsonl:3")
    text = page(tmp_path, builder.finish(), SENTENCEPIECE)
    assert "Rows that teach nothing" in text
    assert re.search(r"empty_answer<small>1 row: t.jsonl:3<", text) and re.search(r"all_masked<small>1 row", text)


def test_a_virtual_stop_and_a_boundary_are_named_for_what_they_are(tmp_path):
    boxes = Page(page(tmp_path, builder_of(2), SENTENCEPIECE, eos="virtual")).boxes
    assert boxes[0]["data-next"] == "2 “</s>”, the stop token, which takes no slot"
    boxes = Page(page(tmp_path, builder_of(2), SENTENCEPIECE, eos="boundary")).boxes
    assert boxes[0]["data-next"] == "1 “<s>”, the next document's first"
    assert "data-next" not in boxes[1]


def builder_of(count):
    builder = SamplesBuilder()
    for _ in range(count):
        builder.append([1, 3, 7, 2], [1, 1, 0, 0])
    return builder.finish()
