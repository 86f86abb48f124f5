import subprocess
import sys

import numpy as np
import pytest

from torchmask.data.builders import alpaca_dataset, chat_dataset, instruct_dataset, text_completion_dataset
from torchmask.data.rows import RowError
from torchmask.errors import ConfigError, DataError

PAIRS = [{"input": "q1", "output": "a1"}, {"input": "q2", "output": "a2"}]
TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def shown(tokenizer, samples):
    """All tokens and the trained ones of each sample, as text."""
    return [(tokenizer.text(s.tokens), tokenizer.text(s.tokens[s.trained])) for s in samples]


def test_instruct_rows_in_a_chat_format(char_tokenizer, write):
    tokenizer = char_tokenizer()
    samples = instruct_dataset(tokenizer, source=write("a.jsonl", PAIRS))
    assert shown(tokenizer, samples) == [("^#q1|#a1|", "a1|"), ("^#q2|#a2|", "a2|")]
    assert samples.stops.tolist() == [8, 8] and samples.source_rows.tolist() == [1, 2]


def test_instruct_rows_without_a_chat_format_are_raw(char_tokenizer, write):
    tokenizer = char_tokenizer(chat=False)
    samples = instruct_dataset(tokenizer, source=write("a.jsonl", PAIRS))
    assert shown(tokenizer, samples) == [("^q1a1$", "a1$"), ("^q2a2$", "a2$")]
    assert samples.stops.tolist() == [5, 5]


def test_raw_can_be_asked_of_a_tokenizer_with_a_chat_format(char_tokenizer, write):
    tokenizer = char_tokenizer()
    assert shown(tokenizer, instruct_dataset(tokenizer, source=write("a.jsonl", PAIRS), chat=False))[0][0] == "^q1a1$"


def test_chat_cannot_be_asked_of_a_tokenizer_without_it(char_tokenizer, write):
    path = write("a.jsonl", PAIRS)
    with pytest.raises(ConfigError, match="no chat format"):
        instruct_dataset(char_tokenizer(chat=False), source=path, chat=True)
    with pytest.raises(ConfigError, match="needs a tokenizer with a chat format"):
        chat_dataset(char_tokenizer(chat=False), source=path)
    with pytest.raises(ConfigError, match="new_system_prompt needs a chat format"):
        instruct_dataset(char_tokenizer(chat=False), source=path, new_system_prompt="s")


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, "a1|"),
        ({"masking_strategy": "train_on_all"}, "S|q1|a1|"),
        ({"train_on_input": True}, "S|q1|a1|"),
        ({"masking_strategy": "train_on_last"}, "a1|"),
        ({"roles_to_train": ["system", "user"]}, "S|q1|"),
    ],
)
def test_what_is_trained_of_an_instruct_row(char_tokenizer, write, options, trained):
    tokenizer = char_tokenizer()
    samples = instruct_dataset(tokenizer, source=write("a.jsonl", PAIRS), new_system_prompt="S", **options)
    assert shown(tokenizer, samples)[0] == ("^#S|#q1|#a1|", trained)


def test_contradicting_mask_options_are_refused(char_tokenizer, write):
    path = write("a.jsonl", PAIRS)
    with pytest.raises(ConfigError, match="contradicts"):
        instruct_dataset(char_tokenizer(), source=path, train_on_input=True, masking_strategy="train_on_last")
    with pytest.raises(ConfigError, match="masking_strategy is 'all'"):
        instruct_dataset(char_tokenizer(), source=path, masking_strategy="all")


def test_columns_filters_slices_and_max_rows_work_together(char_tokenizer, write):
    tokenizer = char_tokenizer()
    rows = [{"q": f"q{i}", "a": f"a{i}", "lang": "en" if i % 2 else "fr"} for i in range(10)]
    samples = instruct_dataset(
        tokenizer,
        source=write("a.jsonl", rows),
        split="train[2:]",
        column_map={"input": "q", "output": "a"},
        filter_fn={"lang": "en"},
        max_rows=3,
    )
    assert [trained for _, trained in shown(tokenizer, samples)] == ["a3|", "a5|", "a7|"]
    assert samples.source_rows.tolist() == [4, 6, 8]
    assert samples.report["skipped"]["filtered"]["count"] == 3


def test_alpaca_rows_in_a_chat_format_have_the_prompt_as_the_users_message(char_tokenizer, write):
    tokenizer = char_tokenizer()
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La"},
    ]
    samples = alpaca_dataset(tokenizer, source=write("a.json", rows))
    first, second = shown(tokenizer, samples)
    assert first[0].startswith("^#Below is") and first[0].endswith("### Input:\n1 2\n\n### Response:|#3|")
    assert second[0].endswith("### Instruction:\nSing.\n\n### Response:|#La|") and second[1] == "La|"


def test_alpaca_rows_of_a_base_model_are_one_text(assets):
    from torchmask.tokenizers import from_pretrained

    tokenizer = from_pretrained(assets / "tokenizers/stories260k")
    samples = alpaca_dataset(tokenizer, source=str(assets / "data/alpaca_en_demo.json"), split="train[:50]")
    sample = samples[0]
    prompt = tokenizer.decode(sample.tokens[~sample.trained])
    assert prompt.endswith("### Instruction:\nDescribe a process of making crepes.\n\n### Response:")
    assert tokenizer.decode(sample.tokens[sample.trained]).startswith("Making crepes is an easy")
    assert sample.tokens[0] == tokenizer.bos_id and sample.tokens[-1] == tokenizer.eos_id and sample.mask[-1] == 0
    assert len(samples) == 50 and samples.report["straddlers"] == 0


def test_conversations_of_both_styles(char_tokenizer, write):
    tokenizer = char_tokenizer()
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    samples = chat_dataset(tokenizer, source=write("a.jsonl", [TALK, sharegpt]))
    assert shown(tokenizer, samples) == [("^#q|#a|", "a|")] * 2
    renamed = write("b.jsonl", [{"dialog": sharegpt["conversations"]}])
    for style in ("auto", "sharegpt"):
        found = chat_dataset(tokenizer, source=renamed, conversation_column="dialog", conversation_style=style)
        assert shown(tokenizer, found) == [("^#q|#a|", "a|")]
    with pytest.raises(ConfigError, match="conversation_style is 'alpaca'"):
        chat_dataset(tokenizer, source=renamed, conversation_style="alpaca")


def test_weight_0_masks_an_answer(char_tokenizer, write):
    tokenizer = char_tokenizer()
    turns = [*TALK["messages"], {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    turns[1] = {**turns[1], "weight": 0}
    samples = chat_dataset(tokenizer, source=write("a.jsonl", [{"messages": turns}]))
    assert shown(tokenizer, samples)[0][1] == "b|"


def test_text_is_trained_whole_with_one_eos_and_never_its_first_token(char_tokenizer, write):
    tokenizer = char_tokenizer(chat=False)
    samples = text_completion_dataset(tokenizer, source=write("a.txt", "ab\n\ncd\n"))
    assert shown(tokenizer, samples) == [("^ab$", "ab$"), ("^cd$", "cd$")]
    assert samples.source_rows.tolist() == [1, 3]
    bare = text_completion_dataset(tokenizer, source=write("a.txt", "ab\n"), add_bos=False, add_eos=False)
    assert shown(tokenizer, bare) == [("ab", "b")] and bare.stops.tolist() == [-1]


def test_rows_without_text_are_counted_and_left_out(char_tokenizer, write):
    path = write("a.jsonl", [{"body": "ab"}, {"body": " "}, {"body": "c"}])
    samples = text_completion_dataset(char_tokenizer(), source=path, column="body")
    assert len(samples) == 2 and samples.report["skipped"] == {"empty_text": {"count": 1, "places": [f"{path}:2"]}}


BAD = (
    '{"input": "q1", "output": "a1"}\n'
    '{"input": "q2", "output": \n'
    '{"input": "q3", "output": ""}\n'
    '{"input": "q4", "output": null}\n'
    '{"question": "q5"}\n'
    '{"input": "q6", "output": "a6"}\n'
)


def test_all_bad_rows_of_a_file_are_named_before_anything_is_trained(char_tokenizer, write):
    path, tokenizer = write("a.jsonl", BAD), char_tokenizer()
    with pytest.raises(RowError) as caught:
        instruct_dataset(tokenizer, source=path)
    text = str(caught.value)
    assert caught.value.where == f"{path}:2" and "4 of 6 rows are bad" in text
    assert f"{path}:3: [D06]" in text and f"{path}:4: [D08]" in text and f"{path}:5: [D04]" in text
    assert tokenizer.num_encoded == 2  # q1 and a1: nothing was tokenised once the run was lost


def test_skipped_rows_are_counted_by_cause_with_their_places(char_tokenizer, write):
    path, tokenizer = write("a.jsonl", BAD), char_tokenizer()
    samples = instruct_dataset(tokenizer, source=path, on_bad_row="skip")
    assert [trained for _, trained in shown(tokenizer, samples)] == ["a1|", "a6|"]
    assert [samples.where(i) for i in (0, 1)] == [f"{path}:1", f"{path}:6"]
    assert samples.report["rows_read"] == 6 and samples.report["skipped"] == {
        "malformed": {"count": 1, "places": [f"{path}:2"]},
        "empty_answer": {"count": 1, "places": [f"{path}:3"]},
        "wrong_type": {"count": 1, "places": [f"{path}:4"]},
        "missing_column": {"count": 1, "places": [f"{path}:5"]},
    }


def test_a_source_that_gives_no_sample_is_an_error(char_tokenizer, write):
    path = write("a.jsonl", '{"input": "q", "output": ""}\n')
    with pytest.raises(DataError, match=r"no row is left of 1 \(empty_answer 1\)"):
        instruct_dataset(char_tokenizer(), source=path, on_bad_row="skip")
    with pytest.raises(DataError, match=r"no row is left of 2 \(filtered 2\)"):
        instruct_dataset(char_tokenizer(), source=write("b.jsonl", PAIRS), filter_fn=lambda row: False)


def test_what_a_chat_format_cannot_write_is_placed_by_row(assets, write):
    from torchmask.tokenizers import from_pretrained

    turns = [*TALK["messages"], {"role": "assistant", "content": "more"}]
    path = write("a.jsonl", [TALK, {"messages": turns}])
    tokenizer = from_pretrained(assets / "tokenizers/llama2", "llama2")
    with pytest.raises(RowError, match="llama2") as caught:
        chat_dataset(tokenizer, source=path)
    assert (caught.value.id, caught.value.where) == ("D07", f"{path}:2")
    assert len(chat_dataset(tokenizer, source=path, on_bad_row="skip")) == 1


def test_the_real_tool_call_rows_train_answers_and_calls_but_no_results(assets):
    from torchmask.tokenizers import from_pretrained

    tokenizer = from_pretrained(assets / "tokenizers/qwen3")
    samples = chat_dataset(tokenizer, source=str(assets / "data/glaive_toolcall_en_demo_150.json"), split="train[:20]")
    sample = samples[0]
    trained = tokenizer.decode(sample.tokens[sample.trained], skip_special=False)
    hidden = tokenizer.decode(sample.tokens[~sample.trained], skip_special=False)
    assert '<tool_call>\n{"name": "search_recipes"' in trained and "<tool_response>" not in trained
    assert "<tool_response>" in hidden and "I found two recipes" not in hidden


def test_samples_are_the_same_in_every_run(char_tokenizer, write):
    path = write("a.jsonl", PAIRS * 20)
    first, second = (instruct_dataset(char_tokenizer(), source=path) for _ in range(2))
    assert np.array_equal(first.tokens, second.tokens) and np.array_equal(first.mask, second.mask)


def test_importing_and_using_the_builders_needs_neither_torch_nor_datasets(write):
    path = write("a.jsonl", PAIRS)
    code = (
        "import sys, torchmask.data as d\n"
        f"rows = list(d.open_source({path!r}))\n"
        "assert len(rows) == 2 and callable(d.instruct_dataset)\n"
        "print(sorted({'torch', 'datasets', 'pyarrow', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_of_the_package_can_be_imported():
    import torchmask.data

    assert all(getattr(torchmask.data, name) is not None for name in torchmask.data.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        torchmask.data.no_such_name  # noqa: B018
