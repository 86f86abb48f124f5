import math
from functools import partial

import pytest
import torch
from torch import nn

from torchmask.errors import ConfigError, WeightsError
from torchmask.training.bf16_updates import Optimizer, round_stochastically
from torchmask.training.muon import MuonAdamW
from torchmask.training.optim import build_optimizer


def tiny_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11, bias=False))
    return model.to(dtype)


def adamw(**options):
    return partial(torch.optim.AdamW, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def train(model, optimizer, *, first=0, num_steps=5):
    losses = []
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 11, (4, 6), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), (tokens * 3 % 11).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def copied(table):
    return {key: value.clone() for key, value in table.items()}


def test_fp32_training_is_that_of_the_plain_torch_optimizer():
    model, reference = tiny_model(), tiny_model()
    matrices = [p for p in reference.parameters() if p.ndim >= 2]
    others = [p for p in reference.parameters() if p.ndim < 2]
    plain = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.1, fused=True
    )
    assert train(model, build_optimizer(model, adamw())) == train(reference, plain)
    for ours, theirs in zip(model.parameters(), reference.parameters()):
        assert torch.equal(ours, theirs)


def test_only_matrices_decay():
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, adamw(lr=0.5, weight_decay=0.2))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        expected = before[name] * 0.9 if param.ndim >= 2 else before[name]
        torch.testing.assert_close(param.detach(), expected)


def test_weight_decay_given_here_wins_over_the_optimizers_own():
    groups = build_optimizer(tiny_model(), adamw(weight_decay=0.1), weight_decay=0.3).inner.param_groups
    assert [group["weight_decay"] for group in groups] == [
        0.3,
        0.3,
        0.0,
    ]  # layers, embeddings, norms and biases


def test_frozen_parameters_are_left_out():
    model = tiny_model()
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(model, adamw())
    assert not any(key.startswith("0.weight") for key in optimizer.state_dict())
    before = model[0].weight.clone()
    train(model, optimizer)
    assert torch.equal(model[0].weight, before)


def test_tied_weights_are_updated_once():
    model = tiny_model()
    model[3].weight = model[0].weight
    assert len([k for k in build_optimizer(model, adamw()).state_dict() if k.endswith(".exp_avg")]) == 6 - 1


def test_fused_kernels_are_used_unless_the_configuration_chose():
    assert all(g["fused"] for g in build_optimizer(tiny_model(), adamw()).inner.param_groups)
    assert not any(g["fused"] for g in build_optimizer(tiny_model(), adamw(fused=False)).inner.param_groups)
    assert not any(g["fused"] for g in build_optimizer(tiny_model(), adamw(foreach=True)).inner.param_groups)


def test_set_lr_scales_the_configured_rate_and_does_not_compound():
    optimizer = build_optimizer(tiny_model(), adamw(lr=0.4))
    optimizer.set_lr(0.5)
    optimizer.set_lr(0.25)
    assert optimizer.lr == pytest.approx(0.1)
    assert {group["lr"] for group in optimizer.inner.param_groups} == {optimizer.lr}


def test_gradients_survive_the_step_and_are_dropped_by_zero_grad():
    model = tiny_model(torch.bfloat16)
    optimizer = build_optimizer(model, adamw())
    grads = []
    for param in model.parameters():
        param.grad = torch.ones_like(param)
        grads.append(param.grad)
    optimizer.step()
    assert all(param.grad is grad for param, grad in zip(model.parameters(), grads))
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


# bf16


def drift_of(optimizer_of, *, num_steps=200):
    """How far a bf16 weight of 1.0 gets when each step asks for -1e-3 (its spacing there is 0.0078 and 0.0039)."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = optimizer_of(model)
    for _ in range(num_steps):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        optimizer.zero_grad()
    return 1.0 - model.weight.detach().float().mean().item()


def test_plain_bf16_loses_small_updates_entirely():
    # The defect that the two modes are there for: if torch ever mends it, this module can go.
    assert drift_of(lambda model: torch.optim.SGD(model.parameters(), lr=1e-3)) == 0.0


@pytest.mark.parametrize("bf16_updates", ["master_weights", "stochastic_rounding"])
def test_small_updates_of_bf16_weights_add_up(bf16_updates):
    make = partial(torch.optim.SGD, lr=1e-3)
    drift = drift_of(lambda model: build_optimizer(model, make, bf16_updates=bf16_updates))
    assert drift == pytest.approx(0.2, abs=0.003)  # the nearest bf16 to 0.8 is 0.0008 off; noise of the mean 0.001


@pytest.mark.parametrize("bf16_updates", ["master_weights", "stochastic_rounding"])
def test_bf16_training_follows_fp32_training(bf16_updates):
    exact, rounded = tiny_model(), tiny_model(torch.bfloat16)
    exact_losses = train(exact, build_optimizer(exact, adamw()), num_steps=60)
    losses = train(rounded, build_optimizer(rounded, adamw(), bf16_updates=bf16_updates), num_steps=60)
    assert exact_losses[0] > 2.0 and exact_losses[-1] < 1.0
    # bf16 forward alone is off by about 2^-8 relative; the curves must agree to a few of those.
    assert losses == pytest.approx(exact_losses, abs=0.06)


def test_the_weight_is_the_rounded_master():
    model = tiny_model(torch.bfloat16)
    optimizer = build_optimizer(model, adamw())
    train(model, optimizer)
    state = optimizer.state_dict()
    for name, param in model.named_parameters():
        assert state[f"{name}.master"].dtype == torch.float32
        assert torch.equal(param, state[f"{name}.master"].to(torch.bfloat16))


def test_stochastic_rounding_keeps_no_fp32_weights_between_steps():
    model = tiny_model(torch.bfloat16)
    optimizer = build_optimizer(model, adamw(), bf16_updates="stochastic_rounding")
    train(model, optimizer)
    assert not any(key.endswith(".master") for key in optimizer.state_dict())
    for group in optimizer.inner.param_groups:
        assert all(work.untyped_storage().nbytes() == 0 for work in group["params"])


def test_weights_loaded_after_the_optimizer_was_built_are_the_ones_trained():
    late, early = tiny_model(torch.bfloat16, seed=1), tiny_model(torch.bfloat16, seed=2)
    optimizer = build_optimizer(late, adamw())
    optimizer.state_dict()
    late.load_state_dict(early.state_dict())
    assert train(late, optimizer) == train(early, build_optimizer(early, adamw()))


@pytest.mark.parametrize("bf16_updates", ["master_weights", "stochastic_rounding"])
def test_updating_in_chunks_changes_nothing(bf16_updates):
    whole, chunked = tiny_model(torch.bfloat16), tiny_model(torch.bfloat16)
    in_one = build_optimizer(whole, adamw(), bf16_updates=bf16_updates)
    base = build_optimizer(chunked, adamw(), bf16_updates=bf16_updates)
    in_many = Optimizer(base.inner, base._entries, max_widened_elements=70)
    assert len(in_many._chunks) > 2
    assert train(whole, in_one) == train(chunked, in_many)


def test_stochastic_rounding_is_unbiased():
    # 1 + f of the way from 1.0 to its neighbour: the share rounded up must be f, within 5 standard deviations.
    generator = torch.Generator().manual_seed(0)
    num_draws = 200_000
    for fraction in (0.1, 0.5, 0.93):
        for sign in (1.0, -1.0):
            values = torch.full((num_draws,), sign * (1.0 + fraction * 2**-7))
            rounded = round_stochastically(values, generator=generator)
            assert set(rounded.float().tolist()) == {sign, sign * (1.0 + 2**-7)}
            share = (rounded.abs() > 1.0).double().mean().item()
            deviation = math.sqrt(fraction * (1 - fraction) / num_draws)
            assert abs(share - fraction) < 5 * deviation


def test_stochastic_rounding_keeps_what_bf16_can_say_and_what_is_not_finite():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0.0, -0.0, 1.5, -(2.0**-100), math.inf, -math.inf, math.nan])
    for _ in range(20):
        rounded = round_stochastically(values, generator=generator).float()
        assert torch.equal(rounded[:-1], values[:-1]) and rounded[-1].isnan()


def test_stochastic_rounding_leaves_torchs_random_stream_alone():
    model = tiny_model(torch.bfloat16)
    optimizer = build_optimizer(model, adamw(), bf16_updates="stochastic_rounding")
    before = torch.get_rng_state()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


# state


MAKERS = {
    "adamw": adamw(),
    "adamw_amsgrad_unfused": adamw(amsgrad=True, fused=False),
    "sgd": partial(torch.optim.SGD, lr=1e-2),
    "sgd_dampened": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, dampening=0.5),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2, initial_accumulator_value=0.1),
    "muon": partial(MuonAdamW, lr=1e-2),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-2),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("dtype", "bf16_updates"),
    [
        (torch.float32, "master_weights"),
        (torch.bfloat16, "master_weights"),
        (torch.bfloat16, "stochastic_rounding"),
    ],
)
def test_a_resumed_run_is_bit_equal_to_the_unbroken_one(maker, dtype, bf16_updates):
    unbroken, stopped, resumed = tiny_model(dtype), tiny_model(dtype), tiny_model(dtype, seed=9)
    expected = train(unbroken, build_optimizer(unbroken, MAKERS[maker], bf16_updates=bf16_updates), num_steps=8)

    first = build_optimizer(stopped, MAKERS[maker], bf16_updates=bf16_updates)
    losses = train(stopped, first, num_steps=3)
    weights, state = stopped.state_dict(), copied(first.state_dict())

    second = build_optimizer(resumed, MAKERS[maker], bf16_updates=bf16_updates)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    assert losses + train(resumed, second, first=3) == expected
    for ours, theirs in zip(resumed.parameters(), unbroken.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("bf16_updates", ["master_weights", "stochastic_rounding"])
def test_a_table_taken_before_the_first_step_is_complete_and_changes_nothing(maker, bf16_updates):
    touched, plain = tiny_model(torch.bfloat16), tiny_model(torch.bfloat16)
    asked = build_optimizer(touched, MAKERS[maker], bf16_updates=bf16_updates)
    template = asked.state_dict()
    assert all(int(value) == 0 for key, value in template.items() if key.endswith((".step", ".num_updates")))
    for ours, theirs in zip(touched.parameters(), plain.parameters()):
        assert torch.equal(ours, theirs)
    shapes = {key: value.shape for key, value in template.items()}

    assert train(touched, asked) == train(plain, build_optimizer(plain, MAKERS[maker], bf16_updates=bf16_updates))
    assert {key: value.shape for key, value in asked.state_dict().items()} == shapes


def test_a_table_taken_with_gradients_pending_keeps_them():
    model = tiny_model()
    optimizer = build_optimizer(model, adamw())
    for param in model.parameters():
        param.grad = torch.full_like(param, 2.0)
    optimizer.state_dict()
    assert all((param.grad == 2.0).all() for param in model.parameters())


def test_a_checkpoint_can_be_read_into_the_template_in_place():
    unbroken, resumed = tiny_model(torch.bfloat16), tiny_model(torch.bfloat16, seed=4)
    first = build_optimizer(unbroken, adamw())
    train(unbroken, first, num_steps=3)
    saved = copied(first.state_dict())
    resumed.load_state_dict(unbroken.state_dict())

    second = build_optimizer(resumed, adamw())
    template = second.state_dict()
    for key, value in template.items():  # what torch.distributed.checkpoint does
        value.copy_(saved[key])
    second.load_state_dict(template)
    assert train(resumed, second, first=3) == train(unbroken, first, first=3)


def test_a_parameter_without_gradients_so_far_resumes_as_if_never_saved():
    def run(model, optimizer, steps, *, used):
        model[3].weight.requires_grad_(used)  # no gradient reaches it while it is not used
        return train(model, optimizer, first=steps, num_steps=2)

    unbroken, stopped, resumed = tiny_model(), tiny_model(), tiny_model(seed=5)
    optimizer = build_optimizer(unbroken, adamw())
    expected = run(unbroken, optimizer, 0, used=False) + run(unbroken, optimizer, 2, used=True)
    first = build_optimizer(stopped, adamw())
    second = build_optimizer(resumed, adamw())
    losses = run(stopped, first, 0, used=False)
    assert int(first.state_dict()["3.weight.num_updates"]) == 0
    resumed.load_state_dict(stopped.state_dict())
    second.load_state_dict(copied(first.state_dict()))
    assert losses + run(resumed, second, 2, used=True) == expected


def test_loaded_state_is_copied_and_not_shared():
    one, other = tiny_model(torch.bfloat16), tiny_model(torch.bfloat16)
    first, second = build_optimizer(one, adamw()), build_optimizer(other, adamw())
    train(one, first)
    second.load_state_dict(first.state_dict())
    before = copied(first.state_dict())
    train(other, second)
    assert all(torch.equal(before[key], value) for key, value in first.state_dict().items())


def test_the_table_goes_through_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model(torch.bfloat16)
    optimizer = build_optimizer(model, adamw())
    train(model, optimizer)
    table = optimizer.state_dict()
    save_file(table, tmp_path / "optim.safetensors")
    loaded = load_file(tmp_path / "optim.safetensors")
    assert all(torch.equal(table[key], loaded[key]) for key in table)


def test_a_table_of_other_parameters_is_refused_by_name():
    small, large = tiny_model(), nn.Sequential(*tiny_model(), nn.Linear(11, 3))
    large[1] = nn.Linear(8, 8, bias=False)
    state = build_optimizer(large, adamw()).state_dict()
    with pytest.raises(WeightsError) as caught:
        build_optimizer(small, adamw()).load_state_dict(state)
    assert caught.value.id == "W05"
    assert "1.bias.exp_avg: missing" in str(caught.value) and "4.weight.exp_avg: unexpected" in str(caught.value)


def test_a_table_of_other_shapes_is_refused_with_both():
    optimizer = build_optimizer(tiny_model(), adamw())
    state = dict(optimizer.state_dict())
    state["1.weight.exp_avg"] = torch.zeros(8, 9)
    with pytest.raises(WeightsError, match=r"1\.weight\.exp_avg: shape \[8, 9\], expected \[8, 8\]"):
        optimizer.load_state_dict(state)


# settings


@pytest.mark.parametrize("options", [{"lr": -1e-3}, {"lr": math.nan}, {"lr": math.inf}, {"weight_decay": -0.1}])
def test_settings_out_of_range_are_configuration_errors(options):
    with pytest.raises(ConfigError) as caught:
        build_optimizer(tiny_model(), adamw(**options))
    assert caught.value.id == "C13"


def test_a_configuration_error_while_making_the_optimizer_stays_itself():
    def make(groups):
        raise ConfigError("C08", "unknown argument 'lrr'")

    with pytest.raises(ConfigError) as caught:
        build_optimizer(tiny_model(), make)
    assert caught.value.id == "C08"


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer(tiny_model().requires_grad_(False), adamw())


def test_stochastic_rounding_of_fp16_is_refused():
    with pytest.raises(ConfigError, match="float16"):
        build_optimizer(tiny_model(torch.float16), adamw(), bf16_updates="stochastic_rounding")


def test_an_optimizer_whose_state_is_no_tensors_is_refused():
    optimizer = build_optimizer(tiny_model(), StatefulCounter)
    with pytest.raises(ConfigError, match="keeps 'count' as int"):
        optimizer.state_dict()


class StatefulCounter(torch.optim.SGD):
    def __init__(self, groups):
        super().__init__(groups, lr=0.1)

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["count"] = 1


def test_description_says_what_will_update_the_weights():
    optimizer = build_optimizer(tiny_model(torch.bfloat16), adamw(lr=3e-4))
    assert optimizer.describe() == "AdamW (fused), lr 0.0003, weight decay 0.1 on 3 of 6 tensors, fp32 master weights"
