"""Building components."""

import pytest

from torchmask.config import instantiate
from torchmask.config.annotations import fits, plain_kinds
from torchmask.errors import ConfigError


def test_instantiate_calls_with_the_recipes_arguments_first():
    layer = instantiate({"_component_": "torch.nn.Linear", "out_features": 4, "bias": False}, 3)
    assert layer.weight.shape == (4, 3) and layer.bias is None


def test_nested_components_are_built_too():
    model = instantiate({"_component_": "torch.nn.ModuleList", "modules": [{"_component_": "torch.nn.Identity"}]})
    assert type(model[0]).__name__ == "Identity"


def test_arguments_that_do_not_fit_are_a_clear_error():
    with pytest.raises(ConfigError) as raised:
        instantiate({"_component_": "torch.nn.Linear", "in_feature": 4})
    assert raised.value.id == "C08"
    assert "in_feature" in raised.value.message and "accepted are in_features, out_features" in raised.value.message


def test_an_error_inside_the_call_is_not_disguised():
    with pytest.raises(ValueError, match="Invalid learning rate"):
        instantiate({"_component_": "torch.optim.SGD", "lr": -1.0}, [__import__("torch").nn.Parameter()])


def test_an_argument_given_twice_is_an_error():
    with pytest.raises(ConfigError, match="passed by the recipe itself"):
        instantiate({"_component_": "torch.nn.Linear", "bias": False}, 1, 2, bias=True)


def test_a_dict_without_component_is_an_error():
    with pytest.raises(ConfigError, match="no `_component_`"):
        instantiate({"lr": 1})


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [1], [1.5, "1", True, None]),
        ("float", [1, 1.5], ["1", True]),
        ("str | None", ["a", None], [1]),
        ("Optional[bool]", [True, None], [1]),
        ("list[int]", [[1]], [1, {}]),
        ("'tuple[float, float]'", [[1, 2]], ["a"]),
        ("float | Tensor", [1], ["a", True]),
        ("Literal['a', 2]", ["a", 2], ["b", 3]),
        ("str | Path", ["x"], [3]),
        ("Mapping[str, str] | None", [{}, None], ["a"]),
    ],
)
def test_simple_annotations_are_understood(annotation, good, bad):
    import ast

    kinds = plain_kinds(ast.parse(annotation, mode="eval").body)
    assert all(fits(value, kinds) for value in good)
    assert not any(fits(value, kinds) for value in bad)


@pytest.mark.parametrize("annotation", ["Any", "torch.dtype", "int | Thing", "Callable[[int], int]", "T"])
def test_other_annotations_are_not_guessed(annotation):
    import ast

    assert plain_kinds(ast.parse(annotation, mode="eval").body) is None
