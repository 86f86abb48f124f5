"""tokenizer.json files as the families publish them, small: ids, offsets and chats against the libraries."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from torchmask import Message
from torchmask.tokenizers import from_pretrained

CORPUS = [
    "The capital of France is Paris, isn't it? 123 4567 times 89!",
    "def main(x):\n    return x ** 2\n\n\n\tprint('done')  # two  spaces",
    "Ünïcödé text, 東京 is the capital of Japan. We've seen 3.14159 and HTTPServer.",
    "user said hello\nassistant said goodbye\n system user assistant INST [INST] [/INST] <s> </s>",
] * 4
TEXTS = [
    "The capital of France is Paris.",
    "  leading and trailing  ",
    "\n\nline breaks\n\n\n",
    "a\tb\t\tc    d",
    "It's 12345678 o'clock; we'VE 3.14!",
    "Ünïcödé 東京 👩‍👩‍👧 e\u0301 ①",
    "HTTPServer/Client//x\n/y",
    "<table> x </table>",
    "▁ odd ▁▁",
    "",
    " ",
]
CONTROL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level(pre_tokenizer, normalizer=None, *, ignore_merges=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["ignore_merges"] = ignore_merges
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def metaspace_bpe(*, normalizer=None, pre_tokenizer=None, strip=True):
    """Sentencepiece's BPE as transformers converts it: byte fallback, blanks as U+2581."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=480, special_tokens=special, show_progress=False)
    )
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    model = models.BPE(state["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=220, special_tokens=CONTROL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def with_control(tokenizer, *, rstrip=False, ordinary=()):
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=rstrip and t.startswith("<|")) for t in CONTROL]
    )
    tokenizer.add_tokens(list(ordinary))
    return tokenizer


def split_then_bytes(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def plain_bytes():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def prepend():
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def blanks(*, normalized):
    return [AddedToken(" " * i, normalized=normalized) for i in range(24, 1, -1)]


def falcon_cuts():
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            plain_bytes(),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )


FAMILIES = {
    "gpt2": lambda: with_control(byte_level(plain_bytes())),
    "gpt_neox": lambda: with_control(byte_level(plain_bytes(), normalizers.NFC()), ordinary=blanks(normalized=True)),
    "falcon": lambda: with_control(byte_level(falcon_cuts())),
    "bloom": lambda: with_control(byte_level(split_then_bytes(r" ?[^(\s|[.,!?…。，、।۔،])]+"))),
    "smollm": lambda: with_control(
        byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain_bytes()]))
    ),
    "llama3": lambda: with_control(byte_level(split_then_bytes(CL100K), ignore_merges=True)),
    "qwen2": lambda: with_control(byte_level(split_then_bytes(CL100K.replace("{1,3}", "")), normalizers.NFC())),
    "gpt_oss": lambda: with_control(byte_level(split_then_bytes(O200K), ignore_merges=True)),
    "codegen": lambda: with_control(byte_level(plain_bytes()), ordinary=blanks(normalized=False)),
    "prefixed_gpt2": lambda: with_control(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))),
    "llama2": lambda: with_control(metaspace_bpe(normalizer=prepend())),
    "phi3": lambda: with_control(metaspace_bpe(normalizer=prepend()), rstrip=True),
    "mistral_v3": lambda: with_control(
        metaspace_bpe(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    ),
    "gemma": lambda: with_control(
        metaspace_bpe(
            normalizer=normalizers.Replace(" ", "▁"),
            pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
            strip=False,
        ),
        ordinary=[AddedToken(t, normalized=False) for t in ("\n\n", "\n", "▁▁", "▁▁▁▁", "<table>", "</table>")],
    ),
    "unigram": lambda: with_control(unigram()),
    "flags": lambda: with_control(
        byte_level(plain_bytes()),
        ordinary=[
            AddedToken("France", single_word=True, normalized=False),
            AddedToken("Paris", lstrip=True, normalized=False),
            AddedToken("odd", rstrip=True, normalized=False),
            AddedToken("capital", single_word=True, normalized=True),
        ],
    ),
}
NO_BOS = {"gpt2", "qwen2"}


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


def with_front(texts):
    """A post-processor as Llama's and Gemma's files have it."""
    ids = {text: CONTROL.index(text) for text in CONTROL}
    return processors.TemplateProcessing(
        single=" ".join([*texts, "$A"]), pair="$A $B", special_tokens=[(text, ids[text]) for text in texts]
    )


def byte_processor():
    return processors.ByteLevel(trim_offsets=True)


PROCESSORS = {
    "none": (lambda: None, False),
    "bytes": (byte_processor, False),
    "bos": (lambda: with_front(["<s>"]), True),
    "bos in a sequence": (lambda: processors.Sequence([byte_processor(), with_front(["<s>"])]), True),
    "nothing in front": (lambda: with_front([]), False),
    "another token": (lambda: with_front(["<|user|>"]), False),
}


def saved_with(folder, processor, tokenizer, **config):
    ids = tokenizer.get_vocab()
    tokenizer.save(str(folder / "tokenizer.json"))
    state = json.loads((folder / "tokenizer.json").read_text())
    state["post_processor"] = None if processor is None else json.loads(processor.__getstate__())
    for part in [state["post_processor"] or {}, *(state["post_processor"] or {}).get("processors", ())]:
        for text, entry in part.get("special_tokens", {}).items():
            entry["ids"] = [ids[text]]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**roles, **config}))
    return folder


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("front", PROCESSORS)
def test_plain_text_begins_with_bos_where_transformers_begins_it_so(tmp_path, name, front):
    processor, adds_bos = PROCESSORS[front]
    ours = from_pretrained(saved_with(tmp_path, processor(), FAMILIES[name]()))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.adds_bos == adds_bos and ours.bos_id == ours.control_tokens["<s>"]
    if front != "another token":
        assert ours.encode("The capital", add_bos=True) == theirs("The capital")["input_ids"]
    assert ours.encode("The capital", add_bos=True) == [ours.bos_id] * adds_bos + ours.encode("The capital")
    assert ours.encode("", add_bos=True, add_eos=True) == [ours.bos_id] * adds_bos + [ours.eos_id]


def test_a_post_processor_goes_before_the_configuration_and_the_configuration_speaks_where_there_is_none(tmp_path):
    for front, said, expected in [
        ("bos", False, True), ("nothing in front", True, False), ("none", True, True), ("bytes", True, True),
        ("none", False, False),
    ]:  # fmt: skip
        processor = PROCESSORS[front][0]()
        tokenizer = from_pretrained(saved_with(tmp_path, processor, FAMILIES["gpt2"](), add_bos_token=said))
        assert tokenizer.adds_bos == expected, (front, said)
        if processor is not None and front != "bytes":
            begun = AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"][0] == tokenizer.bos_id
            assert begun == expected


def test_a_tokenizer_without_bos_adds_none(tmp_path):
    folder = saved_with(tmp_path, None, FAMILIES["gpt2"](), bos_token=None, add_bos_token=True)
    tokenizer = from_pretrained(folder)
    assert not tokenizer.adds_bos and tokenizer.encode("a", add_bos=True) == tokenizer.encode("a")


def test_alpaca_begins_as_plain_text_does(tmp_path):
    messages = [Message("user", "q"), Message("assistant", "a")]
    for front in ("bos", "none"):
        saved_with(tmp_path, PROCESSORS[front][0](), FAMILIES["gpt2"]())
        tokenizer = from_pretrained(tmp_path, "alpaca")
        assert (tokenizer.render(messages).tokens[0] == tokenizer.bos_id) == (front == "bos")


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
