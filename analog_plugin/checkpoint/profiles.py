"""The deploy profiles: what stands in ``config.json`` and ``model*.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from analog_plugin.checkpoint.layout import STATE_FILE, VERSION
from analog_plugin.checkpoint.plain import plain_input_scales, plain_layers, quantize_rows
from analog_plugin.errors import AnalogError
from analog_plugin.files import sha256_of
from analog_plugin.layers import AnalogConv1D, analog_layers, model_scheme
from analog_plugin.layers.prefix import installed_prefix

#: State of analog layers that plain loaders do not know.
_ANALOG_ONLY = ("input_range", "range_batches")


def write_analog_fp(model: Any, directory: Path) -> Mapping[str, Any]:
    """Full-precision weights with static input scales, and the exact analog state.

    Without this package it loads as a digital model with statically quantized inputs (none where a
    layer is a transposed ``Conv1D``, which compressed-tensors does not quantize).
    """
    from safetensors.torch import save_file

    layers = dict(analog_layers(model))
    state = _digital_state(model)
    quantization = None
    if plain_layers(model):
        for name, scale in plain_input_scales(model).items():
            state[f"{name}.input_scale"] = scale
        quantization = _quantization_config(model, "dense", None)
    _write_model(model, directory, state, quantization)
    (directory / STATE_FILE).parent.mkdir(exist_ok=True)
    save_file(analog_state(model), directory / STATE_FILE)
    return {
        "version": VERSION,
        "profile": "analog-fp",
        "scheme": model_scheme(model).to_dict(),
        "tiles": {name: layer.tiles for name, layer in layers.items()},
        "state": {"file": STATE_FILE, "sha256": sha256_of(directory / STATE_FILE)},
    }


def analog_state(model: Any) -> dict[str, Tensor]:
    """What only the analog model has: ranges [K] and the digital prefix, fp32, by name."""
    state: dict[str, Tensor] = {}
    for name, layer in analog_layers(model):
        state[f"{name}.input_range"] = layer.input_range.detach().clone()
        if layer.plain_range is not None:
            state[f"{name}.plain_range"] = layer.plain_range.clone()
    prefix = installed_prefix(model)
    return state if prefix is None else state | prefix.to_tensors()


def check_w8a8(model: nn.Module) -> None:
    """Refuse what :func:`write_w8a8` cannot write.

    Raises:
        AnalogError: The model has ``Conv1D`` layers, or its inputs are not static 8-bit ones.
    """
    layers = [layer for _, layer in analog_layers(model)]
    if any(isinstance(layer, AnalogConv1D) for layer in layers):
        raise AnalogError(
            f"{type(model).__name__} has Conv1D layers, which compressed-tensors does not "
            "quantize; write profile: analog-fp."
        )
    for scheme in (layer.scheme for layer in layers):
        if scheme.input_bits != 8 or scheme.input_range == "dynamic":
            raise AnalogError(
                "The profile w8a8 needs static 8-bit inputs, but the scheme has input_bits "
                f"{scheme.input_bits} and input_range {scheme.input_range}; write profile: "
                "analog-fp."
            )


def write_w8a8(model: Any, directory: Path) -> None:
    """int8 weights with one scale a channel, and static 8-bit inputs; purely digital.

    But for the layers that :func:`~analog_plugin.checkpoint.plain.plain_layers` leaves out.
    """
    scales = plain_input_scales(model)
    state = _digital_state(model)
    for name, layer in plain_layers(model).items():
        codes, scale = quantize_rows(layer.weight, 8)
        state[f"{name}.weight"] = codes
        state[f"{name}.weight_scale"] = scale
        state[f"{name}.input_scale"] = scales[name]
    weights = _arguments(8) | {"strategy": "channel"}
    _write_model(model, directory, state, _quantization_config(model, "int-quantized", weights))


def _digital_state(model: nn.Module) -> dict[str, Tensor]:
    """The state that the digital model would have."""
    names = {f"{name}.{part}" for name, _ in analog_layers(model) for part in _ANALOG_ONLY}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in names}


def _write_model(
    model: Any, directory: Path, state: dict[str, Tensor], quantization: dict[str, Any] | None
) -> None:
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # Written below as it is: what transformers loads with a warning it refuses to save.
        model.generation_config = type(generation)()
    try:
        # The class's method: hosts put their own in the instance.
        type(model).save_pretrained(model, directory, state_dict=state)
    finally:
        if generation is not None:
            model.generation_config = generation
    if generation is not None:
        generation.to_json_file(
            directory / "generation_config.json", keys_to_pop=["compile_config"]
        )
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.pop("analog_config", None)
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    path.write_text(json.dumps(config, indent=2) + "\n")


def _arguments(bits: int) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }


def _quantization_config(
    model: nn.Module, layout: str, weights: dict[str, Any] | None
) -> dict[str, Any]:
    from importlib.metadata import version

    layers = plain_layers(model)
    scheme = next(iter(layers.values())).scheme
    assert scheme.input_bits is not None
    inputs = _arguments(scheme.input_bits)
    if scheme.input_range == "dynamic":
        inputs |= {"strategy": "token", "dynamic": True}
    ignored = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in layers
    ]
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        # With "frozen", plain loaders invent zero-points.
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "version": version("compressed-tensors"),
    }
