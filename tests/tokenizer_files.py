"""What tests of tokenizers' files share: texts that they must cut alike, a template, and entries of added tokens."""

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


def token(text, *, special=True, **flags):
    return {"content": text, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
            "special": special, **flags}  # fmt: skip
