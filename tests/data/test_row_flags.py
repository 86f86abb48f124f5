"""Rows as other frameworks write them, and what becomes of their flags."""

import numpy as np
import pytest

from torchmask.data.builders import chat_dataset, instruct_dataset
from torchmask.data.chat_formats import chat_format
from torchmask.data.row_flags import segments_format, split_responses
from torchmask.data.rows import Row, RowError
from torchmask.data.text_builders import segments_dataset, text_completion_dataset, tokenized_dataset
from torchmask.errors import ConfigError
from torchmask.messages import MaskFlag


def shown(tokenizer, samples, i=0):
    """The whole text of a sample, and its trained part."""
    sample = samples[i]
    return tokenizer.text(sample.tokens), tokenizer.text(sample.tokens[sample.trained])


def chat(char_tokenizer, write, *turns, **options):
    rows = [{"messages": [{"role": role, "content": content, **more} for role, content, more in turns]}]
    return chat_dataset(char_tokenizer(), source=write("a.jsonl", rows), **options)


# OpenAI


def test_openai_weights_of_messages(char_tokenizer, write):
    samples = chat(char_tokenizer, write, ("user", "q", {}), ("assistant", "a", {"weight": 0}), ("user", "r", {}),
                   ("assistant", "b", {"weight": 1}))  # fmt: skip
    assert shown(char_tokenizer(), samples)[1] == "b|" and samples.weights is None


def test_weights_may_be_any_number(char_tokenizer, write):
    samples = chat(char_tokenizer, write, ("user", "q", {}), ("assistant", "a", {"weight": 0.5}))
    assert samples.weights[-2:].tolist() == [0.5, 0.5]


# Axolotl


def test_axolotl_train_of_messages(char_tokenizer, write):
    samples = chat(char_tokenizer, write, ("user", "q", {"train": True}), ("assistant", "a", {"train": False}))
    assert shown(char_tokenizer(), samples)[1] == "q|"


def test_axolotl_train_detail_ends_with_its_last_character(char_tokenizer, write):
    """The published example: `I'm doing` and `, thank you!` are left out, ` very well` is trained."""
    ranges = [(0, 8, False), (9, 18, True), (19, 30, False)]
    detail = [{"begin_offset": begin, "end_offset": end, "train": train} for begin, end, train in ranges]
    answer = ("assistant", "I'm doing very well, thank you!", {"train_detail": detail})
    samples = chat(char_tokenizer, write, ("user", "q", {}), answer)
    assert shown(char_tokenizer(), samples)[1] == " very well|"


def test_axolotl_content_parts(char_tokenizer, write):
    parts = [{"type": "text", "text": "think ", "weight": 0.5}, {"type": "text", "text": "x", "train": False},
             {"type": "text", "text": "say", "visible": False}]  # fmt: skip
    samples = chat(char_tokenizer, write, ("user", "q", {}), ("assistant", parts, {}))
    assert shown(char_tokenizer(), samples)[1] == "think say|"
    assert samples.weights[-11:].tolist() == [0.5] * 6 + [0] + [1] * 4
    assert (samples.mask[-4:-1] == MaskFlag.ATTENTION).all()


def test_axolotl_segments_are_one_text(char_tokenizer, write):
    rows = [{"segments": [{"label": True, "text": "ab"}, {"label": False, "text": "cd"}, {"label": True, "text": "e"}]}]
    samples = segments_dataset(char_tokenizer(chat=False), source=write("a.jsonl", rows))
    assert shown(char_tokenizer(), samples) == ("^abcde$", "abe$")


def test_segments_that_bring_their_control_tokens_get_no_second_ones(assets, write):
    from torchmask.tokenizers import from_pretrained

    tokenizer = from_pretrained(assets / "tokenizers/llama2")
    rows = [{"segments": [{"label": False, "text": "<s>Hello\n"}, {"label": True, "text": "hi there!</s>"},
                          {"label": False, "text": "bye "}, {"label": True, "text": "farewell</s>"}]}]  # fmt: skip
    path = write("a.jsonl", rows)
    tokens = segments_dataset(tokenizer, source=path).tokens.tolist()
    assert (tokens.count(1), tokens.count(2)) == (1, 2) and tokens[0] == 1 and tokens[-1] == 2
    as_text = segments_dataset(tokenizer, source=path, allow_special=False)[0].tokens.tolist()
    assert (as_text.count(1), as_text.count(2)) == (1, 1)


# TRL


def test_trl_prompt_and_completion_as_messages(char_tokenizer, write):
    rows = [{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                        {"role": "user", "content": "r"}],
             "completion": [{"role": "assistant", "content": "b"}]}]  # fmt: skip
    for build in (instruct_dataset, chat_dataset):
        samples = build(char_tokenizer(), source=write("a.jsonl", rows))
        assert shown(char_tokenizer(), samples) == ("^#q|#a|#r|#b|", "b|")


def test_trl_prompt_and_completion_as_text(char_tokenizer, write):
    samples = instruct_dataset(
        char_tokenizer(), source=write("a.jsonl", [{"prompt": "Q:", "completion": "A"}]), chat=False
    )
    assert shown(char_tokenizer(), samples) == ("^Q:A$", "A$")


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ({}, [5, 6, 2]),
        ({"labels": [-100, -100, 6, 2]}, [6, 2]),
        ({"completion_mask": [0, 0, 1, 1]}, [6, 2]),
        ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 1, 0, 1]}, [5, 2]),
        ({"attention_mask": [1, 1, 1, 0], "labels": [1, 5, 6, -100]}, [5, 6]),
        ({"weights": [1, 0, 0.5, 2]}, [6, 2]),
    ],
)
def test_rows_that_are_tokens_keep_their_flags(char_tokenizer, write, flags, trained):
    path = write("a.jsonl", [{"input_ids": [1, 5, 6, 2], **flags}])
    samples = tokenized_dataset(char_tokenizer(), source=path)
    assert samples.tokens[samples.mask == 0].tolist() == trained
    if "weights" in flags:
        assert samples.weights.tolist() == [0, 0, 0.5, 2]


def test_the_stop_token_of_ready_rows_follows_the_eos_policy(char_tokenizer, write):
    path = write("a.jsonl", [{"input_ids": [1, 5, 2], "labels": [-100, 5, 2]}, {"input_ids": [1, 5], "labels": [1, 5]}])
    none = tokenized_dataset(char_tokenizer(), source=path, eos_policy="none")
    assert none.mask.tolist() == [1, 0, 1, 1, 0] and none.stops.tolist() == [2, -1]
    always = tokenized_dataset(char_tokenizer(), source=path, eos={"append": "always"})
    assert always.tokens.tolist() == [1, 5, 2, 1, 5, 2] and always.mask.tolist() == [1, 0, 0] * 2


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"labels": [1]}, "missing column 'input_ids'"),
        ({"input_ids": [1, 5], "labels": [5, -100]}, "labels are not shifted"),
        ({"input_ids": [1, 5], "completion_mask": [1]}, "1 entries for 2 ids"),
        ({"input_ids": "abc"}, "expected a list of numbers"),
        ({"input_ids": [1, -5]}, "expected ids from 0"),
        ({"input_ids": [1, 5, 6, 99999999999]}, "input_ids holds 99999999999, expected ids from 0 to 2147483647"),
        ({"input_ids": [1, 2**63]}, "expected a list of numbers"),
        ({"input_ids": [1, 2**70]}, "expected a list of numbers"),
        ({"input_ids": [True, False]}, "expected a list of numbers"),
        ({"input_ids": [1, 5], "weights": [1, float("nan")]}, r"weights\[1\] is nan, expected a weight"),
        ({"input_ids": [1, 5], "weights": [float("inf"), 1]}, r"weights\[0\] is inf"),
        ({"input_ids": [1, 5], "weights": [0, 1e40]}, r"weights\[1\] is 1e\+40"),
        ({"input_ids": [[1], [2]]}, "expected a list of numbers"),
    ],
)
def test_ready_rows_that_cannot_be_right_are_refused(char_tokenizer, write, row, text):
    with pytest.raises(RowError, match=text):
        tokenized_dataset(char_tokenizer(), source=write("a.jsonl", [row]))


def test_what_follows_a_response_template_is_trained(char_tokenizer, write):
    path = write("a.jsonl", [{"text": "#Q: a #A: b"}, {"text": "no template"}])
    samples = text_completion_dataset(char_tokenizer(), source=path, response_template="#A:")
    assert shown(char_tokenizer(), samples, 0)[1] == " b$" and shown(char_tokenizer(), samples, 1)[1] == ""
    report = samples.report["spans"]["response_template"]
    assert report["rows_matched"] == report["rows_unmatched"] == 1 and report["places"][0].endswith("a.jsonl:2")


def test_several_turns_end_at_the_instruction_template(char_tokenizer, write):
    text = "#Q: a #A: b #Q: c #A: d"
    options = {"response_template": "#A:", "instruction_template": "#Q:"}
    samples = text_completion_dataset(char_tokenizer(), source=write("a.jsonl", [{"text": text}]), **options)
    assert shown(char_tokenizer(), samples) == (f"^{text}$", " b  d$")


@pytest.mark.parametrize(
    ("text", "instruction", "answers"),
    [
        ("x #A: b", None, [" b"]),
        ("say #A: twice #A: b", None, [" b"]),  # the last, as TRL has it: what a user typed is no answer
        ("#A: b #Q: c", "#Q:", [" b "]),
        ("#Q: c #A: d #A: e", "#Q:", [" d #A: e"]),
        ("nothing", "#Q:", []),
        ("#A:", None, []),
    ],
)
def test_where_answers_begin_and_end(text, instruction, answers):
    found = split_responses(text, "#A:", instruction)
    assert [m.text for m in found if m.role == "assistant"] == answers
    assert "".join(m.text for m in found) == text


def test_templates_are_found_where_their_ids_are_others_in_context(assets, write):
    """Case 8: searching for the template's ids finds nothing here (TRL's known failure with Llama-2)."""
    from torchmask.tokenizers import from_pretrained

    tokenizer = from_pretrained(assets / "tokenizers/llama2")
    text = "### User: Hello\n\n### Assistant: Hi there"
    samples = text_completion_dataset(tokenizer, source=write("a.jsonl", [{"text": text}]),
                                      response_template="### Assistant:")  # fmt: skip
    marker = tokenizer.encode("### Assistant:")
    ids = samples.tokens.tolist()
    assert not any(ids[i : i + len(marker)] == marker for i in range(len(ids)))
    assert tokenizer.decode(samples.tokens[samples.mask == 0]).strip() == "Hi there"


def test_an_instruction_template_alone_is_refused(char_tokenizer, write):
    with pytest.raises(ConfigError, match="needs a response_template"):
        text_completion_dataset(char_tokenizer(), source=write("a.jsonl", [{"text": "a"}]), instruction_template="#Q:")


# LLaMA-Factory

TOOLS = [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
         {"from": "observation", "value": "seven"}, {"from": "gpt", "value": "It is 7"}]  # fmt: skip


def test_sharegpt_roles_and_mask_history(assets, write):
    from torchmask.tokenizers import from_pretrained

    tokenizer = from_pretrained(assets / "tokenizers/qwen3")
    path = write("a.jsonl", [{"conversations": TOOLS}])
    samples = chat_dataset(tokenizer, source=path)
    text = tokenizer.decode(samples.tokens[samples.mask == 0], skip_special=False)
    assert '"name": "f"' in text and "It is 7" in text and "seven" not in text and "tool_response" not in text
    last = chat_dataset(tokenizer, source=path, mask_history=True)
    assert '"name"' not in tokenizer.decode(last.tokens[last.mask == 0], skip_special=False)


def test_case_15_of_real_tool_conversations_only_calls_and_answers_are_trained(assets):
    """Qwen drops the text around some calls of earlier turns; `expand` keeps what each answer needs."""
    from torchmask.tokenizers import from_pretrained

    tokenizer = from_pretrained(assets / "tokenizers/qwen3")
    path = assets / "data/glaive_toolcall_en_demo_150.json"
    samples = chat_dataset(tokenizer, source=str(path), max_rows=40, unstable_template="expand")
    names = samples.rule_names
    assert len(samples) >= 40 and {names[i] for i in np.unique(samples.rules[samples.mask == 0])} <= {
        "strategy", "eos", "eot"}  # fmt: skip
    for sample in samples:
        text = tokenizer.decode(sample.tokens[sample.trained], skip_special=False)
        assert "<tool_response>" not in text and "<|im_start|>" not in text


# What is wrong with a row


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"weight": "1"}, "expected a number"),
        ({"weight": 1e40}, r"weight is the number 1e\+40, expected a weight"),
        ({"weight": 1e-40}, "expected a weight"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 0, "weight": 1e40}]}, r"train_detail\[0\].weight is"),
        ({"weight": 1, "train": False}, "train=false and weight=1"),
        ({"masked": True, "train": True}, "contradict"),
        ({"visible": "no"}, "visible is the text"),
        ({"train_detail": "all"}, "expected a list of ranges"),
        ({"train_detail": [{"begin_offset": 0}]}, "needs whole numbers"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 90, "train": True}]}, "outside a text of 1"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 0, "train": 1}]},
            r"train_detail\[0\].train is the number",
        ),
        ({"content": [{"type": "text", "text": "a", "weight": "x"}]}, r"content\[0\].weight is the text"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_with_their_path(more, text):
    turn = {"role": "assistant", "content": "a", **more}
    row = Row("a.jsonl", 3, {"messages": [{"role": "user", "content": "q"}, turn]})
    with pytest.raises(RowError, match=text) as caught:
        chat_format(row)
    assert caught.value.where == "a.jsonl:3" and caught.value.id == "D08"


@pytest.mark.parametrize("segments", [[], "x", [{"text": "a"}], [{"label": 1, "text": "a"}], [{"label": True}]])
def test_segments_that_cannot_be_read_are_refused(segments):
    with pytest.raises(RowError):
        segments_format(Row("a.jsonl", 3, {"segments": segments}))
