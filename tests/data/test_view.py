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
        ("b", "e", "</s>"),
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
    assert parsed.boxes[0]["data-next"] == "7, in the next fragment"
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
