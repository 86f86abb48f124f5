"""Which tokenizer a folder holds, the roles of its tokens, and what damaged folders say."""

import json
import pickle
import subprocess
import sys

import pytest

from torchmask import Message
from torchmask.errors import ConfigError
from torchmask.tokenizers import from_pretrained

ROLES = {
    "llama2": (1, 2, None, (2,)),
    "llama3": (128000, 128001, 128004, (128001, 128008, 128009)),
    "qwen3": (None, 151645, 151643, (151645,)),
    "gemma": (2, 1, 0, (1,)),
    "mistral_v3": (1, 2, None, (2,)),
    "gpt2": (None, 50256, None, (50256,)),
}
SIZES = {"llama2": 32000, "llama3": 128256, "qwen3": 151669, "gemma": 256000, "mistral_v3": 32768, "gpt2": 50257}


@pytest.fixture
def tiny_folder(tmp_path, make_tiny_tokenizer):
    make_tiny_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ROLES)
def test_roles_and_size_of_known_tokenizers(load, name):
    tokenizer = load(name)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == ROLES[name]
    assert tokenizer.vocab_size == SIZES[name]


def test_a_tiny_tokenizer_of_ones_own_works_with_chatml(tiny_folder):
    tokenizer = from_pretrained(tiny_folder, "chatml")
    tokens, mask = tokenizer.tokenize_messages(
        [Message("user", "<|im_end|><answer>é"), Message("assistant", "the answer")]
    )
    text = "<|im_start|>user\n<|im_end|><answer>é<|im_end|>\n<|im_start|>assistant\nthe answer<|im_end|>\n"
    assert tokenizer.decode(tokens, skip_special=False) == text
    trained = [token for token, flag in zip(tokens, mask, strict=True) if flag == 0]
    assert tokenizer.decode(trained, skip_special=False) == "the answer<|im_end|>"
    assert tokens.count(tokenizer.eos_id) == 2


def test_generation_config_gives_the_stop_ids(tiny_folder):
    (tiny_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    (tiny_folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert from_pretrained(tiny_folder).stop_ids == (2, 0)


def test_the_models_configuration_names_roles_where_the_tokenizers_has_none(tiny_folder):
    (tiny_folder / "tokenizer_config.json").unlink()
    (tiny_folder / "config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": -1})
    )
    tokenizer = from_pretrained(tiny_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (0, 1, None, (1, 2))


def test_special_tokens_map_names_roles(tiny_folder):
    (tiny_folder / "tokenizer_config.json").unlink()
    roles = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>"}
    (tiny_folder / "special_tokens_map.json").write_text(json.dumps(roles))
    assert (from_pretrained(tiny_folder).bos_id, from_pretrained(tiny_folder).eos_id) == (0, 2)


def test_a_role_that_names_no_token_is_an_error(tiny_folder):
    (tiny_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|nope|>"}))
    with pytest.raises(ConfigError, match=r"eos_token is '<\|nope\|>', which the tokenizer does not have"):
        from_pretrained(tiny_folder)


@pytest.mark.parametrize(("name", "chat_format"), [("llama2", "llama2"), ("llama3", None), ("qwen3", None)])
def test_a_tokenizer_survives_pickling(load, name, chat_format):
    tokenizer = pickle.loads(pickle.dumps(load(name, chat_format)))
    assert tokenizer.encode("Hello é") == load(name).encode("Hello é")
    assert (tokenizer.chat_format, tokenizer.has_chat_format) == (chat_format, load(name, chat_format).has_chat_format)


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen3", "gpt2"])
def test_saving_copies_what_is_needed_to_load_it_again(load, tmp_path, name):
    load(name).save(tmp_path / "out")
    again = from_pretrained(tmp_path / "out")
    assert again.encode("Hello é <s>") == load(name).encode("Hello é <s>")
    assert again.eos_id == load(name).eos_id
    assert again.has_chat_format == load(name).has_chat_format
    again.save(tmp_path / "out")  # onto itself


def test_a_folder_without_tokenizer_says_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(
        ConfigError, match=r"tokenizer.json, tekken.json, tokenizer.model, .*holds model.safetensors"
    ) as raised:
        from_pretrained(tmp_path)
    assert raised.value.id == "C11"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such tokenizer folder"):
        from_pretrained(tmp_path / "nope")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"", "is empty"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        ("tokenizer.json", b"<!DOCTYPE html><html>", "web page"),
        ("tokenizer.json", b'{"version": ', "cannot be read as a tokenizer"),
        ("tokenizer.model", b"\x0a\x05nonsense", "not a sentencepiece model"),
        ("tokenizer.model", b"IQ== 0\nnonsense\n", "not a line of a tiktoken file"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "2 ranks"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        from_pretrained(tmp_path)
    assert name in str(raised.value)


def test_a_truncated_sentencepiece_model_is_an_error(assets, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((assets / "tokenizers/llama2/tokenizer.model").read_bytes()[:100_000])
    with pytest.raises(ConfigError, match="not a sentencepiece model"):
        from_pretrained(tmp_path)


def test_a_configuration_that_is_not_json_is_named(tiny_folder):
    (tiny_folder / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config.json: not valid JSON"):
        from_pretrained(tiny_folder)


def test_the_json_file_goes_first_and_both_are_saved(load, tmp_path):
    load("llama2").save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer.model"]


def test_importing_the_package_loads_no_tokenizer_library():
    code = (
        "import sys, torchmask.tokenizers; "
        "print([m for m in ('torch', 'sentencepiece', 'tiktoken', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
