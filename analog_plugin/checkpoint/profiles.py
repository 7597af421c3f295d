"""Write a profile: what stands in ``config.json`` and ``model*.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.checkpoint.digital import DigitalLayer, DigitalPlan
from analog_plugin.checkpoint.layout import STATE_FILE, VERSION
from analog_plugin.files import sha256_of
from analog_plugin.layers import analog_layers, model_scheme
from analog_plugin.layers.prefix import installed_prefix

#: State of analog layers that plain loaders do not know.
ANALOG_ONLY = ("input_range", "range_batches")


def write_analog_fp(model: Any, directory: Path, plan: DigitalPlan) -> Mapping[str, Any]:
    """Full-precision weights with static input scales, and the exact analog state.

    Without this package it loads as a digital model with statically quantized inputs (none where a
    layer is a transposed ``Conv1D``, which compressed-tensors does not quantize).
    """
    from safetensors.torch import save_file

    layers = dict(analog_layers(model))
    write_digital(model, directory, plan)
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


def write_digital(model: Any, directory: Path, plan: DigitalPlan) -> None:
    """What plain loaders read: integer weights with one scale a channel, and static inputs.

    What is not in ``plan`` keeps its full precision.
    """
    _write_model(model, directory, _digital_state(model, plan), _quantization_config(model, plan))


def _digital_state(model: nn.Module, plan: DigitalPlan) -> dict[str, Tensor]:
    """The state that the digital model would have, quantized as planned."""
    analog = {f"{name}.{part}" for name, _ in analog_layers(model) for part in ANALOG_ONLY}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in analog}
    for name, layer in plan.layers.items():
        if layer.weight_bits is not None:
            weight = state.pop(f"{name}.weight")
            for part, tensor in _weight_tensors(weight, layer, plan.profile.packed).items():
                state[f"{name}.{part}"] = tensor
        for part, scale in (
            ("input_scale", layer.input_scale),
            ("output_scale", layer.output_scale),
        ):
            if scale is not None:
                state[f"{name}.{part}"] = scale
    return state


def _weight_tensors(weight: Tensor, layer: DigitalLayer, packed: bool) -> dict[str, Tensor]:
    """A weight [out, in] as compressed-tensors stores it."""
    codes, scale = layer.weight_codes(weight)
    if not packed:
        return {"weight": codes, "weight_scale": scale}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    assert layer.weight_bits is not None
    return {
        "weight_packed": pack_to_int32(codes, layer.weight_bits).contiguous(),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


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


def _quantization_config(model: nn.Module, plan: DigitalPlan) -> dict[str, Any] | None:
    from importlib.metadata import version

    if not plan.layers:
        return None
    ignored = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in plan.layers
    ]
    alike: dict[int | None, list[str]] = {}
    for name, layer in plan.layers.items():
        alike.setdefault(_declared_bits(plan, layer), []).append(name)
    groups = {}
    for index, names in enumerate(alike.values()):
        # Names only where they are needed: engines match a class faster. A head is none to vLLM.
        heads = [name for name in names if name.rpartition(".")[2] == "lm_head"]
        targets = ["Linear", *heads] if len(alike) == 1 else names
        groups[f"group_{index}"] = _group(plan, plan.layers[names[0]], targets)
    return {
        "quant_method": "compressed-tensors",
        "format": plan.profile.layout,
        # With "frozen", plain loaders invent zero-points.
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "version": version("compressed-tensors"),
    }


def _declared_bits(plan: DigitalPlan, layer: DigitalLayer) -> int | None:
    """What loaders are told: codes of fewer bits in whole bytes are 8-bit ones to them."""
    return layer.weight_bits if plan.profile.packed or layer.weight_bits is None else 8


def _group(plan: DigitalPlan, layer: DigitalLayer, targets: list[str]) -> dict[str, Any]:
    bits = _declared_bits(plan, layer)
    inputs = _arguments(layer.input_bits)
    if inputs is not None and layer.input_scale is None:
        inputs |= {"strategy": "token", "dynamic": True}
    weights = _arguments(bits)
    return {
        "targets": targets,
        "weights": None if weights is None else weights | {"strategy": "channel"},
        "input_activations": inputs,
        "output_activations": _arguments(layer.output_bits),
        # Also here: without it packed weights go missing.
        "format": plan.profile.layout,
    }


def _arguments(bits: int | None) -> dict[str, Any] | None:
    if bits is None:
        return None
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }
