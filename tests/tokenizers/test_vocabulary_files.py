"""vocab.json with merges.txt: cut as the class cuts whose they are, or refused."""

import json
import shutil

import pytest
from tokenizer_files import CHATML, TEXTS, token
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from torchmask import Message
from torchmask.errors import ConfigError
from torchmask.tokenizers import from_pretrained
from torchmask.tokenizers.vocabulary_files import QWEN2_PATTERN


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


HTML = ("<s>", "</s>", "<unk>")


@pytest.fixture
def vocabulary_with_html(folder_of):
    """GPT-2's files with three more tokens, as Qwen's vocab.json has them: tags that its texts had."""

    def make(**configs):
        folder = folder_of("gpt2", ["vocab.json", "merges.txt"], **configs)
        vocab = json.loads((folder / "vocab.json").read_text())
        (folder / "vocab.json").write_text(json.dumps({**vocab, **{text: 50257 + i for i, text in enumerate(HTML)}}))
        return folder

    return make


@pytest.mark.parametrize(
    ("configs", "is_control"),
    [
        ({"config": {"model_type": "qwen2"}}, False),
        ({"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}}, False),
        ({"config": {"model_type": "gpt2"}}, True),
    ],
)
def test_tags_in_qwens_vocabulary_are_no_control_tokens(vocabulary_with_html, configs, is_control):
    tokenizer = from_pretrained(vocabulary_with_html(**configs))
    assert [text in tokenizer.control_tokens for text in HTML] == [is_control] * 3
    assert tokenizer.eos_id == (50258 if is_control else 50256)


@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_an_eos_that_the_vocabulary_does_not_reach_is_refused(vocabulary_with_html, name):
    configs = {"config": {"model_type": "qwen2"}}
    configs[name] = {**configs.get(name, {}), "eos_token_id": 50260}
    folder = vocabulary_with_html(**configs)
    with pytest.raises(ConfigError, match="eos_token_id is 50260, and the tokenizer's ids end at 50259") as raised:
        from_pretrained(folder)
    assert raised.value.id == "C11" and raised.value.where == str(folder / f"{name}.json")
    tokenizer = from_pretrained(folder, add_tokens=["<|im_end|>"])
    assert tokenizer.decode([tokenizer.eos_id], skip_special=False) == "<|im_end|>"


def test_other_roles_that_the_vocabulary_does_not_reach_do_not_exist(vocabulary_with_html):
    config = {"model_type": "qwen2", "bos_token_id": 151643, "pad_token_id": 151643}
    tokenizer = from_pretrained(vocabulary_with_html(config=config))
    assert (tokenizer.bos_id, tokenizer.pad_id) == (None, None)


def test_the_usual_name_of_padding_is_known(vocabulary_with_html):
    folder = vocabulary_with_html(config={"model_type": "gpt2"})
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocab, "<pad>": 50260}))
    tokenizer = from_pretrained(folder)
    assert tokenizer.pad_id == 50260 and 50260 not in tokenizer.encode("<pad>")
