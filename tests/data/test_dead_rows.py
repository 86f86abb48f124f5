"""Rows with nothing to learn, by cause: `no_span_match` where a rule would have trained what it did not find."""

import pytest

from torchmask.data import EosPolicy, MaskPolicy, PackedDataset, Samples, chat_dataset, decide, text_completion_dataset
from torchmask.data.formats import Conversation
from torchmask.data.inspection import dead_rows
from torchmask.data.rendering import documents_of
from torchmask.errors import DataError
from torchmask.messages import Message

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": '{"answer": "x"}'}]
PLAIN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "none"}]
ONLY = {"json_path": "$.answer", "train": "only"}


def chats(tokenizer, write, talks, **options):
    return chat_dataset(tokenizer, source=write("t.jsonl", [{"messages": talk} for talk in talks]), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"spans": [ONLY]},
        {"spans": [{"json_path": "$.answer", "train": True}], "roles_to_train": []},
        {"spans": [{"json_path": "$.answer", "weight": 0.5}], "roles_to_train": []},
    ],
)
def test_a_row_in_which_the_training_rule_finds_nothing_is_dead_for_that_cause(char_tokenizer, write, options):
    samples = chats(char_tokenizer(), write, [TALK, PLAIN, TALK], **options)
    packs = PackedDataset(samples, max_seq_len=64)
    [(cause, count, places)] = dead_rows(packs.report)
    assert (cause, count) == ("no_span_match", 1) and places[0].endswith("t.jsonl:2")
    assert packs.report["dropped"] == {"no_span_match": len(samples[1])} and packs.report["documents"] == 2


def test_a_row_whose_own_flags_mask_all_of_it_is_not_told_as_unmatched(char_tokenizer, write):
    masked = [TALK[0], {**TALK[1], "weight": 0}]
    samples = chats(char_tokenizer(), write, [TALK, masked], spans=[{"tag": "think", "train": False}])
    assert samples.unmatched is None
    assert list(PackedDataset(samples, max_seq_len=64).report["dropped"]) == ["all_masked"]


def test_a_match_that_a_later_rule_masks_again_is_no_missing_match(char_tokenizer, write):
    spans = [ONLY, {"regex": "x", "train": False}]
    samples = chats(char_tokenizer(), write, [TALK, PLAIN], spans=spans, eos_policy="none", roles_to_train=[])
    assert samples.unmatched.tolist() == [False, True]


def test_a_text_without_its_response_template_is_dead_for_that_cause(char_tokenizer, write):
    path = write("t.jsonl", [{"text": "#Q: a #A: b"}, {"text": "no template"}])
    samples = text_completion_dataset(char_tokenizer(), source=path, response_template="#A:")
    assert list(PackedDataset(samples, max_seq_len=64).report["dropped"]) == ["no_span_match"]


def test_the_cause_survives_slices_selections_concatenation_and_the_cache(char_tokenizer, write, tmp_path):
    samples = chats(char_tokenizer(), write, [TALK, PLAIN, TALK], spans=[ONLY])
    assert samples[1:].unmatched.tolist() == [True, False]
    assert samples.select([2, 1]).unmatched.tolist() == [False, True]
    plain = chats(char_tokenizer(), write, [TALK])
    assert Samples.concatenate([plain, samples]).unmatched.tolist() == [False, False, True, False]
    from torchmask.data.cache import cached_samples

    for _ in range(2):
        kept = cached_samples(lambda: samples, {"test": 1}, root=tmp_path)
        assert kept.unmatched.tolist() == [False, True, False]


def test_workers_tell_the_same_cause(char_tokenizer, write):
    samples = chats(char_tokenizer(), write, [TALK, PLAIN] * 40, spans=[ONLY], num_workers=2)
    assert samples.unmatched.tolist() == [False, True] * 40


def test_a_rule_that_matches_nowhere_is_named_when_nothing_is_left(char_tokenizer, write):
    samples = chats(char_tokenizer(), write, [PLAIN, PLAIN], spans=[{**ONLY, "name": "the answer"}])
    with pytest.raises(DataError, match=r"the span rules select no token \(the answer in none\)") as caught:
        PackedDataset(samples, max_seq_len=64)
    assert caught.value.id == "D11"


@pytest.mark.parametrize(("append", "end"), [("auto", ""), ("always", "$")])
def test_the_end_of_a_turn_is_learned_only_where_its_span_was_found(char_tokenizer, append, end):
    """`train: only` does not teach to stop after a text of which nothing is learned."""
    tokenizer = char_tokenizer()
    talk = [Message("user", "q"), Message("assistant", "no"), Message("user", "q"), Message("assistant", "a=1")]
    policy = MaskPolicy(spans=({"regex": "=.", "train": "only"},), eos=EosPolicy(append=append))
    [(rendered, decision)] = documents_of(tokenizer, Conversation(talk), policy, chat=True)
    assert tokenizer.text(rendered.tokens[decision.mask == 0]) == "=1|" + end
    [(rendered, decision)] = documents_of(tokenizer, Conversation(talk[:2]), policy, chat=True)
    assert not (decision.mask == 0).any() and decision.is_unmatched


def test_all_ends_are_learned_where_the_policy_says_all(char_tokenizer):
    tokenizer = char_tokenizer()
    talk = [Message("user", "q"), Message("assistant", "no")]
    policy = MaskPolicy(spans=({"regex": "=.", "train": "only"},), eos=EosPolicy(train_on_eos="all"))
    rendered = tokenizer.render(talk)
    decision = decide(rendered, talk, policy)
    assert tokenizer.text(rendered.tokens[decision.mask == 0]) == "||"
