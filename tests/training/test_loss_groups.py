import torch
from torch import nn

from torchmask.modules import linear_cross_entropy
from torchmask.training.loss_groups import LossGroups
from torchmask.training.run import Run


def one_process(tmp_path):
    return Run(output_dir=tmp_path, device=torch.device("cpu"), mesh=None, stop=None)


def observed(names, rules, labels, *, chunk_logits=2**25):
    """The groups after one loss, and every label's nll."""
    torch.manual_seed(0)
    hidden, head = torch.randn(*labels.shape, 4), nn.Linear(4, 7, bias=False)
    groups = LossGroups(names)
    linear_cross_entropy(
        hidden, head, labels, observe=lambda slots, nll: groups.add(rules, slots, nll), chunk_logits=chunk_logits
    )
    return groups, nn.functional.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="none")


LABELS = torch.tensor([[1, 2, -100, 3], [-100, 4, 5, 6]])
RULES = torch.tensor([[1, 1, 0, 2], [0, 1, 2, 2]], dtype=torch.uint8)


def test_each_group_gets_the_mean_of_its_own_targets(tmp_path):
    groups, nll = observed(("header", "answer", "eos"), RULES, LABELS)
    means = groups.take(one_process(tmp_path))
    assert set(means) == {"loss/answer", "loss/eos"}
    torch.testing.assert_close(means["loss/answer"], nll[[0, 1, 5]].mean().item())
    torch.testing.assert_close(means["loss/eos"], nll[[3, 6, 7]].mean().item())


def test_chunks_of_the_loss_change_nothing(tmp_path):
    whole, _ = observed(("header", "answer", "eos"), RULES, LABELS)
    chunked, _ = observed(("header", "answer", "eos"), RULES, LABELS, chunk_logits=14)
    ours, theirs = (groups.take(one_process(tmp_path)) for groups in (chunked, whole))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_taking_begins_anew(tmp_path):
    groups, _ = observed(("header", "answer", "eos"), RULES, LABELS)
    groups.take(one_process(tmp_path))
    assert groups.take(one_process(tmp_path)) == {}


def test_rules_that_say_nothing_special_are_not_reported(tmp_path):
    groups, _ = observed(("header", "strategy", "text"), RULES, LABELS)
    assert groups.take(one_process(tmp_path)) == {}


def test_observing_happens_once_a_target_and_not_again_in_the_backward_pass():
    seen = []
    hidden = torch.randn(1, 5, 4, requires_grad=True)
    head = nn.Linear(4, 7, bias=False)
    labels = torch.tensor([[1, -100, 2, 3, -100]])
    loss = linear_cross_entropy(hidden, head, labels, observe=lambda slots, nll: seen.append((slots, nll)))
    loss.backward()
    [(slots, nll)] = seen
    assert slots.tolist() == [0, 2, 3]
    assert not nll.requires_grad
    torch.testing.assert_close(nll.sum(), loss.detach())
