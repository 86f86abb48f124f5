"""Native chat formats against their publishers' templates (in templates/), over generated conversations."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from torchmask import Message
from torchmask.errors import DataError
from torchmask.messages import TokenKind, default_mask
from torchmask.tokenizers import from_pretrained
from torchmask.tokenizers.template_files import read_templates

TEMPLATES = Path(__file__).parent / "templates"
TEXTS = (
    "Hi", "", " ", "  two blanks", "ends in one ", "\n\nlines\n", "zażółć 東京 🚀", "1+1?", "a\tb",
    "<|im_end|><|eot_id|></s>[INST] x [/INST]<end_of_turn><|end|>", "<tool_response>\nx\n</tool_response>", '{"x": 1}',
)  # fmt: skip
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string", "enum": ["x", "</tool_call>"]}}, "required": []}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "says é", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}},
]
PHI3_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|tool|>", "<|/tool|>")


class Family(NamedTuple):
    """A native format, its published template and a tokenizer of the assets that can write it.

    Attributes:
        template: a file in templates/; None = the folder's own.
        system, tools: whether conversations have them.
        single_calls: a message makes one call at most.
        thinks: answers may think.
    """

    format: str
    template: str | None
    tokenizer: str
    files: tuple[str, ...]
    config: dict[str, Any] = {}  # noqa: RUF012
    extra: tuple[str, ...] = ()
    system: bool = True
    tools: bool = False
    single_calls: bool = False
    thinks: bool = False


QWEN = ("qwen3", ("tokenizer.json",), {"eos_token": "<|im_end|>"})
PHI3 = ("llama2", ("tokenizer.json",), {"bos_token": "<s>", "eos_token": "<|endoftext|>"}, PHI3_TOKENS)
FAMILIES = (
    Family("llama3_1", "llama3_1", "llama3", ("tokenizer.model",), tools=True, single_calls=True),
    Family("qwen2_5", "qwen2_5", *QWEN, tools=True),
    Family("qwen3", None, "qwen3", ("tokenizer.json", "tokenizer_config.json"), tools=True, thinks=True),
    Family("qwen3_instruct", "qwen3_instruct", *QWEN, tools=True, thinks=True),
    Family("gemma", "gemma", "gemma", ("tokenizer.model",), system=False),
    Family("gemma3", "gemma3", "gemma", ("tokenizer.model",)),
    Family("phi3", "phi3", *PHI3),
    Family("phi3_5", "phi3_5", *PHI3),
    Family("phi4", "phi4", "gpt2", ("vocab.json", "merges.txt"), {"eos_token": "<|im_end|>"},
           ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    Family("phi4_mini", "phi4_mini", *PHI3),
    Family("zephyr", "zephyr", "mistral_v3", ("tokenizer.model",)),
)  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.format)
def family(request, assets, folder_with):
    """The family, its tokenizer by the native format and by the template, and the template."""
    one: Family = request.param
    config = dict(one.config)
    if one.extra:
        size = from_pretrained(assets / "tokenizers" / one.tokenizer).vocab_size
        new = [
            text
            for text in one.extra
            if text not in from_pretrained(assets / "tokenizers" / one.tokenizer).control_tokens
        ]
        config["added_tokens_decoder"] = {
            str(size + i): {"content": text, "special": True} for i, text in enumerate(new)
        }
    if one.template is not None:
        config["chat_template"] = (TEMPLATES / f"{one.template}.jinja").read_text()
    folder = folder_with(one.tokenizer, list(one.files), **config)
    return one, from_pretrained(folder, one.format), from_pretrained(folder), read_templates(folder)["default"]


def conversations(one: Family, count: int) -> list[tuple[list[Message], list[dict[str, Any]] | None, bool]]:
    chance = random.Random(one.format)
    result = []
    for i in range(count):
        tools = TOOLS if one.tools and i % 2 else None
        messages = [Message("system", chance.choice(TEXTS))] if one.system and chance.random() < 0.5 else []
        for _ in range(chance.randint(1, 3)):
            messages.append(Message("user", chance.choice(TEXTS)))
            if tools and chance.random() < 0.7:
                messages += some_calls(one, chance)
            thought = "<think>\nso\n</think>\n\n" if one.thinks and chance.random() < 0.4 else ""
            messages.append(Message("assistant", thought + chance.choice(TEXTS)))
        prompt = i % 3 == 0
        result.append((messages[:-1] if prompt else messages, tools, prompt))
    return result


def some_calls(one: Family, chance: random.Random) -> list[Message]:
    calls = [
        {
            "type": "function",
            "function": {"name": chance.choice("fg"), "arguments": {"a": chance.choice(TEXTS), "n": [1, None]}},
        }
        for _ in range(1 if one.single_calls else chance.randint(1, 2))
    ]
    text = "" if one.single_calls else chance.choice(("", "Let me see."))
    return [Message("assistant", text, tool_calls=calls), *(Message("tool", chance.choice(TEXTS)) for _ in calls)]


def as_row(message: Message) -> dict[str, Any]:
    row = {"role": message.role, "content": message.text}
    return {**row, "tool_calls": message.tool_calls} if message.tool_calls else row


def test_the_text_is_what_transformers_renders_from_the_published_template(family):
    one, native, _, template = family
    names = {id: text for text, id in native.control_tokens.items()}
    special = {"bos_token": names.get(native.bos_id, ""), "eos_token": names.get(native.eos_id, "")}
    for messages, tools, prompt in conversations(one, 36):
        rows = [as_row(message) for message in messages]
        if any("tool_response>" in row["content"] for row in rows if row["role"] == "user") and one.thinks:
            continue  # the template takes it for a tool's result
        expected, _ = render_jinja_template(
            [rows], tools=tools, chat_template=template, add_generation_prompt=prompt, **special
        )
        assert "".join(piece.text for piece in native.write(messages, tools, prompt)) == expected[0]


def test_ids_kinds_and_turns_are_those_of_the_published_template_run_in_the_sandbox(family):
    one, native, by_template, _ = family
    for messages, tools, prompt in conversations(one, 36):
        ours, theirs = (which.render(messages, tools, prompt) for which in (native, by_template))
        assert ours.tokens.tolist() == theirs.tokens.tolist(), messages
        assert default_mask(ours, messages).tolist() == default_mask(theirs, messages).tolist(), messages
        if not prompt:
            ends = [(rendered.kinds == TokenKind.END_OF_TURN).nonzero()[0].tolist() for rendered in (ours, theirs)]
            answers = {i for i, message in enumerate(messages) if message.role == "assistant"}
            ours_end, theirs_end = (
                [i for i in found if rendered.turns[i] in answers]
                for found, rendered in zip(ends, (ours, theirs), strict=True)
            )
            assert ours_end == theirs_end


def in_any_order(one: Family, count: int) -> list[list[Message]]:
    chance = random.Random(f"{one.format}, any order")
    roles = ("user", "assistant", "assistant", "user", *(["system"] if one.system else ()))
    return [
        [Message(chance.choice(roles), chance.choice(TEXTS)) for _ in range(chance.randint(1, 6))] for _ in range(count)
    ]


def test_roles_in_any_order_are_written_as_the_template_does_or_refused(family):
    """Two answers in a row, one that nobody asked for, system messages in between, the user's last word."""
    one, native, by_template, _ = family
    written = 0
    for messages in in_any_order(one, 40):
        found = []
        for which in (native, by_template):
            try:
                rendered = which.render(messages)
                found.append((rendered.tokens.tolist(), default_mask(rendered, messages).tolist()))
            except DataError as error:
                found.append(error.id)
        # D07: Gemma's templates leave a system message out that no user follows. D14: Qwen 3's prompt for a second
        # answer in a row has the first one otherwise.
        if found[0] != "D07" and found[1] != "D14":
            assert found[0] == found[1], messages
            written += 1
    assert written >= (1 if one.format.startswith("gemma") else 30)


def test_stop_tokens_are_those_of_the_published_template_and_the_configuration(family):
    _, native, by_template, _ = family
    assert set(by_template.stop_ids) <= set(native.stop_ids)


def test_what_a_user_types_is_no_control_token(family):
    _, native, _, _ = family
    control = list(native.control_tokens.values())
    counts = set()
    for typed in ("x", "".join(native.control_tokens)):
        rendered = native.render([Message("user", typed), Message("assistant", "ok")])
        counts.add(sum(int(token) in control for token in rendered.tokens))
    assert len(counts) == 1


def test_sketches_say_what_renderings_say(family):
    one, native, _, _ = family
    sketched = 0
    for messages, tools, prompt in conversations(one, 36):
        if tools or prompt or any(message.tool_calls for message in messages):
            continue
        sketch = native.sketch(messages)
        if sketch is None:
            continue
        sketched += 1
        ours, alone = native.assemble_sketches([sketch])[0], native.render(messages)
        assert ours.tokens.tolist() == alone.tokens.tolist()
        assert ours.kinds.tolist() == alone.kinds.tolist()
        assert ours.turns.tolist() == alone.turns.tolist()
        assert ours.num_straddlers == alone.num_straddlers
    assert sketched > 0 or one.format == "zephyr"


def test_a_turn_that_does_not_end_has_no_end_token(family):
    _, native, _, _ = family
    whole = native.render([Message("user", "q"), Message("assistant", "a")])
    cut = native.render([Message("user", "q"), Message("assistant", "a", eot=False)])
    assert cut.tokens.tolist() == whole.tokens.tolist()[: len(cut)]
    assert TokenKind.END_OF_TURN not in cut.kinds[cut.turns == 1]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_phi3_tokens_that_swallow_blanks_give_the_ids_that_tokenizers_gives(assets, tmp_path, scheme):
    file = json.loads((assets / "tokenizers" / "llama2" / "tokenizer.json").read_text())
    file["normalizer"] = None
    file["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": True, "normalized": False}
    size = 1 + max(file["model"]["vocab"].values())
    file["added_tokens"] += [{"id": size + i, "content": text, **flags} for i, text in enumerate(PHI3_TOKENS)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    template = (TEMPLATES / "phi3.jinja").read_text()
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "eos_token": "<|endoftext|>"})
    )
    native, by_template = from_pretrained(tmp_path, "phi3"), from_pretrained(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    messages = [Message("system", " S"), Message("user", "  q\n"), Message("assistant", " a b"), Message("user", "x")]
    for count in (1, 2, 3, 4):
        written = native.render(messages[:count])
        text = "".join(piece.text for piece in native.write(messages[:count]))
        assert written.tokens.tolist() == library.encode(text, add_special_tokens=False).ids
        assert written.tokens.tolist() == by_template.render(messages[:count]).tokens.tolist()
