"""tekken.json: ranks behind control tokens, alone and beside a tokenizer.json."""

import base64
import json

import pytest
import tiktoken
from tokenizer_files import TEXTS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from torchmask import Message
from torchmask.errors import ConfigError
from torchmask.tokenizers import from_pretrained
from torchmask.tokenizers.tekken import TEKKEN_PATTERN, UNLISTED_CONTROL
from torchmask.tokenizers.vocabulary_files import QWEN2_PATTERN


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


def test_of_several_dated_files_the_newest_is_read(gpt2_ranks, tmp_path):
    for date, num_control in (("240718", 20), ("240911", 30), ("240101", 10)):
        tekken_file(tmp_path / f"tekken_{date}.json", gpt2_ranks, num_control=num_control)
    assert from_pretrained(tmp_path).vocab_size == len(gpt2_ranks) + 30


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
