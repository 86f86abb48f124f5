"""What a family of checkpoints is: a reading of config.json, the way back, and a table of weight names."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from torchmask.errors import ConfigError, EnvironmentFault
from torchmask.models.conversions import Conversion, Layout, Split, make_layout, without_prefix
from torchmask.models.weights import init_weights
from torchmask.modules.decoder import Decoder, DecoderSpec

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Family:
    """One `model_type` of the Hub.

    Attributes:
        model_type: as in config.json.
        title: the models of this type, for people.
        spec_from_config: config.json to the architecture.
        config_from_spec: the architecture to a config.json that transformers loads.
        weight_names: the Hub's tensor names to ours, `{}` standing for the layer's number.
        conversions: what is more than a name: fused, transposed or stacked tensors (see `conversions`).
        other_layout: how some files keep parameters of these otherwise, told by their names; exports never do.
        derived: endings of the Hub's tensor names that are computed, not learned, and are skipped.
        optional_prefix: of the Hub's names, which files of a model without a head lack; exports have it.
    """

    model_type: str
    title: str
    spec_from_config: Callable[[dict[str, Any]], DecoderSpec]
    config_from_spec: Callable[[DecoderSpec], dict[str, Any]]
    weight_names: dict[str, str]
    conversions: tuple[Conversion, ...] = ()
    other_layout: tuple[Conversion, ...] = ()
    derived: tuple[str, ...] = ()
    optional_prefix: str = "model."

    def layout(self, model: Decoder, names: Collection[str] = ()) -> Layout:
        """Where a checkpoint of the family keeps each parameter of a model; a tied head has its own entry.

        Args:
            names: of a checkpoint's tensors, which tell in which of the layouts it is; none = that of exports.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
        renames = (Split(hub, (ours,)) for hub, ours in self.weight_names.items())
        layout = make_layout((*renames, *self.conversions), shapes, model.spec)
        other = make_layout(self.other_layout, shapes, model.spec)
        if names and not any(name.startswith(self.optional_prefix) for name in names):
            layout, other = (without_prefix(each, self.optional_prefix) for each in (layout, other))
        held = {ours: pieces for ours, pieces in other.items() if any(piece.hub in names for piece in pieces)}
        return {**layout, **held}

    def hub_name(self, ours: str, names: Collection[str] = ()) -> str:
        """The name in a checkpoint of a parameter that it keeps as it is; `names` as of `layout`."""
        hubs = [hub for hub, our in self.weight_names.items() if our == ours]
        hubs += [other.hub for other in self.other_layout if isinstance(other, Split) and other.ours == (ours,)]
        known = [name for hub in hubs for name in (hub, hub.removeprefix(self.optional_prefix))]
        return next((name for name in known if name in names), known[1])


def build_model(
    family: Family,
    spec: DecoderSpec,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str,
    config: dict[str, Any] | None = None,
    seed: int | None = 0,
) -> Decoder:
    """A decoder on `device`; its parameters are random by `seed`, or left unset with `seed=None` or on `meta`.

    `model.hub_config` is the config.json it stands for, which exports write.

    Raises:
        ConfigError: C09, a dtype that is not among `DTYPES`, or a device that torch does not know.
        EnvironmentFault: R14, a device that this machine does not have.
    """
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise ConfigError("C09", f"dtype is {dtype!r}", where="dtype", fix=f"choose one of {', '.join(DTYPES)}")
    _check_device(device)
    with torch.device("meta"):
        model = Decoder(spec).to(dtype)
    model.hub_config = config if config is not None else family.config_from_spec(spec)
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device=device)
    model.tie_weights()
    if seed is not None:
        std = model.hub_config.get("initializer_range")
        init_weights(model, seed=seed, std=0.02 if std is None else std)
    return model


def _check_device(device: torch.device | str) -> None:
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        fix = "choose cpu, cuda, cuda:1 or meta"
        raise ConfigError("C09", f"device is {device!r}, which torch does not know", where="device", fix=fix) from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        message = f"device is {str(device)!r}, and torch cannot use {kind} here: {reason}"
        raise EnvironmentFault("R14", message, where="device", fix="choose a device of this machine, or cpu") from error


def sized(family: Family, spec: DecoderSpec) -> Callable[..., Decoder]:
    """A builder of one published size: `builder(dtype=torch.float32, device="cpu", seed=0) -> Decoder`."""

    def builder(
        *, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu", seed: int | None = 0
    ) -> Decoder:
        return build_model(family, spec, dtype=dtype, device=device, seed=seed)

    builder.family = family  # type: ignore[attr-defined]  # for `builders_of`
    return builder
