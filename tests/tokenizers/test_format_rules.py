"""Native chat formats: what each of them refuses, and what no published template can be asked."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
from transformers import GenerationConfig

from torchmask import Message
from torchmask.errors import ConfigError, DataError
from torchmask.messages import TokenKind
from torchmask.tokenizers import from_pretrained
from torchmask.tokenizers.formats import NATIVE_FORMATS
from torchmask.tokenizers.formats.base import EOS

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CHAT = [Message("user", "q"), Message("assistant", "a")]
SYSTEM = Message("system", "S")


def text_of(name, messages, tools=None, prompt=False):
    return "".join(piece.text for piece in NATIVE_FORMATS[name].write(messages, tools, prompt))


def learnt(name, messages):
    """The text that an answer's tokens stand for."""
    written = NATIVE_FORMATS[name].write(messages, None, False)
    is_learnt = (TokenKind.CONTENT, TokenKind.END_OF_TURN)
    return "".join(p.text for p in written if p.kind in is_learnt and messages[p.turn].role == "assistant")


def test_the_docs_have_a_row_for_every_native_format_with_its_stop_tokens():
    page = (Path(__file__).parents[2] / "docs" / "chat_formats.md").read_text().replace("\\|", "|")
    for name, chat_format in NATIVE_FORMATS.items():
        row = next((line for line in page.splitlines() if line.startswith(f"| `{name}` |")), "")
        stops = [f"`{text}`" for text in chat_format.stops if text != EOS] or [" EOS "]
        assert all(stop in row for stop in stops), name


@pytest.mark.parametrize(
    ("name", "messages", "says"),
    [
        ("gemma", [SYSTEM, *CHAT], "turn 1 of 3 is from 'system', the chat format 'gemma' expects 'user' there"),
        ("gemma3", [SYSTEM], "writes a system message into the user's turn, and there is none"),
        ("gemma3", [*CHAT, Message("tool", "r")], "turn 3 of 3 is from 'tool'"),
        ("phi3", [*CHAT, Message("tool", "r")], "turn 3 of 3 is from 'tool', which the chat format 'phi3' does not"),
        ("phi4", [Message("tool", "r")], "turn 1 of 1 is from 'tool'"),
        ("zephyr", [Message("tool", "r")], "it writes system, user, assistant"),
        ("phi4_mini", [Message("assistant", "", tool_calls=[CALL])], "turn 1 has tool_calls, which .* 'phi4_mini'"),
        ("llama3", [CHAT[0], Message("assistant", "", tool_calls=[CALL])], "turn 2 has tool_calls"),
        ("llama3_1", [CHAT[0], Message("assistant", "", tool_calls=[CALL, CALL])], "2 tool_calls; .* writes one call"),
        ("llama3_1", [CHAT[0], Message("assistant", "x", tool_calls=[CALL])], "1 tool_calls and text"),
        ("alpaca", [*CHAT, *CHAT], "4 turns; .* 'alpaca' is one instruction and one response"),
        ("mistral_v1", [CHAT[0], Message("assistant", "", tool_calls=[CALL])], "turn 2 has tool_calls"),
    ],
)
def test_what_a_format_does_not_write_is_refused(name, messages, says):
    with pytest.raises(DataError, match=says) as raised:
        text_of(name, messages)
    assert raised.value.id == "D07"


def test_a_system_message_that_is_refused_names_the_way_out():
    with pytest.raises(DataError, match="put its text into the first user message"):
        text_of("gemma", [SYSTEM, *CHAT])


@pytest.mark.parametrize("name", [name for name, one in NATIVE_FORMATS.items() if not one.takes_tools])
def test_formats_without_tools_refuse_them(name):
    with pytest.raises(DataError, match=f"tools are given, which the chat format '{name}' does not write"):
        text_of(name, CHAT, TOOLS)


def test_tools_without_a_user_message_are_refused_by_llama3_1():
    with pytest.raises(DataError, match="writes into the first user message, and there is none"):
        text_of("llama3_1", [SYSTEM], TOOLS)


def test_arguments_as_json_text_are_written_as_an_object():
    call = {"function": {"name": "f", "arguments": '{"a":  "é"}'}}
    messages = [CHAT[0], Message("assistant", "", tool_calls=[call])]
    assert '{"name": "f", "parameters": {"a": "é"}}' in text_of("llama3_1", messages)
    assert '{"name": "f", "arguments": {"a": "é"}}' in text_of("qwen2_5", messages)


TAKE_TOOLS = [name for name, chat_format in NATIVE_FORMATS.items() if chat_format.takes_tools]


@pytest.mark.parametrize("name", [*TAKE_TOOLS, "template"])
@pytest.mark.parametrize("has_function", [True, False])
@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ('{x: 1', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "JSON of list"),
        ('"{}"', "JSON of str"),
        ("null", "JSON of NoneType"),
        ([1], "list"),
        (3, "int"),
    ],
)  # fmt: skip
def test_arguments_that_are_no_object_are_refused_with_their_path(load, name, has_function, arguments, found):
    good = {"name": "f", "arguments": {}, "id": "a23456789"}
    bad = {"name": "f", "arguments": arguments}
    calls = [{"function": call} if has_function else call for call in (good, bad)]
    messages = [CHAT[0], Message("assistant", "", tool_calls=calls)]
    path = f"messages[1].tool_calls[1]{'.function' * has_function}.arguments is {found}"
    with pytest.raises(DataError, match=re.escape(path)) as raised:
        load("qwen3").write(messages) if name == "template" else text_of(name, messages)
    assert raised.value.id == "D08"


@pytest.mark.parametrize("arguments", [{}, None, "{}", " { } "])
def test_no_arguments_are_an_empty_object(load, arguments):
    messages = [CHAT[0], Message("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": arguments}}])]
    assert '{"name": "f", "arguments": {}}' in text_of("qwen2_5", messages)
    assert '{"name": "f", "arguments": {}}' in load("qwen3").decode(load("qwen3").render(messages).tokens)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("mistral", "'mistral_v1' or 'mistral_v3' or 'mistral_tekken' or 'mistral_v7'"),
        ("llama3.1", "'llama3_1'"),
        ("qwen2", "'qwen2_5'"),
    ],
)
def test_an_unknown_format_names_all_that_it_may_be(load, name, near):
    with pytest.raises(ConfigError, match=re.escape(f"did you mean {near}?")) as raised:
        load("llama2", name)
    assert raised.value.id == "C06"


def test_tools_of_phi4_mini_stand_behind_the_system_messages_text():
    assert text_of("phi4_mini", [SYSTEM, CHAT[0]], TOOLS, prompt=True) == (
        '<|system|>S<|tool|>[{"name": "f", "parameters": {}}]<|/tool|><|end|><|user|>q<|end|><|assistant|>'
    )
    assert text_of("phi4_mini", CHAT[:1], TOOLS, prompt=True).startswith("<|system|><|tool|>[")


def test_thinking_switched_off_puts_the_empty_block_into_the_prompt():
    assert text_of("qwen3_nothink", CHAT[:1], prompt=True).endswith("<think>\n\n</think>\n\n")
    assert text_of("qwen3_nothink", CHAT) == text_of("qwen3", CHAT)
    assert learnt("qwen3", CHAT) == "<think>\n\n</think>\n\na<|im_end|>"
    assert learnt("qwen3_nothink", CHAT) == "a<|im_end|>"


def test_only_the_last_answer_keeps_its_thinking():
    thought = Message("assistant", "<think>\nso\n</think>\n\na")
    assert learnt("qwen3", [CHAT[0], thought]) == "<think>\nso\n</think>\n\na<|im_end|>"
    assert learnt("qwen3", [CHAT[0], thought, *CHAT]) == "a<|im_end|><think>\n\n</think>\n\na<|im_end|>"
    assert learnt("qwen3_instruct", [CHAT[0], thought, *CHAT]) == "<think>\nso\n</think>\n\na<|im_end|>a<|im_end|>"


def test_dropped_thinking_is_seen_as_rewritten_text():
    messages = [CHAT[0], Message("assistant", "<think>\nso\n</think>\n\na"), *CHAT]
    written = NATIVE_FORMATS["qwen3"].write(messages, None, False)
    assert {piece.offset for piece in written if piece.turn == 1 and piece.kind == TokenKind.CONTENT} == {-1}


WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nq\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nq\n\n### Input:\ni\n\n### Response:"
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("q", WITHOUT_INPUT),
        ([{"type": "text", "text": "q"}, {"type": "text", "text": "i", "name": "input"}], WITH_INPUT),
        (WITH_INPUT, WITH_INPUT),
        (WITHOUT_INPUT, WITHOUT_INPUT),
    ],
)
def test_alpaca_has_both_published_prompts_and_writes_neither_twice(load, content, expected):
    tokenizer = load("llama2", "alpaca")
    messages = [Message("user", content), CHAT[1]]
    prompt = tokenizer.render(messages[:1], add_generation_prompt=True).tokens.tolist()
    assert prompt == tokenizer.encode(expected, add_bos=True)
    whole = tokenizer.render(messages).tokens.tolist()
    assert whole == tokenizer.encode(expected + "a", add_bos=True, add_eos=True)


def test_alpaca_and_zephyr_take_a_tokenizers_own_end_of_text(load):
    tokenizer = load("gpt2", "alpaca")
    assert tokenizer.render(CHAT).tokens.tolist()[-1] == tokenizer.eos_id == 50256
    assert tokenizer.stop_ids == (50256,)
    assert load("gpt2", "zephyr").decode(load("gpt2", "zephyr").render(CHAT).tokens, skip_special=False) == (
        "<|user|>\nq<|endoftext|>\n<|assistant|>\na<|endoftext|>\n"
    )


def test_a_tokenizer_without_the_formats_tokens_is_refused(load):
    with pytest.raises(ConfigError, match=r"'mistral_v7' needs the control tokens \[SYSTEM_PROMPT\]") as raised:
        load("mistral_v3", "mistral_v7")
    assert raised.value.id == "C06"


def test_formats_are_offered_that_fit_the_vocabulary_and_no_others(load):
    assert load("mistral_v3").fitting_formats == [
        "llama2",
        "mistral_v1",
        "mistral_v3",
        "mistral_tekken",
        "zephyr",
        "alpaca",
    ]
    assert load("gpt2").fitting_formats == ["zephyr", "alpaca"]
    for name in load("gemma").fitting_formats:
        assert load("gemma", name).chat_format == name


STOPS = {
    "llama2": ("llama2", [2]),
    "llama3": ("llama3", [128001, 128008, 128009]),
    "llama3_1": ("llama3", [128001, 128008, 128009]),
    "chatml": ("qwen3", [151645]),
    "qwen2_5": ("qwen3", [151645, 151643]),
    "qwen3": ("qwen3", [151645, 151643]),
    "qwen3_nothink": ("qwen3", [151645, 151643]),
    "qwen3_instruct": ("qwen3", [151645, 151643]),
    "mistral_v1": ("mistral_v3", [2]),
    "mistral_v3": ("mistral_v3", [2]),
    "mistral_tekken": ("mistral_v3", [2]),
    "mistral_v7": ("mistral_v3", [2]),
    "gemma": ("gemma", [1, 107]),
    "gemma3": ("gemma", [1, 107]),
    "phi3": ("gpt2", [50256, 50260]),
    "phi3_5": ("gpt2", [50256, 50260]),
    "phi4": ("gpt2", [50256, 50259]),
    "phi4_mini": ("gpt2", [50256, 50260]),
    "zephyr": ("gpt2", [50256]),
    "alpaca": ("gpt2", [50256]),
}
STOP_TEXTS = {
    ("llama2", "mistral_v1", "mistral_v3", "mistral_tekken", "mistral_v7"): ("</s>",),
    ("llama3", "llama3_1"): ("<|eot_id|>", "<|eom_id|>"),
    ("chatml",): ("<|im_end|>",),
    ("qwen2_5", "qwen3", "qwen3_nothink", "qwen3_instruct", "phi4"): ("<|im_end|>", "<|endoftext|>"),
    ("gemma", "gemma3"): ("<end_of_turn>",),
    ("phi3", "phi3_5", "phi4_mini"): ("<|end|>", "<|endoftext|>"),
    ("zephyr", "alpaca"): (EOS,),
}
NEEDED = {
    "mistral_v7": ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"],
    "phi4": ["<|im_start|>", "<|im_sep|>", "<|im_end|>"],
    **{name: ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"] for name in ("phi3", "phi3_5", "phi4_mini")},
}


@pytest.mark.parametrize("name", NATIVE_FORMATS)
def test_generation_stops_at_the_tokens_that_end_turns_of_the_format(assets, name):
    """Texts and ids by hand; the texts are those of the format's row in docs/chat_formats.md, with EOS in front."""
    tokenizer = from_pretrained(assets / "tokenizers" / STOPS[name][0], name, add_tokens=NEEDED.get(name, ()))
    assert list(tokenizer.stop_ids) == STOPS[name][1]
    assert NATIVE_FORMATS[name].stops == next(stops for names, stops in STOP_TEXTS.items() if name in names)


def test_thinking_markers_are_text_for_a_tokenizer_without_them(load):
    tokenizer = load("llama3", "llama3")
    messages = [CHAT[0], Message("assistant", "<think>x</think>y")]
    rendered = tokenizer.render(messages)
    own = rendered.tokens[(rendered.turns == 1) & (rendered.kinds == TokenKind.CONTENT)].tolist()
    assert own == tokenizer.encode("<think>x</think>y")


def test_a_pickled_tokenizer_keeps_its_format(load):
    tokenizer = load("qwen3", "qwen3_nothink")
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.render(CHAT, None, True).tokens.tolist() == tokenizer.render(CHAT, None, True).tokens.tolist()


@pytest.mark.parametrize("known", [None, {"eos_token_id": 151643, "temperature": 0.6}])
def test_transformers_stops_where_a_saved_native_format_ends_its_turns(load, tmp_path, known):
    shutil.copytree(load("qwen3").folder, tmp_path / "source")
    if known is not None:
        (tmp_path / "source" / "generation_config.json").write_text(json.dumps(known))
    tokenizer = from_pretrained(tmp_path / "source", "chatml")
    tokenizer.save(tmp_path / "saved")
    theirs = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert theirs.eos_token_id == list(tokenizer.stop_ids)
    assert {tokenizer.eos_id, tokenizer.control_tokens["<|im_end|>"]} <= set(theirs.eos_token_id)
    assert (theirs.temperature == 0.6) == (known is not None)
    again = from_pretrained(tmp_path / "saved")
    assert again.stop_ids == tokenizer.stop_ids and again.chat_format == "chatml"
    assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def test_a_saved_template_leaves_the_generation_configuration_as_it_is(load, tmp_path):
    load("qwen3").save(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()


@pytest.mark.parametrize(
    ("name", "chat_format"), [("llama3", "llama3"), ("gemma", "gemma"), ("gpt2", "alpaca"), ("mistral_v3", "zephyr")]
)
def test_roles_and_stops_survive_saving_where_no_configuration_names_them(load, tmp_path, name, chat_format):
    tokenizer = load(name, chat_format)
    tokenizer.save(tmp_path)
    again = from_pretrained(tmp_path)
    assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert again.stop_ids == tokenizer.stop_ids and again.adds_bos == tokenizer.adds_bos


def test_a_saved_format_is_read_back(load, tmp_path):
    load("gemma", "gemma3").save(tmp_path)
    assert from_pretrained(tmp_path).chat_format == "gemma3"


def test_llama2_strips_what_is_behind_the_system_message_where_the_user_says_nothing(load):
    """As Meta's code, which strips the text that it has put together, and the published template."""
    tokenizer = load("llama2", "llama2")
    for said in ("", " \n"):
        written = tokenizer.write([Message("system", " be brief"), Message("user", said)])
        assert "".join(piece.text for piece in written) == "<s>[INST] <<SYS>>\n be brief\n<</SYS>> [/INST]"
