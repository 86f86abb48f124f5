"""Where a folder has its chat templates: read from all of these places, and saved."""

import json

import pytest
from transformers import AutoTokenizer

from torchmask import Message
from torchmask.errors import ConfigError
from torchmask.tokenizers import from_pretrained
from torchmask.tokenizers.template_files import read_templates

LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\nNAME {{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {name: LOOP.replace("NAME", name) for name in ("default", "tool_use", "rag")}
ROWS = [{"role": "user", "content": "q"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]


@pytest.fixture
def folder(tmp_path, make_tiny_tokenizer):
    """A folder with the three templates where the parameter says."""

    def make(place):
        source = tmp_path / "source"
        source.mkdir()
        listed = [{"name": name, "template": text} for name, text in TEMPLATES.items()]
        in_config = {"list": listed, "object": TEMPLATES}.get(place)
        make_tiny_tokenizer(source, **({"chat_template": in_config} if in_config else {}))
        if place == "files":
            (source / "chat_template.jinja").write_text(TEMPLATES["default"])
            (source / "additional_chat_templates").mkdir()
            for name in ("tool_use", "rag"):
                (source / "additional_chat_templates" / f"{name}.jinja").write_text(TEMPLATES[name])
        if place == "chat_template.json":
            (source / place).write_text(json.dumps({"chat_template": listed}))
        return source

    return make


@pytest.mark.parametrize("place", ["files", "list", "object", "chat_template.json"])
def test_templates_are_found_by_name_and_the_one_for_tools_is_used_with_tools(folder, tmp_path, place):
    source = folder(place)
    assert read_templates(source) == TEMPLATES
    tokenizer = from_pretrained(source)
    tokenizer.save(tmp_path / "saved")
    for other in (tokenizer, from_pretrained(tmp_path / "saved")):
        for tools, name in ((None, "default"), (TOOLS, "tool_use")):
            pieces = other.write([Message("user", "q")], tools)
            assert "".join(piece.text for piece in pieces) == f"<|im_start|>user\n{name} q<|im_end|>\n"
    assert tokenizer.identity()["templates"] == TEMPLATES


def test_transformers_takes_the_same_template_of_those_in_files_of_their_own(folder, tmp_path):
    source = folder("files")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(source)
    ours = from_pretrained(source)
    for tools in (None, TOOLS):
        text = "".join(piece.text for piece in ours.write([Message("user", "q")], tools))
        assert theirs.apply_chat_template(ROWS, tools=tools, tokenize=False) == text


def test_files_of_their_own_go_before_tokenizer_config(folder):
    source = folder("list")
    (source / "chat_template.jinja").write_text("alone")
    assert read_templates(source) == {"default": "alone"}


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_template_is_none(folder, empty):
    source = folder("none")
    (source / "chat_template.jinja").write_text(empty)
    assert not from_pretrained(source).has_chat_format


@pytest.mark.parametrize("broken", [7, [{"x": 1}], ["a"], {"default": 1}, [{"name": "a", "template": None}]])
def test_templates_in_no_known_form_are_an_error_that_names_the_file(folder, broken):
    source = folder("none")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": broken}))
    with pytest.raises(ConfigError, match="neither a template nor a list") as raised:
        from_pretrained(source)
    assert raised.value.id == "C10" and raised.value.where.endswith("tokenizer_config.json")


@pytest.mark.parametrize("ids", ["2", [2, "3"], 1.5])
def test_stop_ids_that_are_no_ids_are_an_error(folder, ids):
    source = folder("list")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ConfigError, match=r"eos_token_id .* expected an id or a list of ids") as raised:
        from_pretrained(source)
    assert raised.value.id == "C10"
