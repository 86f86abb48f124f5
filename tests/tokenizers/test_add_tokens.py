"""Tokens that a user adds: their ids, where they are tokens and where text, and what is saved and pickled."""

import json
import pickle
import shutil

import pytest
from transformers import AutoTokenizer

from torchmask import Message
from torchmask.errors import ConfigError
from torchmask.generation import TextStream
from torchmask.tokenizers import from_pretrained

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GPT2 = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
FOLDERS = {
    "llama2_json": ("llama2", ["tokenizer.json", "tokenizer.model"], {**LLAMA, "legacy": True}),
    "llama2_model": ("llama2", ["tokenizer.model"], {**LLAMA, "legacy": True}),
    "gpt2": ("gpt2", ["vocab.json", "merges.txt"], {**GPT2, "tokenizer_class": "GPT2Tokenizer"}),
    "qwen2_files": ("gpt2", ["vocab.json", "merges.txt"], {**GPT2, "tokenizer_class": "Qwen2Tokenizer"}),
    "llama3_ranks": ("llama3", ["tokenizer.model"], None),
    "stories260k": ("stories260k", ["tokenizer.model"], LLAMA),
}
NEW = ["<|tool|>", "<answer>", "[STEP]"]


@pytest.fixture
def folder(assets, tmp_path):
    def make(name):
        source, files, config = FOLDERS[name]
        place = tmp_path / "source"
        place.mkdir()
        for file in files:
            shutil.copyfile(assets / "tokenizers" / source / file, place / file)
        if config is not None:
            (place / "tokenizer_config.json").write_text(json.dumps(config))
        return place

    return make


@pytest.mark.parametrize("name", FOLDERS)
def test_added_tokens_come_after_the_vocabulary_and_are_never_made_from_text(folder, name):
    tokenizer = from_pretrained(folder(name))
    size, plain = tokenizer.vocab_size, tokenizer.encode("a <answer> [STEP]<|tool|>")
    assert tokenizer.add_tokens(NEW) == 3
    assert [tokenizer.control_tokens[text] for text in NEW] == [size, size + 1, size + 2]
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.encode("a <answer> [STEP]<|tool|>") == plain
    assert tokenizer.id_to_piece(size) == "<|tool|>"
    ids = [size, *tokenizer.encode("x"), size + 1]
    assert tokenizer.decode(ids) == "x" and tokenizer.decode(ids, skip_special=False) == "<|tool|>x<answer>"
    assert tokenizer.add_tokens([*NEW, "<more>"]) == 1 and tokenizer.control_tokens["<more>"] == size + 3


@pytest.mark.parametrize("name", FOLDERS)
def test_added_tokens_survive_saving_and_pickling(folder, tmp_path, name):
    tokenizer = from_pretrained(folder(name), "chatml", add_tokens=["<|im_start|>", "<|im_end|>", *NEW])
    chat = [Message("user", "<answer> é"), Message("assistant", "so <answer>42[STEP] <|im_end|>")]
    expected = tokenizer.tokenize_messages(chat)
    tokenizer.save(tmp_path / "out")
    for other in (from_pretrained(tmp_path / "out"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.tokenize_messages(chat) == expected
        assert (other.vocab_size, other.chat_format, other.stop_ids) == (
            tokenizer.vocab_size,
            "chatml",
            tokenizer.stop_ids,
        )
        assert other.control_tokens == tokenizer.control_tokens
    again = from_pretrained(tmp_path / "out")
    assert again.add_tokens(["<later>"]) == 1
    again.save(tmp_path / "out")  # onto itself
    assert from_pretrained(tmp_path / "out").control_tokens["<later>"] == tokenizer.vocab_size


@pytest.mark.parametrize("name", FOLDERS)
def test_transformers_reads_the_same_ids_from_what_is_saved(folder, tmp_path, name):
    tokenizer = from_pretrained(folder(name))
    tokenizer.add_tokens(NEW)
    tokenizer.add_tokens(["zebrafish"], special=False)
    tokenizer.save(tmp_path / "out")
    if name == "llama3_ranks":  # Meta's folder names no class
        (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [*NEW, "zebrafish"]
    size = tokenizer.vocab_size
    assert theirs.convert_tokens_to_ids(texts) == list(range(size - 4, size)) and len(theirs) >= size
    ids = theirs("one<answer>two zebrafish", add_special_tokens=False)["input_ids"]
    assert size - 3 in ids and size - 1 in ids
    assert size - 1 in from_pretrained(tmp_path / "out").encode("two zebrafish") == tokenizer.encode("two zebrafish")
    assert theirs.eos_token_id == tokenizer.eos_id


@pytest.mark.parametrize("name", ["llama2_json", "llama2_model"])
def test_saving_over_the_folder_that_was_loaded_adds_nothing_twice(folder, name):
    place = folder(name)
    tokenizer = from_pretrained(place, add_tokens=NEW)
    tokenizer.save(place)
    tokenizer.save(place)
    for other in (from_pretrained(place), pickle.loads(pickle.dumps(tokenizer))):
        assert other.control_tokens == tokenizer.control_tokens and other.vocab_size == 32003
    noted = json.loads((place / "tokenizer_config.json").read_text())["torchmask_added_tokens"]
    assert noted == NEW


def test_the_assistants_own_text_has_added_tokens_and_nobody_elses(folder):
    tokenizer = from_pretrained(folder("llama2_json"), "llama2")
    tokenizer.add_tokens(["<tool>", "<tool>x"])
    for render in (tokenizer.render, lambda m: tokenizer.assemble([tokenizer.write(m)])[0]):
        rendered = render([Message("user", "<tool>"), Message("assistant", " a<tool>xb<tool> ")])
        ids = rendered.tokens.tolist()
        assert [ids.count(32000), ids.count(32001)] == [1, 1]
        at = ids.index(32001)
        assert (rendered.content_starts[at], rendered.content_ends[at]) == (2, 9)


def test_tokens_that_the_format_writes_are_text_in_an_answer(folder):
    tokenizer = from_pretrained(folder("llama2_json"), "chatml", add_tokens=["<|im_start|>", "<|im_end|>"])
    tokens, _ = tokenizer.tokenize_messages([Message("user", "x"), Message("assistant", "a<|im_end|>")])
    assert tokens.count(32001) == 2


def test_templates_write_added_tokens(folder):
    place = folder("llama2_model")
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    (place / "chat_template.jinja").write_text(template)
    tokenizer = from_pretrained(place)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<tool>"])
    tokens, _ = tokenizer.tokenize_messages([Message("user", "<|user|>"), Message("assistant", "<|user|><tool>")])
    assert [tokens.count(id) for id in (32000, 32001, 32002)] == [1, 1, 1]


def test_adding_tokens_changes_what_caches_are_keyed_by(folder):
    place = folder("llama2_json")
    plain, other = from_pretrained(place), from_pretrained(place, add_tokens=["<a>"])
    assert plain.identity() != other.identity() != from_pretrained(place, add_tokens=["<b>"]).identity()
    assert other.identity() == pickle.loads(pickle.dumps(other)).identity()


def test_ordinary_added_tokens_are_found_in_text_and_kept_by_decoding(folder):
    tokenizer = from_pretrained(folder("llama3_ranks"))
    assert tokenizer.add_tokens("zebrafish", special=False) == 1
    ids = tokenizer.encode("two zebrafishes")
    assert 128256 in ids and tokenizer.decode(ids) == "two zebrafishes"
    assert tokenizer.add_tokens(["capital"], special=False) == 0  # a word that it has already


def test_saving_without_added_tokens_copies_the_files_as_they_are(folder, tmp_path):
    place = folder("llama2_json")
    from_pretrained(place).save(tmp_path / "out")
    for file in place.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("tokens", "id", "message"),
    [
        ([""], "C13", "nothing but blanks"),
        ([" \n"], "C13", "nothing but blanks"),
        ([5], "C03", "expected texts of tokens, found 5"),
        (["the"], "C09", "'the' is an ordinary token of the vocabulary already"),
    ],
)
def test_texts_that_cannot_be_tokens_are_refused(folder, tokens, id, message):
    tokenizer = from_pretrained(folder("gpt2"))
    with pytest.raises(ConfigError, match=message) as raised:
        tokenizer.add_tokens(tokens)
    assert raised.value.id == id and tokenizer.vocab_size == 50257


def test_a_noted_token_that_is_not_there_is_an_error(folder):
    place = folder("llama2_model")
    config = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**config, "torchmask_added_tokens": ["<gone>"]}))
    with pytest.raises(ConfigError, match="names <gone>, which the tokenizer does not have"):
        from_pretrained(place)


@pytest.mark.parametrize("name", ["gpt2", "qwen2_files"])
def test_added_tokens_of_any_script_are_decoded_as_they_are(folder, name):
    tokenizer = from_pretrained(folder(name))
    tokenizer.add_tokens(["wörd", "東京", "a b\n", "Ġqz"], special=False)
    for text in ("the wörd", "wörd", "größe wördwörd 東京 é👩‍👩‍👧 a b\n東 Ġqz"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.push, ids), stream.finish()]) == text
    assert tokenizer.encode("the wörd")[-1] == tokenizer.vocab_size - 4


@pytest.mark.parametrize(
    ("name", "piece", "text"),
    [("qwen2_files", "Ġx", " x"), ("gpt2", "Ċ", "\n"), ("llama2_json", "hello", "hello"), ("llama2_model", "▁x", "x"),
     ("llama2_model", "<0x41>", "A"), ("stories260k", "<0x0A>", "\n")],
)  # fmt: skip
@pytest.mark.parametrize("special", [True, False])
def test_a_name_that_the_vocabulary_has_for_another_text_is_refused_with_that_text(folder, name, piece, text, special):
    tokenizer = from_pretrained(folder(name))
    with pytest.raises(ConfigError, match="is how the tokenizer's file spells a token that it has already") as raised:
        tokenizer.add_tokens(["<fine>", piece], special=special)
    assert raised.value.id == "C09"
    assert repr(text) in raised.value.message and raised.value.where == "add_tokens"
    assert tokenizer.num_added == 0


def test_a_stop_token_that_is_added_later_stops_generation(folder):
    """It is asked for twice because it is kept: adding must not leave the old answer."""
    place = folder("gpt2")
    settings = json.loads((place / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|eot|>{% endfor %}"
    (place / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    tokenizer = from_pretrained(place)
    assert tokenizer.stop_ids == (50256,)
    tokenizer.add_tokens("<|eot|>")
    assert tokenizer.stop_ids == (50256, 50257)


def test_a_list_of_added_tokens_is_brought_up_to_date(folder, tmp_path):
    place = folder("gpt2")
    (place / "added_tokens.json").write_text(json.dumps({"<|tool|>": 50257}))
    tokenizer = from_pretrained(place, add_tokens=["<answer>"])
    tokenizer.save(tmp_path / "out")
    assert json.loads((tmp_path / "out/added_tokens.json").read_text()) == {"<|tool|>": 50257, "<answer>": 50258}
    assert json.loads((place / "added_tokens.json").read_text()) == {"<|tool|>": 50257}
