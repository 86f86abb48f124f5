"""BOS in front of plain text: where transformers puts it, whatever the file and its configuration say of it."""

import json

import pytest
from family_tokenizers import CONTROL, FAMILIES
from tokenizers import processors
from transformers import AutoTokenizer

from torchmask import Message
from torchmask.tokenizers import from_pretrained


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
