"""Folders without tokenizer.json: sentencepiece, ranks, vocabulary files and tekken.json, with the tokens they add."""

import json
import shutil

import pytest
from tokenizer_files import CHATML, TEXTS, token
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from torchmask import Message
from torchmask.errors import ConfigError
from torchmask.tokenizers import from_pretrained

CHAT = [Message("user", "What is <|im_end|>\n it?"), Message("assistant", "Paris")]


# sentencepiece with added tokens


@pytest.fixture
def chatml_finetune(folder_of):
    """A sentencepiece model to which a fine-tune added ChatML's tokens, in each of the ways the Hub has them."""

    def make(way):
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "eos_token": "<|im_end|>", "bos_token": "<s>"}
        config |= {"chat_template": CHATML, "pad_token": "</s>", "unk_token": "<unk>"}
        by_id = {"32000": token("<|im_end|>"), "32001": token("<|im_start|>")}
        files = {
            "added_tokens": {"added_tokens": {"<|im_start|>": 32001, "<|im_end|>": 32000}},
            "decoder": {"tokenizer_config": {**config, "added_tokens_decoder": by_id}},
            "list": {"special_tokens_map": {"additional_special_tokens": ["<|im_end|>", "<|im_start|>"]}},
        }[way]
        return folder_of("llama2", ["tokenizer.model"], **{"tokenizer_config": config, **files})

    return make


@pytest.mark.parametrize("way", ["added_tokens", "decoder", "list"])
def test_tokens_added_to_sentencepiece_have_the_ids_that_the_folder_gives_them(chatml_finetune, way):
    tokenizer = from_pretrained(chatml_finetune(way))
    added = {"<|im_start|>": 32001, "<|im_end|>": 32000}
    assert added.items() <= dict(tokenizer.control_tokens).items() and tokenizer.vocab_size == 32002
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 32000, 2)
    for chat_format in (None, "chatml"):
        tokens, mask = from_pretrained(tokenizer.folder, chat_format).tokenize_messages(CHAT)
        assert tokens.count(32000) == tokens.count(32001) == 2
        assert [t for t, flag in zip(tokens, mask, strict=True) if flag == 0][-1] == 32000
        text = "<|im_start|> user\n What is <|im_end|>\n it?<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>\n"
        assert tokenizer.decode(tokens, skip_special=False).replace(" ", "") == text.replace(" ", "")
    assert tokenizer.id_to_piece(32001) == "<|im_start|>"


def test_added_tokens_leave_plain_text_as_it_is(chatml_finetune, load):
    tokenizer = from_pretrained(chatml_finetune("decoder"))
    for text in [*TEXTS, "a<|im_end|>b"]:
        assert tokenizer.encode(text) == load("llama2").encode(text)
        assert tokenizer.encode_with_offsets(text)[1].tolist() == load("llama2").encode_with_offsets(text)[1].tolist()


def test_phi3s_sentencepiece_and_its_json_agree(folder_of, assets):
    names = ["<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|end|>", "<|user|>"]
    by_id = {str(32000 + i): token(name, rstrip=i > 0) for i, name in enumerate(names)}
    template = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": by_id, "eos_token": "<|endoftext|>"}
    config |= {"chat_template": template, "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    folder = folder_of("llama2", ["tokenizer.model"], tokenizer_config=config)
    (folder / "json").mkdir()
    library = Tokenizer.from_file(str(assets / "tokenizers/llama2/tokenizer.json"))
    flags = [AddedToken(name, special=True, normalized=False, rstrip=i > 0) for i, name in enumerate(names)]
    library.add_special_tokens(flags)
    library.save(str(folder / "json" / "tokenizer.json"))
    (folder / "json" / "tokenizer_config.json").write_text(json.dumps(config))
    by_model, by_json = from_pretrained(folder), from_pretrained(folder / "json")
    chat = [Message("user", "  Hi <|end|>\n"), Message("assistant", "\nParis is "), Message("user", "x")]
    assert by_model.tokenize_messages(chat) == by_json.tokenize_messages(chat)
    assert 13 not in by_model.tokenize_messages([Message("user", "Hi")])[0]  # no line break is left
    library.encode_special_tokens = False
    text = "<|user|>\nHi there<|end|>\n<|assistant|>\nParis<|end|>\n"
    expected = library.encode(text, add_special_tokens=False).ids
    assert by_model.tokenize_messages([Message("user", "Hi there"), Message("assistant", "Paris")])[0] == expected


def test_ordinary_pieces_that_the_configuration_calls_special_are_never_made_from_text(folder_of, load):
    piece = "▁capital"  # Code Llama's ▁<PRE> is such an ordinary piece of its file
    id = load("llama2").encode("capital")[0]
    config = {"added_tokens_decoder": {str(id): token(piece)}, "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = from_pretrained(folder_of("llama2", ["tokenizer.model"], tokenizer_config=config))
    assert tokenizer.control_tokens[piece] == id
    assert id not in tokenizer.encode("The capital of France")
    assert tokenizer.decode(tokenizer.encode("The capital of France")) == "The capital of France"
    assert tokenizer.encode("The city of Paris") == load("llama2").encode("The city of Paris")


def test_a_configuration_may_give_reserved_pieces_names(folder_of):
    config = {"added_tokens_decoder": {"7": token("<|im_start|>")}, "eos_token": "<eos>", "bos_token": "<bos>"}
    tokenizer = from_pretrained(folder_of("gemma", ["tokenizer.model"], tokenizer_config=config))
    assert tokenizer.control_tokens["<|im_start|>"] == 7 and tokenizer.vocab_size == 256000
    assert 7 not in [id for text, id in tokenizer.control_tokens.items() if text != "<|im_start|>"]


def test_ordinary_added_tokens_are_found_in_text_with_their_flags(folder_of):
    by_id = {
        "32000": token("Paris", special=False, lstrip=True),
        "32001": token("cat", special=False, single_word=True),
        "32002": token("odd", special=False, rstrip=True),
    }
    folder = folder_of("llama2", ["tokenizer.model"], tokenizer_config={"added_tokens_decoder": by_id})
    tokenizer = from_pretrained(folder)
    ids, starts, ends = tokenizer.encode_with_offsets("in  Paris, concat cat odd  x")
    spans = {int(id): (int(a), int(b)) for id, a, b in zip(ids, starts, ends, strict=True) if id >= 32000}
    assert spans == {32000: (2, 9), 32001: (18, 21), 32002: (22, 27)}
    assert ids.tolist() == tokenizer.encode("in  Paris, concat cat odd  x")
    assert tokenizer.decode(tokenizer.encode("see Paris")) == "seeParis"  # blanks of the token are not its text
    assert "32001" not in map(str, tokenizer.encode("concat"))


@pytest.mark.parametrize("setting", [{"legacy": False}, {"legacy": True}, {"add_prefix_space": False}])
def test_sentencepiece_puts_blanks_where_transformers_legacy_flag_says(folder_of, load, setting):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template, **setting}
    tokenizer = from_pretrained(folder_of("llama2", ["tokenizer.model"], tokenizer_config=config))
    has_prefix, hi, prefixed = "add_prefix_space" not in setting, [18567], load("llama2").encode("Hi")
    assert tokenizer.encode("Hi") == (prefixed if has_prefix else hi)
    tokens, _ = tokenizer.tokenize_messages([Message("user", "Hi"), Message("assistant", "Hi")])
    piece = prefixed if setting.get("legacy") else hi
    assert tokens == [1, *piece, 2, *piece, 2]
    assert tokenizer.decode(tokens) == ("Hi Hi" if setting.get("legacy") else "HiHi")


def test_two_added_tokens_with_one_id_are_an_error(folder_of):
    config = {"added_tokens_decoder": {"32000": token("<a>")}}
    folder = folder_of("llama2", ["tokenizer.model"], tokenizer_config=config, added_tokens={"<b>": 32000})
    with pytest.raises(ConfigError, match="'<b>' and '<a>' have the same id 32000"):
        from_pretrained(folder)


@pytest.mark.parametrize("content", [{"added_tokens_decoder": {"x": "y"}}, {"added_tokens_decoder": {"1": {}}}])
def test_added_tokens_in_another_form_are_an_error(folder_of, content):
    with pytest.raises(ConfigError, match="not in the form that transformers writes") as raised:
        from_pretrained(folder_of("llama2", ["tokenizer.model"], tokenizer_config=content))
    assert raised.value.id == "C10"


# tiktoken ranks


def test_a_configuration_names_tokens_of_llama3s_ranks_and_adds_more(folder_of):
    by_id = {"128005": token("<|tool|>"), "128256": token("<|extra|>"), "128257": token("zebra", special=False)}
    config = {"added_tokens_decoder": by_id, "eos_token": "<|eot_id|>"}
    tokenizer = from_pretrained(folder_of("llama3", ["tokenizer.model"], tokenizer_config=config))
    assert tokenizer.vocab_size == 128258 and tokenizer.eos_id == 128009
    assert [tokenizer.control_tokens[t] for t in ("<|tool|>", "<|extra|>", "<|eot_id|>")] == [128005, 128256, 128009]
    assert "<|reserved_special_token_2|>" not in tokenizer.control_tokens
    assert 128257 in tokenizer.encode("a zebra") and 128256 not in tokenizer.encode("<|extra|>")
    assert tokenizer.decode(tokenizer.encode("a zebra here")) == "a zebra here"


# BOS in front of plain text


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize(
    ("name", "files", "config"),
    [
        ("llama2", ["tokenizer.model"], {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}),
        ("gemma", ["tokenizer.model"], {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>"}),
        ("gpt2", ["vocab.json", "merges.txt"], {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>"}),
        (
            "gpt2",
            ["vocab.json", "merges.txt"],
            {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": "<|endoftext|>"},
        ),
    ],
)
def test_add_bos_token_of_the_configuration_is_heeded_as_by_transformers(folder_of, name, files, config, said):
    folder = folder_of(name, files, tokenizer_config={**config, "add_bos_token": said})
    tokenizer = from_pretrained(folder)
    assert tokenizer.adds_bos == said and tokenizer.bos_id is not None
    assert tokenizer.encode("Hi", add_bos=True) == AutoTokenizer.from_pretrained(folder)("Hi")["input_ids"]


@pytest.mark.parametrize(
    ("name", "adds_bos"),
    [("llama2", True), ("llama3", True), ("gemma", True), ("mistral_v3", True), ("stories260k", True),
     ("gpt2", False), ("qwen3", False)],
)  # fmt: skip
def test_a_published_file_alone_says_whether_text_begins_with_bos(load, name, adds_bos):
    tokenizer = load(name)
    assert tokenizer.adds_bos == adds_bos
    assert tokenizer.encode("Hi", add_bos=True) == [tokenizer.bos_id] * adds_bos + tokenizer.encode("Hi")


def test_tokens_added_to_sentencepiece_leave_bos_in_front_of_text(chatml_finetune):
    assert from_pretrained(chatml_finetune("decoder")).encode("Hi", add_bos=True)[0] == 1


def test_vocabulary_files_and_the_json_that_transformers_makes_of_them_agree(folder_of, tmp_path_factory):
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    folder = folder_of("gpt2", ["vocab.json", "merges.txt"], tokenizer_config=config)
    other = tmp_path_factory.mktemp("json")
    AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    ours, by_json = from_pretrained(folder), from_pretrained(other)
    assert (other / "tokenizer.json").is_file() and not (folder / "tokenizer.json").is_file()
    assert [ours.encode(text) for text in TEXTS] == [by_json.encode(text) for text in TEXTS]
    assert ours.stop_ids == by_json.stop_ids


def test_mistrals_own_names_of_sentencepiece_files_are_known(assets, tmp_path):
    shutil.copyfile(assets / "tokenizers/mistral_v3/tokenizer.model", tmp_path / "tokenizer.model.v3")
    assert from_pretrained(tmp_path).control_tokens["[INST]"] == 3


def test_of_several_versions_of_a_sentencepiece_file_the_newest_is_read(assets, tmp_path):
    for name, version in (("llama2", "v1"), ("mistral_v3", "v3"), ("llama2", "v2")):
        shutil.copyfile(assets / "tokenizers" / name / "tokenizer.model", tmp_path / f"tokenizer.model.{version}")
    assert from_pretrained(tmp_path).vocab_size == 32768


# what tokenizer_config.json adds to tokenizer.json


def test_tokens_that_only_the_configuration_has_are_added_to_the_json(folder_of):
    by_id = {"32000": token("<|im_start|>"), "32001": token("<|im_end|>")}
    config = {"added_tokens_decoder": by_id, "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    tokenizer = from_pretrained(folder_of("llama2", ["tokenizer.json"], tokenizer_config=config))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (32001, 32002, 32003)
    assert 32001 not in tokenizer.encode("<|im_end|>")


def test_an_id_that_the_json_cannot_give_is_an_error(folder_of):
    config = {"added_tokens_decoder": {"32005": token("<|im_start|>")}}
    with pytest.raises(
        ConfigError, match=r"the added token '<\|im_start\|>' the id 32005, in the file it would have 32000"
    ):
        from_pretrained(folder_of("llama2", ["tokenizer.json"], tokenizer_config=config))
