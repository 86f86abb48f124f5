"""Folders without tokenizer.json: sentencepiece, ranks, vocabulary files and tekken.json, with the tokens they add."""

import base64
import json
import shutil

import pytest
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from torchmask import Message
from torchmask.errors import ConfigError
from torchmask.tokenizers import from_pretrained
from torchmask.tokenizers.tekken import TEKKEN_PATTERN, UNLISTED_CONTROL
from torchmask.tokenizers.vocabulary_files import QWEN2_PATTERN

TEXTS = [
    "The capital of France is Paris.",
    "  two  blanks \n\n\n and\tlines\n",
    "It's 12345678 o'clock; we'VE HTTPServer!",
    "Ünïcödé 東京 👩‍👩‍👧 e\u0301",
    "path\n\n/usr/bin\n\nnext paragraph\n\n\n/x",
    "",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [Message("user", "What is <|im_end|>\n it?"), Message("assistant", "Paris")]


def token(text, *, special=True, **flags):
    return {"content": text, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
            "special": special, **flags}  # fmt: skip


@pytest.fixture
def folder_of(assets, tmp_path):
    """A folder with files of the assets and of one's own: `folder_of("llama2", ["tokenizer.model"], **files)`."""

    def make(name, files, **jsons):
        for file in files:
            shutil.copyfile(assets / "tokenizers" / name / file, tmp_path / file)
        for stem, content in jsons.items():
            (tmp_path / f"{stem}.json").write_text(json.dumps(content))
        return tmp_path

    return make


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


# vocab.json with merges.txt


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, "gpt2"),
        ({"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": False}, "gpt2"),
        ({"tokenizer_class": "Qwen2Tokenizer"}, "qwen2"),
        ({"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}, "prefixed"),
        ({}, "gpt2"),
    ],
)
def test_vocabulary_files_are_cut_as_their_class_cuts(folder_of, assets, config, model):
    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    folder = folder_of("gpt2", ["vocab.json", "merges.txt"], tokenizer_config={**roles, **config})
    paths = [str(assets / "tokenizers/gpt2" / name) for name in ("vocab.json", "merges.txt")]
    expected = Tokenizer(models.BPE.from_file(*paths))
    expected.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=model == "prefixed")
    if model == "qwen2":
        expected.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        expected.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer = from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text).ids, text
    if config.get("tokenizer_class") in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        theirs = AutoTokenizer.from_pretrained(folder)
        assert [tokenizer.encode(t) for t in TEXTS] == [theirs(t, add_special_tokens=False)["input_ids"] for t in TEXTS]


@pytest.mark.parametrize(
    ("table", "name", "is_composed", "digits_alone"),
    [
        ("tokenizer_config", "GPT2Tokenizer", False, False),
        ("tokenizer_config", "CodeGenTokenizer", False, False),
        ("tokenizer_config", "GPTNeoXTokenizer", True, False),
        ("tokenizer_config", "GPTNeoXTokenizerFast", True, False),
        ("tokenizer_config", "Qwen2Tokenizer", True, True),
        ("config", "gpt2", False, False),
        ("config", "codegen", False, False),
        ("config", "gpt_neox", True, False),
        ("config", "qwen2", True, True),
        ("config", "qwen2_moe", True, True),
        ("config", "qwen3", True, True),
        ("config", "qwen3_moe", True, True),
    ],
)
def test_vocabulary_files_are_cut_as_those_cut_whose_they_are(folder_of, table, name, is_composed, digits_alone):
    key = "tokenizer_class" if table == "tokenizer_config" else "model_type"
    tokenizer = from_pretrained(folder_of("gpt2", ["vocab.json", "merges.txt"], **{table: {key: name}}))
    assert (tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")) == is_composed
    assert (len(tokenizer.encode("12345")) == 5) == digits_alone
    assert tokenizer.adds_bos is False


def test_every_kind_of_vocabulary_files_is_in_the_table_above():
    from torchmask.tokenizers import vocabulary_files

    assert set(vocabulary_files._KINDS) == {"GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer"}
    expected = {"gpt2", "codegen", "gpt_neox", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
    assert set(vocabulary_files._KIND_OF_MODEL) == expected


@pytest.mark.parametrize("model_type", ["olmo2", "roberta", "falcon", "bloom"])
def test_vocabulary_files_of_an_unknown_model_type_are_refused(folder_of, model_type):
    folder = folder_of("gpt2", ["vocab.json", "merges.txt"], config={"model_type": model_type})
    with pytest.raises(ConfigError, match=f"the model_type {model_type}, and how it cuts text is not known") as raised:
        from_pretrained(folder)
    assert raised.value.id == "C11" and raised.value.where.endswith("config.json")


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


def test_vocabulary_files_of_an_unknown_class_are_refused(folder_of):
    config = {"tokenizer_class": "RobertaTokenizer"}
    folder = folder_of("gpt2", ["vocab.json", "merges.txt"], tokenizer_config=config)
    with pytest.raises(ConfigError, match="RobertaTokenizer, and how it cuts text is not known") as raised:
        from_pretrained(folder)
    assert raised.value.id == "C11" and "tokenizer.json" in str(raised.value)


def test_phi2s_runs_of_blanks_are_tokens_of_its_vocabulary_files(folder_of):
    runs = [" " * i for i in range(31, 1, -1)]
    by_id = {str(50257 + i): token(run, special=False, normalized=True) for i, run in enumerate(runs)}
    config = {"tokenizer_class": "CodeGenTokenizer", "added_tokens_decoder": by_id, "eos_token": "<|endoftext|>"}
    folder = folder_of("gpt2", ["vocab.json", "merges.txt"], tokenizer_config=config)
    tokenizer = from_pretrained(folder)
    four = 50257 + runs.index("    ")
    assert tokenizer.encode("a    b").count(four) == 1 and tokenizer.vocab_size == 50287
    assert tokenizer.decode(tokenizer.encode("a    b\n  c")) == "a    b\n  c"
    ids, starts, ends = tokenizer.encode_with_offsets("a    b")
    assert (starts[1], ends[1]) == (1, 5)
    shutil.move(folder / "tokenizer_config.json", folder / "unused")
    (folder / "added_tokens.json").write_text(json.dumps({run: 50257 + i for i, run in enumerate(runs)}))
    assert from_pretrained(folder).encode("a    b") == ids.tolist()


def test_qwen2s_control_tokens_come_from_the_configuration(folder_of):
    by_id = {str(50257 + i): token(t) for i, t in enumerate(["<|im_start|>", "<|im_end|>"])}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": by_id, "bos_token": None}
    config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    folder = folder_of("gpt2", ["vocab.json", "merges.txt"], tokenizer_config=config)
    ours, theirs = from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, 50258, 50256)
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]
    expected = theirs.apply_chat_template(chat, return_dict=False)
    assert ours.tokenize_messages([Message(**m) for m in chat])[0] == expected


# tekken.json


def tekken_file(path, ranks, *, num_control=20, num_ranks=None, special_tokens=None, pattern=TEKKEN_PATTERN, **config):
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    num_ranks = num_ranks or len(vocab)
    config = {
        "pattern": pattern,
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": num_ranks + num_control,
        "default_num_special_tokens": num_control,
        "version": "v3",
        **config,
    }
    content = {"config": config, "vocab": vocab}
    if special_tokens is not None:
        content["special_tokens"] = special_tokens
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def gpt2_ranks(assets):
    """GPT-2's vocabulary as tiktoken's ranks: bytes first, then merges in order."""
    alphabet = {char: byte for byte, char in byte_alphabet().items()}
    lines = (assets / "tokenizers/gpt2/merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes(alphabet[c] for c in line.replace(" ", "")) for line in lines if line]
    return {token: rank for rank, token in enumerate(tokens)}


def byte_alphabet():
    """GPT-2's character for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {**{b: chr(b) for b in shown}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


def test_tekken_is_tiktoken_behind_a_block_of_control_tokens(gpt2_ranks, tmp_path):
    tekken_file(tmp_path / "tekken.json", gpt2_ranks, num_control=1000, num_ranks=40_000)
    tokenizer = from_pretrained(tmp_path)
    used = {token: rank for token, rank in gpt2_ranks.items() if rank < 40_000}
    expected = tiktoken.Encoding("x", pat_str=TEKKEN_PATTERN, mergeable_ranks=used, special_tokens={})
    for text in TEXTS:
        ids = [1000 + id for id in expected.encode_ordinary(text)]
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        found, starts, ends = tokenizer.encode_with_offsets(text)
        assert found.tolist() == ids and (starts[1:] <= ends[:-1]).all() and (ends[-1:] == len(text)).all()
    assert tokenizer.vocab_size == 41_000
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (1, 2, 11, (2,))
    assert [tokenizer.control_tokens[t] for t in ("[INST]", "[/INST]", "[TOOL_CALLS]", "<SPECIAL_20>")] == [3, 4, 9, 20]
    control = set(tokenizer.control_tokens.values())
    assert all(control.isdisjoint(tokenizer.encode(f" {text}x")) for text in tokenizer.control_tokens)
    assert tokenizer.id_to_piece(3) == "[INST]" and tokenizer.id_to_piece(1000 + ord("a")) == "a"


def test_many_texts_of_tekken_at_once_are_encoded_like_each_alone(gpt2_ranks, tmp_path):
    tekken_file(tmp_path / "tekken.json", gpt2_ranks)
    backend = from_pretrained(tmp_path)._backend
    texts = [*TEXTS, "one\n\ntwo!\n\n/three\n\nfour.\n\n /x", *TEXTS, "[/INST]" * 30 + "".join(backend.specials)]
    found = backend.encode_many(texts)
    for i, text in enumerate(texts):
        here = slice(found.offsets[i], found.offsets[i + 1])
        for column, alone in zip(found[:3], backend.encode_with_offsets(text), strict=True):
            assert column[here].tolist() == alone.tolist(), text


def test_newer_tekken_files_list_their_control_tokens(gpt2_ranks, tmp_path):
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[THINK]", "<pad>"]
    listed = [{"rank": i, "token_str": t, "is_control": t != "[THINK]"} for i, t in enumerate(names)]
    tekken_file(tmp_path / "tekken.json", gpt2_ranks, special_tokens=listed, version="v13")
    tokenizer = from_pretrained(tmp_path)
    assert [tokenizer.control_tokens[t] for t in ("[THINK]", "<pad>", "<SPECIAL_7>")] == [5, 6, 7]
    assert tokenizer.decode([1, 5, *tokenizer.encode("x")]) == "[THINK]x" and 5 not in tokenizer.encode("[THINK]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"default_vocab_size": 10**6}, "50256 tokens have a rank below 999980"),
        ({"default_num_special_tokens": "many"}, "not a tekken file"),
        ({"default_num_special_tokens": 3, "default_vocab_size": 50_000}, "special_tokens are not 3 or fewer"),
    ],
)
def test_damaged_tekken_files_are_named_with_their_fault(gpt2_ranks, tmp_path, change, message):
    tekken_file(tmp_path / "tekken.json", gpt2_ranks, **change)
    with pytest.raises(ConfigError, match=message) as raised:
        from_pretrained(tmp_path)
    assert raised.value.id == "C11" and "tekken.json" in str(raised.value)


# two in one folder


def tekken_as_library(ranks, *, pattern=TEKKEN_PATTERN):
    """The tokenizer.json of a tekken.json, as Mistral's folders have both."""
    alphabet = byte_alphabet()
    vocab = {"".join(alphabet[b] for b in token): 20 + rank for token, rank in ranks.items()}
    control = UNLISTED_CONTROL
    merges = []
    for token, rank in ranks.items():
        if rank >= 256:
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 10**9))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            merges.append(tuple("".join(alphabet[b] for b in part) for part in parts))
    vocab |= {text: id for id, text in enumerate(control)}
    library = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return library


@pytest.mark.parametrize("pattern", [TEKKEN_PATTERN, QWEN2_PATTERN], ids=["right", "wrong"])
def test_tekken_and_its_json_agree_also_where_the_json_cuts_otherwise(gpt2_ranks, tmp_path, pattern):
    ranks = {token: rank for token, rank in gpt2_ranks.items() if rank < 5000}
    tekken_file(tmp_path / "tekken.json", ranks)
    alone = from_pretrained(tmp_path)
    tekken_as_library(ranks, pattern=pattern).save(str(tmp_path / "tokenizer.json"))
    both = from_pretrained(tmp_path)
    assert {path.name for path in both.identity()["files"]} == {"tokenizer.json", "tekken.json"}
    for text in TEXTS:
        assert both.encode(text) == alone.encode(text), text
    assert both.vocab_size == alone.vocab_size and both.control_tokens == alone.control_tokens
    chat = [Message("user", "path\n/x [INST]"), Message("assistant", "ok")]
    written = from_pretrained(tmp_path, "mistral_tekken").tokenize_messages(chat)
    (tmp_path / "tokenizer.json").unlink()
    assert from_pretrained(tmp_path, "mistral_tekken").tokenize_messages(chat) == written


def test_vocabulary_files_and_the_json_that_transformers_makes_of_them_agree(folder_of, tmp_path_factory):
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    folder = folder_of("gpt2", ["vocab.json", "merges.txt"], tokenizer_config=config)
    other = tmp_path_factory.mktemp("json")
    AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    ours, by_json = from_pretrained(folder), from_pretrained(other)
    assert (other / "tokenizer.json").is_file() and not (folder / "tokenizer.json").is_file()
    assert [ours.encode(text) for text in TEXTS] == [by_json.encode(text) for text in TEXTS]
    assert ours.stop_ids == by_json.stop_ids


def test_a_folder_with_everything_reads_tokenizer_json(folder_of, gpt2_ranks):
    folder = folder_of("llama2", ["tokenizer.json", "tokenizer.model"])
    tekken_file(folder / "tekken_240718.json", gpt2_ranks)
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("")
    assert from_pretrained(folder).vocab_size == 32000
    (folder / "tokenizer.json").unlink()
    assert from_pretrained(folder).vocab_size == 50276
    (folder / "tekken_240718.json").unlink()
    assert from_pretrained(folder).vocab_size == 32000


def test_mistrals_own_names_of_sentencepiece_files_are_known(assets, tmp_path):
    shutil.copyfile(assets / "tokenizers/mistral_v3/tokenizer.model", tmp_path / "tokenizer.model.v3")
    assert from_pretrained(tmp_path).control_tokens["[INST]"] == 3


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
