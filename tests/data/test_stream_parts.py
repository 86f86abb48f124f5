import json
import tracemalloc
from functools import partial

import pytest

from torchmask.data import (
    PackedStream,
    chat_dataset,
    instruct_dataset,
    mixture_dataset,
    squad_dataset,
    stream_part,
    text_completion_dataset,
    tokenized_dataset,
)
from torchmask.data import hub as hub_module
from torchmask.data.stream_parts import Reader, StreamPart
from torchmask.errors import ConfigError, DataError

ROWS = [{"input": f"q{i}", "output": "a" * (i % 7 + 1)} for i in range(60)]


@pytest.fixture
def tokenizer(char_tokenizer):
    return char_tokenizer()


def tokens_of(part, **options):
    stream = PackedStream([part], **{"max_seq_len": 64, "window": 8, **options})
    return sorted(pack.tokens.tolist() for pack in stream)


def test_a_builder_with_its_source_streams_what_it_would_read_at_once(tokenizer, write):
    source = write("rows.jsonl", ROWS)
    part = stream_part(partial(instruct_dataset, tokenizer, source=source, masking_strategy="train_on_all"), weight=2)
    assert part.weight == 2 and part.name == "rows.jsonl" and part.files[0][0] == "rows.jsonl"
    in_memory = StreamPart(partial(instruct_dataset, tokenizer, masking_strategy="train_on_all"), ROWS)
    assert tokens_of(part) == tokens_of(in_memory)


@pytest.mark.parametrize("kind", ["csv", "parquet", "txt", "json"])
def test_every_kind_of_file_can_be_streamed(tokenizer, tmp_path, write, kind):
    texts = [f"text number {i}" for i in range(30)]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
    elif kind == "json":
        write("rows.json", [{"text": text} for text in texts])
    else:
        path.write_text("".join(f"{line}\n" for line in (["text", *texts] if kind == "csv" else texts)))
    wanted = StreamPart(partial(text_completion_dataset, tokenizer), [{"text": text} for text in texts])
    part = stream_part(partial(text_completion_dataset, tokenizer, source=str(path)))
    assert tokens_of(part) == tokens_of(wanted)


def test_the_options_that_choose_rows_are_those_of_the_source(tokenizer, write):
    source = write("rows.jsonl", ROWS)
    part = stream_part(partial(instruct_dataset, tokenizer, source=source, split="train[5:15]"))
    assert tokens_of(part) == tokens_of(StreamPart(partial(instruct_dataset, tokenizer), ROWS[5:15]))
    text = write("a.json", json.dumps({"data": [{"text": "one"}]}))
    part = stream_part(partial(text_completion_dataset, tokenizer, source=text, field="data"))
    assert len(tokens_of(part)) == 1


def test_nested_questions_are_counted_one_by_one(tokenizer, write):
    questions = [{"id": str(i), "question": f"q{i}?", "answers": [], "is_impossible": True} for i in range(20)]
    source = write("squad.json", json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": questions}]}]}))
    part = stream_part(partial(squad_dataset, tokenizer, source=source, prompt_template="{context}{question}"))
    reader = Reader(part.rows, repeats=False)
    assert [row.number for row in reader.take(3)] == [1, 2, 3]
    assert len(reader.take(100)) == 17 and reader.is_done


def test_a_name_on_the_hub_is_opened_as_a_stream(tokenizer, monkeypatch):
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(source, **options):
            asked.append((source, options))
            return iter(ROWS)

    monkeypatch.setattr(hub_module, "_import_datasets", lambda: Datasets)
    part = stream_part(partial(instruct_dataset, tokenizer, source="someone/rows", name="small"))
    assert asked == []  # nothing is fetched before a row is wanted
    assert len(tokens_of(part)) > 1
    assert asked[0][0] == "someone/rows" and asked[0][1]["streaming"] is True and asked[0][1]["name"] == "small"


class Text(str):
    """A text that counts how many of its kind are alive."""

    alive = most = 0

    def __new__(cls, text):
        cls.alive += 1
        cls.most = max(cls.most, cls.alive)
        return super().__new__(cls, text)

    def __del__(self):
        type(self).alive -= 1


@pytest.mark.parametrize("options", [{}, {"rank": 1, "world_size": 3}])
def test_no_more_rows_are_held_than_a_window_has(tokenizer, options):
    Text.alive = Text.most = 0
    part = StreamPart(
        partial(instruct_dataset, tokenizer),
        lambda: ({"input": "q", "output": Text("a" * (i % 5 + 1))} for i in range(3000)),
    )
    stream = PackedStream([part], max_seq_len=64, window=50, **options)
    state = None
    for number, _ in enumerate(stream):
        state = stream.state_dict() if number == 20 else state
    assert number > 50 and Text.most <= 55
    again = PackedStream([part], max_seq_len=64, window=50, **options)
    again.load_state_dict(state)
    next(again)
    assert Text.most <= 55


def test_memory_stays_bounded_over_a_file_much_larger_than_the_window(tokenizer, tmp_path):
    path = tmp_path / "wide.jsonl"
    with open(path, "w") as file:
        for i in range(3000):
            file.write(json.dumps({"input_ids": [1, i % 50 + 30, 2], "text": "x" * 10_000}) + "\n")
    assert path.stat().st_size > 3e7
    part = stream_part(partial(tokenized_dataset, tokenizer, source=str(path)))
    tracemalloc.start()
    count = sum(1 for _ in PackedStream([part], max_seq_len=64, window=64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 100 and peak < 5e6


def test_a_reader_that_repeats_skips_whole_passes_without_reading_them():
    opened = []

    def rows():
        opened.append(1)
        return iter([{"n": n} for n in range(7)])

    reader = Reader(rows, repeats=True)
    reader.skip(7_000_003)
    assert [row.values["n"] for row in reader.take(3)] == [3, 4, 5]
    assert reader.taken == 7_000_006 and len(opened) == 2


def test_a_source_that_gives_nothing_to_train_on_again_and_again_is_an_error_and_not_a_wait(tokenizer, write):
    builder = partial(instruct_dataset, tokenizer, source=write("rows.jsonl", ROWS), filter_fn={"input": "nothing"})
    stream = PackedStream([stream_part(builder)], max_seq_len=64, window=16, repeat=True)
    with pytest.raises(DataError, match="60 were read and all left out by filter_fn"):
        next(stream)
    with pytest.raises(DataError) as caught:
        _ = stream.preview
    assert caught.value.id == "D05"


def test_the_rules_of_a_mixture_have_one_numbering_in_all_windows_and_ranks(tokenizer, write):
    text = write("text.jsonl", [{"text": f"t{i}"} for i in range(90)])
    chats = [
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "answer"}]} for _ in range(90)
    ]
    parts = [
        stream_part(partial(text_completion_dataset, tokenizer, source=text), weight=19),
        stream_part(partial(chat_dataset, tokenizer, source=write("chat.jsonl", chats)), weight=1),
    ]

    def names_by_token(rank):
        stream = PackedStream(parts, max_seq_len=32, window=5, rank=rank, world_size=2)
        found = set()
        for pack in stream:
            for label, rule in zip(pack.labels.tolist(), pack.rules.tolist()):
                if label >= 0:
                    found.add((label == ord("w") + 20, stream.rule_names[rule]))
        return stream.rule_names, found

    (names, one), (others, two) = names_by_token(0), names_by_token(1)
    assert names == others and names[-1] == "other" and "other" not in {rule for _, rule in one | two}
    assert (True, "strategy") in one | two and (False, "text") in one & two


def test_the_fingerprint_tells_another_file_other_masks_and_another_tokenizer(tokenizer, char_tokenizer, write):
    source, longer = write("rows.jsonl", ROWS), write("more.jsonl", [*ROWS, ROWS[0]])

    def fingerprint(tokenizer=tokenizer, source=source, **options):
        part = stream_part(partial(instruct_dataset, tokenizer, source=source, **options))
        return PackedStream([part], max_seq_len=64).fingerprint

    prints = [
        fingerprint(),
        fingerprint(source=longer),
        fingerprint(masking_strategy="train_on_all"),
        fingerprint(tokenizer=char_tokenizer(bos_id=7)),
    ]
    assert len(set(prints)) == 4 and fingerprint() == prints[0]
    assert fingerprint(on_bad_row="skip") == prints[0]


@pytest.mark.parametrize(("argument", "word"), [({"cache": True}, "cache"), ({"max_rows": 3}, "max_rows")])
def test_arguments_that_need_all_rows_are_refused(tokenizer, write, argument, word):
    with pytest.raises(ConfigError, match=word) as caught:
        stream_part(partial(instruct_dataset, tokenizer, source=write("rows.jsonl", ROWS), **argument))
    assert caught.value.id == "C09"


def test_what_reads_no_source_is_refused_and_a_missing_file_is_found_at_once(tokenizer):
    with pytest.raises(ConfigError, match="reads no source") as caught:
        stream_part(partial(mixture_dataset, tokenizer, datasets=[]))
    assert caught.value.id == "C09"
    with pytest.raises(DataError, match="no such file") as missing:
        stream_part(partial(instruct_dataset, tokenizer, source="./none.jsonl"))
    assert missing.value.id == "D05"
    with pytest.raises(ConfigError, match="weight is 0"):
        stream_part(partial(instruct_dataset, tokenizer, source="./none.jsonl"), weight=0)
