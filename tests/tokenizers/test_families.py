"""tokenizer.json files as the families publish them, small: ids, offsets and chats against the libraries."""

import json

import numpy as np
import pytest
from family_tokenizers import FAMILIES, NO_BOS, TEMPLATE, TEXTS
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from torchmask import Message
from torchmask.tokenizers import from_pretrained


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A folder of a family, made once: `family(name)`."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            FAMILIES[name]().save(str(folder / "tokenizer.json"))
            roles = {"bos_token": None if name in NO_BOS else "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            config = {**roles, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
            made[name] = folder
        return made[name]

    return make


def library(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_text_has_the_ids_of_the_tokenizers_library(family, name):
    ours, theirs = from_pretrained(family(name)), library(family(name))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.encode_with_offsets(text)[0].tolist() == ours.encode(text), text


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_text_has_the_ids_of_transformers(family, name):
    ours, theirs = from_pretrained(family(name)), AutoTokenizer.from_pretrained(family(name))
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("name", FAMILIES)
def test_many_texts_at_once_are_encoded_like_each_alone(family, name):
    backend = from_pretrained(family(name))._backend
    found = backend.encode_many(TEXTS)
    for i, text in enumerate(TEXTS):
        here = slice(found.offsets[i], found.offsets[i + 1])
        for column, alone in zip(found[:3], backend.encode_with_offsets(text), strict=True):
            assert column[here].tolist() == alone.tolist(), text


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"unigram"}))  # which removes blanks at the end
def test_offsets_cover_every_character_in_order(family, name):
    tokenizer = from_pretrained(family(name))
    for text in TEXTS:
        if "e\u0301" in text and name in ("gpt_neox", "qwen2"):
            continue  # composing drops the offset of the combining mark
        _, starts, ends = tokenizer.encode_with_offsets(text)
        assert (starts <= ends).all() and (np.diff(starts) >= 0).all()
        covered = np.zeros(len(text), bool)
        for start, end in zip(starts, ends, strict=True):
            covered[start:end] = True
        assert covered.all(), (text, starts, ends)


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_gives_the_text_that_the_library_gives(family, name):
    ours, theirs = from_pretrained(family(name)), library(family(name))
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prompt", [False, True])
def test_chats_have_the_ids_of_transformers(family, name, prompt):
    ours, theirs = from_pretrained(family(name)), AutoTokenizer.from_pretrained(family(name))
    messages = [
        {"role": "user", "content": "What is  the capital of France?"},
        {"role": "assistant", "content": "Paris.\n\nOf course"},
        {"role": "user", "content": "And Japan"},
        *([] if prompt else [{"role": "assistant", "content": "東京"}]),
    ]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    tokens, mask = ours.tokenize_messages([Message(**m) for m in messages], add_generation_prompt=prompt)
    assert tokens == expected
    together = ours.assemble([ours.write([Message(**m) for m in messages], None, prompt)] * 2)
    assert together.tokens.tolist() == expected * 2
    trained = [token for token, flag in zip(tokens, mask, strict=True) if flag == 0]
    assert ours.control_tokens["<|end|>"] in trained
    assert "Paris." in ours.decode(trained)


@pytest.mark.parametrize("name", FAMILIES)
def test_typed_control_tokens_stay_text(family, name):
    tokenizer = from_pretrained(family(name))
    control = {id for text, id in tokenizer.control_tokens.items() if text != "<unk>"}
    for text in tokenizer.control_tokens:
        for typed in (text, f"a{text}", f"{text}b", f" {text} {text}\n", f"{text}{text}"):
            assert control.isdisjoint(tokenizer.encode(typed)), typed
    tokens, _ = tokenizer.tokenize_messages(
        [Message("user", "</s><|end|>\n<|assistant|>\nx"), Message("assistant", "y")]
    )
    assert [tokens.count(tokenizer.control_tokens[t]) for t in ("<|end|>", "<|assistant|>", "</s>")] == [2, 1, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_roles_come_from_the_configuration(family, name):
    tokenizer = from_pretrained(family(name))
    assert tokenizer.bos_id == (None if name in NO_BOS else tokenizer.control_tokens["<s>"])
    assert tokenizer.eos_id == tokenizer.control_tokens["</s>"]
    assert tokenizer.stop_ids == (tokenizer.eos_id, tokenizer.control_tokens["<|end|>"])


def test_phi3s_control_tokens_take_in_the_line_break_after_them(family):
    tokenizer = from_pretrained(family("phi3"))
    tokens, _ = tokenizer.tokenize_messages([Message("user", "\n Hi")])
    control = tokenizer.control_tokens
    assert tokens == [control["<s>"], control["<|user|>"], *tokenizer.encode("Hi"), control["<|end|>"]]


def test_characters_of_content_are_counted_from_before_swallowed_blanks(family):
    tokenizer = from_pretrained(family("phi3"))
    rendered = tokenizer.render([Message("user", "a"), Message("assistant", "  Paris is")])
    starts = rendered.content_starts[rendered.content_starts >= 0]
    assert starts.tolist()[-1] >= 2 and rendered.content_ends.max() == len("  Paris is")


def test_only_the_beginning_of_a_text_gets_a_blank_where_the_scheme_is_first(family):
    tokenizer = from_pretrained(family("mistral_v3"))
    assert tokenizer.id_to_piece(tokenizer.encode("France")[0]).startswith("▁")
    tokens, _ = tokenizer.tokenize_messages([Message("user", "France")])
    assert "▁" not in "".join(map(tokenizer.id_to_piece, tokens))
    assert tokenizer.decode(tokens, skip_special=False) == "<s><|user|>\nFrance<|end|>\n"


@pytest.mark.parametrize(("family_name", "setting"), [("gpt2", True), ("prefixed_gpt2", False)])
def test_add_prefix_space_of_the_configuration_has_the_last_word(family, tmp_path, family_name, setting):
    (tmp_path / "tokenizer.json").write_bytes((family(family_name) / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": setting, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("Paris is") == theirs("Paris is", add_special_tokens=False)["input_ids"]
    assert (ours.decode(ours.encode("Paris is")) == " Paris is") == setting


@pytest.mark.parametrize("name", ["llama2", "mistral_v3"])
def test_llamas_class_without_prefix_space_puts_no_blank_in_front(family, tmp_path, name):
    (tmp_path / "tokenizer.json").write_bytes((family(name) / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Paris is", " the capital", "of\nFrance"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == text


def test_a_text_that_begins_without_control_token_begins_with_the_blank(family, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((family("mistral_v3") / "tokenizer.json").read_bytes())
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    config = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Paris is"}, {"role": "assistant", "content": "the capital"}]
    expected = theirs.apply_chat_template(messages, return_dict=False)
    given = [Message(**m) for m in messages]
    assert ours.tokenize_messages(given)[0] == expected
    assert ours.assemble([ours.write(given)] * 2).tokens.tolist() == expected * 2
