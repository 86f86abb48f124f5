"""Small tokenizers with the parts of each family's tokenizer.json, trained on a few lines."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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
