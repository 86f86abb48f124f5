"""TRL's completion-only collator and prompt-completion rows beside ours: the same labels where TRL is right.

TRL searches for the ids that a template has when it is tokenised alone. Where it finds as many of them as the text has
templates it is right, and our labels are its labels, id by id; where it does not, ours are those that the characters
say.
The reference is trl 0.19.1, the last that has the collator.
"""

import json
import warnings

import numpy as np
import pytest

from torchmask.data import PackedDataset, alpaca_dataset, chat_dataset, instruct_dataset, text_completion_dataset
from torchmask.data.formats import alpaca_format
from torchmask.data.rows import Row
from torchmask.data.squad import expand_squad, read_question, squad_conversation

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

HUMAN, ASSISTANT = "### Human:", "### Assistant:"
ALL = ("llama2", "llama3", "gpt2", "qwen3")
ROWS = ("alpaca", "alpaca, newline", "squad", "dpo", "dpo, one turn", "glaive", "glaive, one line")


class Pair:
    """One tokenizer as ours and as transformers', with a padding token of its own."""

    def __init__(self, ours, folder):
        by_id = {id: text for text, id in ours.control_tokens.items()}
        self.ours, self.eos = ours, by_id[ours.eos_id]
        special = {"eos_token": self.eos, "pad_token": "<padding of its own>"}
        if ours.bos_id is not None:
            special["bos_token"] = by_id[ours.bos_id]
        self.theirs = transformers.PreTrainedTokenizerFast(**_source(folder, by_id), **special)

    def ids(self, text, *, eos=True):
        """`BOS text EOS`, as trl's trainer feeds its collator."""
        bos = [self.ours.bos_id] if self.ours.adds_bos else []
        return bos + self.theirs.encode(text, add_special_tokens=False) + [self.ours.eos_id] * eos

    def trl_labels(self, ids, response, instruction=None, **options):
        """The collator's labels of one row."""
        from trl.trainer.utils import DataCollatorForCompletionOnlyLM

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated there, and a warning for each row that it gives up
            collator = DataCollatorForCompletionOnlyLM(response, instruction, tokenizer=self.theirs, **options)
            return collator([{"input_ids": ids}])["labels"][0].tolist()


def _source(folder, by_id):
    """What transformers makes a tokenizer of."""
    if (folder / "tokenizer.json").exists():
        return {"tokenizer_file": str(folder / "tokenizer.json")}
    if (folder / "tokenizer.model").exists():
        from transformers.convert_slow_tokenizer import TikTokenConverter

        special = [by_id[id] for id in sorted(by_id)]
        model = str(folder / "tokenizer.model")
        return {"tokenizer_object": TikTokenConverter(model, additional_special_tokens=special).converted()}
    import tokenizers

    model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {"tokenizer_object": built}


@pytest.fixture(scope="module")
def pairs(assets):
    from torchmask.tokenizers import from_pretrained

    made = {}

    def pair(name):
        if name not in made:
            folder = assets / "tokenizers" / name
            made[name] = Pair(from_pretrained(folder), folder)
        return made[name]

    return pair


@pytest.fixture(scope="module")
def texts(assets):
    """The rows of each data set as texts, with their templates."""

    def rows(name):
        return json.loads((assets / "data" / name).read_text(encoding="utf-8"))

    def talk(row, write):
        turns = row["conversations"] + ([row["chosen"]] if "chosen" in row else [])
        asks = ("human", "observation")
        return "".join(write(turn["from"] in asks, turn["value"]) for turn in turns if turn["from"] != "system")

    def lines(is_human, value):
        return f"{HUMAN if is_human else ASSISTANT} {value}\n\n"

    def one_line(is_human, value):  # Vicuna's way: the blank belongs to the answer, `▁US` to the template
        return f"{'USER:' if is_human else 'ASSISTANT:'} {value} "

    alpaca = [alpaca_format(Row("", i, row)).messages for i, row in enumerate(rows("alpaca_en_demo.json")[:80])]
    squad = expand_squad(iter([Row("", 1, rows("squad_v2_cs224n_dev.json"))]))
    squad = [squad_conversation(read_question(row, None)).messages for row, _ in zip(squad, range(40))]
    dpo, glaive = rows("dpo_en_demo_200.json")[:40], rows("glaive_toolcall_en_demo_150.json")[:40]
    return {
        "alpaca": (["".join(m.text for m in talk) for talk in alpaca], "### Response:", None),
        "alpaca, newline": (["\n".join(m.text for m in talk) for talk in alpaca], "### Response:\n", None),
        "squad": ([f"{q.text}\n\n{ASSISTANT} {a.text}" for q, a in squad], ASSISTANT, None),
        "dpo": ([talk(row, lines) for row in dpo], ASSISTANT, HUMAN),
        "dpo, one turn": ([talk(row, lines) for row in dpo if len(row["conversations"]) == 1], ASSISTANT, None),
        "glaive": ([talk(row, lines) for row in glaive], ASSISTANT, HUMAN),
        "glaive, one line": ([talk(row, one_line) for row in glaive], "ASSISTANT:", "USER:"),
    }


def ours_of(pair, texts, write, response, instruction=None, **options):
    path = write("rows.jsonl", [{"text": text} for text in texts])
    return text_completion_dataset(
        pair.ours, source=path, response_template=response, instruction_template=instruction, **options
    )


def labels_of(sample):
    return np.where(sample.trained, sample.tokens, -100).tolist()


def labels_by_characters(pair, text, response, instruction):
    """An oracle of its own: transformers' offsets, and answers found by str.find."""
    spans, at = [], 0
    while True:
        begin = text.find(response, at) if instruction else text.rfind(response)
        if begin < 0:
            break
        begin += len(response)
        end = text.find(instruction, begin) if instruction else -1
        spans.append((begin, len(text) if end < 0 else end))
        if end < 0:
            break
        at = end
    found = pair.theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [-100] if pair.ours.adds_bos else []
    for id, (start, stop) in zip(found["input_ids"], found["offset_mapping"]):
        mine = any(start < end and stop > begin and text[max(start, begin) : min(stop, end)] for begin, end in spans)
        # a token that begins in an answer and goes on in the next template, with only a blank of the answer
        mine &= not any(start < end < stop and not text[start:end].strip() for _, end in spans)
        labels.append(id if mine else -100)
    return [*labels, pair.ours.eos_id]


def is_found(pair, ids, template, text):
    """Whether a search for the template's ids finds it as often as the text has it."""
    wanted = pair.theirs.encode(template, add_special_tokens=False)
    hits = sum(ids[i : i + len(wanted)] == wanted for i in range(len(ids)))
    return hits == text.count(template)


# (tokenizer, rows) -> in how many of the rows trl finds the templates
FOUND = {
    ("llama2", "alpaca"): 0, ("llama3", "alpaca"): 0.5, ("gpt2", "alpaca"): 0.5, ("qwen3", "alpaca"): 0.5,
    ("llama2", "glaive, one line"): 1, ("gpt2", "glaive, one line"): 0, ("gpt2", "dpo"): 1, ("llama3", "dpo"): 1,
    ("qwen3", "glaive"): 1, ("llama2", "glaive"): 0, ("gpt2", "squad"): 1, ("llama3", "squad"): 1,
}  # fmt: skip


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ALL)
def test_labels_are_those_of_trl_where_it_finds_its_templates_and_those_of_the_characters_where_not(
    name, rows, pairs, texts, write
):
    pair, (all_texts, response, instruction) = pairs(name), texts[rows]
    samples = ours_of(pair, all_texts, write, response, instruction)
    num_found = 0
    for text, sample in zip(all_texts, samples, strict=True):
        ids = pair.ids(text)
        assert sample.tokens.tolist() == ids
        found = is_found(pair, ids, response, text) and (not instruction or is_found(pair, ids, instruction, text))
        theirs = pair.trl_labels(ids, response, instruction) if found else None
        assert labels_of(sample) == (theirs or labels_by_characters(pair, text, response, instruction))
        num_found += found
    share = FOUND.get((name, rows))
    if share == 0.5:  # answers that begin with a line break are merged with the template's colon
        assert 0 < num_found < len(all_texts)
    elif share is not None:
        assert num_found == share * len(all_texts)


def test_ids_cut_out_of_context_which_trl_advises_for_llama2_give_our_labels(pairs, texts, write):
    """`tokenizer.encode("\\n### Assistant:")[2:]` is what a user has to work out by hand there."""
    pair, (all_texts, *_) = pairs("llama2"), texts["glaive"]
    all_texts = ["A chat.\n\n" + text for text in all_texts]  # or the first template has other ids than the next ones
    response, instruction = (
        pair.theirs.encode("\n" + template, add_special_tokens=False)[2:] for template in (ASSISTANT, HUMAN)
    )
    samples = ours_of(pair, all_texts, write, ASSISTANT, HUMAN)
    for text, sample in zip(all_texts, samples, strict=True):
        assert labels_of(sample) == pair.trl_labels(pair.ids(text), response, instruction)


def test_chatml_as_plain_text_gives_trls_labels(pairs, texts, write, assets):
    """Templates that are control tokens, which the text has as such."""
    pair = pairs("qwen3")
    response, instruction = "<|im_start|>assistant\n", "<|im_start|>user\n"
    talks = json.loads((assets / "data/dpo_en_demo_200.json").read_text(encoding="utf-8"))[:40]
    all_texts = [
        "".join(
            f"{instruction if turn['from'] == 'human' else response}{turn['value']}<|im_end|>\n"
            for turn in [*talk["conversations"], talk["chosen"]]
        )
        for talk in talks
    ]
    samples = ours_of(pair, all_texts, write, response, instruction, allow_special=True, add_eos=False)
    for text, sample in zip(all_texts, samples, strict=True):
        assert labels_of(sample) == pair.trl_labels(pair.ids(text, eos=False), response, instruction)


def test_a_truncated_answer_keeps_the_labels_that_trl_gives_it(pairs, texts, write):
    pair, (all_texts, response, instruction) = pairs("gpt2"), texts["dpo"]
    samples = ours_of(pair, all_texts, write, response, instruction)
    size = 96
    packs = PackedDataset(samples, max_seq_len=size, strategy="none", over_length="truncate", no_targets="keep")
    for text, row in zip(all_texts, (packs[i] for i in range(len(packs)))):
        ids = pair.ids(text)[:size]
        theirs = pair.trl_labels(ids, response, instruction)
        assert row.tokens[: len(ids)].tolist() == ids
        assert row.labels[: len(ids)].tolist() == [*theirs[1:], -100]


# Where TRL is wrong and the characters are right


def trained_text(pair, labels):
    return pair.ours.decode([id for id in labels if id != -100], skip_special=False)


def test_a_template_with_other_ids_in_context_leaves_trl_nothing_to_learn(pairs, write):
    """Case 8: `### Assistant:` alone begins with `▁###`, behind a line break with `##`, `#`."""
    pair = pairs("llama2")
    text = f"{HUMAN} Hello\n\n{ASSISTANT} Hi there"
    assert set(pair.trl_labels(pair.ids(text), ASSISTANT)) == {-100}
    [sample] = ours_of(pair, [text], write, ASSISTANT)
    assert trained_text(pair, labels_of(sample)) == f"Hi there{pair.eos}"


def test_an_answer_that_begins_with_a_line_break_is_lost_by_trl(pairs, write):
    """Case 10: Llama-3 has one token for `:` and the line break."""
    pair = pairs("llama3")
    text = "### Instruction:\nGreet\n\n### Response:\nHi"
    assert set(pair.trl_labels(pair.ids(text), "### Response:")) == {-100}
    [sample] = ours_of(pair, [text], write, "### Response:")
    assert trained_text(pair, labels_of(sample)) == ":\nHi" + pair.eos


@pytest.mark.parametrize("name", ["llama3", "gpt2", "qwen3"])
def test_an_end_of_text_that_is_also_the_padding_is_learned(name, pairs, write):
    """TRL's collator masks every padding id, so with `pad_token = eos_token` the model never learns to stop."""
    pair = pairs(name)
    text = f"{HUMAN} Hello\n\n{ASSISTANT} Hi there"
    before, pair.theirs.pad_token = pair.theirs.pad_token, pair.eos
    try:
        theirs = pair.trl_labels(pair.ids(text), ASSISTANT)
    finally:
        pair.theirs.pad_token = before
    [sample] = ours_of(pair, [text], write, ASSISTANT)
    assert theirs[-1] == -100 and labels_of(sample) == [*theirs[:-1], pair.ours.eos_id]


def test_a_question_that_quotes_the_instruction_template_does_not_cost_an_answer(pairs, write):
    """TRL pairs templates by their number: one more `### Human:` and the first answer is masked."""
    pair = pairs("gpt2")
    text = f"{HUMAN} what is\n{HUMAN} for?\n{ASSISTANT} One\n{HUMAN} and now?\n{ASSISTANT} Two"
    theirs = pair.trl_labels(pair.ids(text), ASSISTANT, HUMAN)
    assert "One" not in trained_text(pair, theirs)
    [sample] = ours_of(pair, [text], write, ASSISTANT, HUMAN)
    assert trained_text(pair, labels_of(sample)) == f" One\n Two{pair.eos}"


def test_an_answer_that_quotes_the_response_template_is_learned_whole(pairs, write):
    """TRL takes the last `### Response:` for the beginning; a row of columns says where the answer is."""
    pair = pairs("gpt2")
    row = {"instruction": "Show a prompt", "output": "Here:\n### Response:\nwrite it so"}
    text = "".join(m.text for m in alpaca_format(Row("", 1, row)).messages)
    assert trained_text(pair, pair.trl_labels(pair.ids(text), "### Response:")) == f"\nwrite it so{pair.eos}"
    [sample] = alpaca_dataset(pair.ours, source=write("a.jsonl", [row]))
    assert sample.tokens.tolist() == pair.ids(text)
    assert trained_text(pair, labels_of(sample)) == row["output"] + pair.eos


def test_a_question_that_quotes_the_response_template_is_not_learned_in_a_conversation(pairs, write):
    pair = pairs("qwen3")
    response = "<|im_start|>assistant\n"
    row = {"messages": [{"role": "user", "content": f"say {response}yes"}, {"role": "assistant", "content": "No"}]}
    [sample] = chat_dataset(pair.ours, source=write("a.jsonl", [row]))
    assert "yes" not in trained_text(pair, labels_of(sample)) and "No" in trained_text(pair, labels_of(sample))
    injected = pair.theirs.encode(f"<|im_start|>user\nsay {response}yes<|im_end|>\n{response}No<|im_end|>\n")
    theirs = trained_text(pair, pair.trl_labels(injected, response, "<|im_start|>user\n"))
    assert "yes" in theirs


def test_what_follows_an_end_of_turn_is_not_learned_in_a_conversation(pairs, write):
    """TRL trains the line break that ChatML has after `<|im_end|>`, which no model is asked to write."""
    pair = pairs("qwen3")
    talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in talk]}
    [sample] = chat_dataset(pair.ours, source=write("a.jsonl", [row]))
    theirs = pair.trl_labels(sample.tokens.tolist(), "<|im_start|>assistant\n", "<|im_start|>user\n")
    assert "b<|im_end|>\n" in trained_text(pair, theirs)
    assert "<|im_end|>\n" not in trained_text(pair, labels_of(sample))


# Packs and prompt-completion rows


def test_packed_labels_are_those_of_trls_padding_free_batches(pairs, texts, write):
    from trl.trainer.utils import DataCollatorForCompletionOnlyLM

    pair, (all_texts, response, instruction) = pairs("gpt2"), texts["dpo"]
    samples = ours_of(pair, all_texts[:5], write, response, instruction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collator = DataCollatorForCompletionOnlyLM(response, instruction, tokenizer=pair.theirs, padding_free=True)
        theirs = collator([{"input_ids": pair.ids(text)} for text in all_texts[:5]])
    size = len(samples.tokens)
    row = PackedDataset(samples, max_seq_len=size, strategy="in_order")[0]
    assert row.tokens.tolist() == theirs["input_ids"][0].tolist()
    assert row.positions.tolist() == theirs["position_ids"][0].tolist()
    assert row.labels.tolist() == [*theirs["labels"][0].tolist()[1:], -100]


def trl_prompt_completion(pair, rows):
    """What trl's trainer makes of `prompt` and `completion`: ids and the completion's mask."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = SFTConfig(output_dir="unused", report_to="none", max_length=None, use_cpu=True, bf16=False)
        made = SFTTrainer._prepare_dataset(None, Dataset.from_list(rows), pair.theirs, config, False, None, "train")
    return [(row["input_ids"], row["completion_mask"]) for row in made]


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_prompt_and_completion_are_those_of_trl_where_the_prompt_alone_has_the_same_ids(name, pairs, texts, write):
    pair = pairs(name)
    prompts = [text.split("### Response:")[0] + "### Response:" for text in texts["alpaca"][0]]
    rows = [{"prompt": p, "completion": t[len(p) :]} for p, t in zip(prompts, texts["alpaca"][0])]
    samples = instruct_dataset(pair.ours, source=write("pc.jsonl", rows), chat=False)
    num_equal = 0
    for row, sample, (ids, mask) in zip(rows, samples, trl_prompt_completion(pair, rows), strict=True):
        assert sample.tokens.tolist() == ids
        prompt = pair.theirs.encode(row["prompt"], add_special_tokens=False)
        if ids[: len(prompt)] == prompt:
            assert sample.trained.astype(int).tolist() == mask
            num_equal += 1
        else:  # the last token of the prompt is another one in context, and trl masks one token more or less
            assert trained_text(pair, labels_of(sample)).endswith(row["completion"] + pair.eos)
    assert 0 < num_equal < len(rows)
