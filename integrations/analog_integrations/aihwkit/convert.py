"""``to_aihwkit``: an analog model of ours on aihwkit's tiles."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from aihwkit.inference import BaseNoiseModel, GlobalDriftCompensation
from aihwkit.inference.compensation.base import BaseDriftCompensation
from aihwkit.nn import AnalogLinear
from aihwkit.nn.modules.container import AnalogWrapper
from torch import nn

from analog_integrations.aihwkit.configuration import require_tiles, rpu_config
from analog_integrations.aihwkit.noise import DeviceNoise
from analog_integrations.aihwkit.pcm import PCMNoiseModel
from analog_plugin.checkpoint import load_checkpoint
from analog_plugin.errors import AnalogError, shown
from analog_plugin.layers import AnalogConv1D, analog_layers, to_digital
from analog_plugin.noise import PCMNoise, noise_label, resolve_noise


def to_aihwkit(
    model: str | Path | nn.Module,
    noise_model: str | Mapping[str, Any] | Any | None = None,
    device: torch.device | str | None = None,
    *,
    drift_compensation: bool | Any = True,
    tiles: str = "torch",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Put an analog model on aihwkit's tiles, ready to be programmed and read there.

    Weights, input ranges, tiles, DAC and ADC compute what ours compute: each layer's outputs are
    equal but for rounding, and at most one ADC step apart where that decides. Digital layers and a
    digital prefix stay as they are.

    Args:
        model: A checkpoint directory of the profile ``analog-fp`` (or its hub id), or a model with
            analog layers, which is copied.
        noise_model: How the tiles are programmed: one of aihwkit's noise models, or the name (with
            level) of ``pcm``, ``pcm_like``, ``hermes``, ``reram_wan2022`` or ``reram_cmo``, or such
            a model of ours. None: ``hermes``, the paper's chip with drift and read noise.
        device: Where to; None: where the model is.
        drift_compensation: True: aihwkit's ``GlobalDriftCompensation``; False: none; or one of
            aihwkit's.
        tiles: ``"torch"``, or ``"c++"`` where the installed aihwkit can run these.
        dtype: What all of it computes in: fp32, or float64, where rounding decides next to no code
            (torch tiles without drift compensation, which aihwkit reads in fp32).

    Returns:
        The same architecture in evaluation mode and ``dtype``, with aihwkit's layers in it and its
        methods ``program_analog_weights()`` and ``drift_analog_weights(seconds)``.

    Raises:
        AnalogError: There is no analog model, its ranges were never set, it is programmed already,
            the noise model cannot be expressed in aihwkit, or ``dtype`` is neither of the two, or
            float64 with C++ tiles or drift compensation.
    """
    noise_model = noise_model_of(noise_model)
    compensation = _compensation(drift_compensation)
    _require_precision(dtype, tiles, compensation)
    require_tiles(tiles)
    if isinstance(model, nn.Module):
        layers, plain = _checked(model), copy.deepcopy(model)
    else:
        plain = load_checkpoint(model, dtype=dtype)
        layers = _checked(plain)
    plain = to_digital(plain).to(dtype)
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        config = rpu_config(layer.scheme, noise_model, compensation, tiles, dtype)
        made[plain.get_submodule(name)] = _tiled(layer, config)
    for name, module in list(plain.named_modules(remove_duplicate=False)):
        if module in made:
            plain.set_submodule(name, made[module])
    tiled = AnalogWrapper(plain)
    return (tiled if device is None else tiled.to(device)).eval()


def _checked(model: nn.Module) -> dict[str, Any]:
    """The analog layers by name, all fit to be converted."""
    layers: dict[str, Any] = dict(analog_layers(model))
    if not layers or "" in layers:
        raise AnalogError(
            f"{type(model).__name__} is no model that holds analog layers; call "
            "convert_to_analog(model, scheme) first, or give the directory of an analog checkpoint."
        )
    for name, layer in layers.items():
        layer.require_ranges()
        if layer.programmed_weight is not None:
            raise AnalogError(
                f"{name} is programmed, but aihwkit programs its tiles itself; call "
                "restore() on each analog layer, or load the checkpoint without noise."
            )
    if any(layer.scheme.adc_bound == "noisy" for layer in layers.values()):
        warnings.warn(
            "adc_bound is 'noisy', but aihwkit scales the ADC by the clean weights (adc_bound: "
            "clean) after programming too.",
            stacklevel=3,
        )
    return layers


def _tiled(layer: Any, config: Any) -> AnalogLinear:
    """One layer on tiles, with its ranges."""
    dtype = config.runtime.data_type.as_torch()
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are set
        made = AnalogLinear(
            layer.in_features, layer.out_features, layer.bias is not None, rpu_config=config
        )
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    made.set_weights(layer.tile_weight.detach().to(dtype).contiguous(), bias)
    #: Whether the layer's place in the model holds a ``Conv1D``.
    made.is_conv1d = isinstance(layer, AnalogConv1D)
    assert made.analog_module.in_sizes == layer.tiles  # both balance them alike
    if config.pre_post.input_range.enable:
        ranges = layer.input_range.tolist()
        for value, columns in zip(ranges, made.analog_module.array, strict=True):
            for tile in columns:
                tile.set_input_range(value)
    return made.to(layer.weight.device)


def noise_model_of(noise: Any) -> BaseNoiseModel:
    """One of aihwkit's noise models, for what :func:`to_aihwkit` takes as one.

    Raises:
        AnalogError: It cannot be expressed in aihwkit.
    """
    if isinstance(noise, BaseNoiseModel):
        return noise
    model = resolve_noise("hermes" if noise is None else noise)
    if isinstance(model, PCMNoise):
        return PCMNoiseModel(model.scale)
    if isinstance(model, DeviceNoise):
        if model.time is not None:
            raise AnalogError(
                f"noise_model {noise_label(noise)!r} has a time, but aihwkit's tiles are read at "
                "one by drift_analog_weights(seconds); leave it out."
            )
        return model.model
    raise AnalogError(
        f"noise_model is {shown(noise)}, but aihwkit's tiles are programmed by its own noise "
        "models, or by name by pcm, pcm_like, hermes, reram_wan2022 or reram_cmo; write "
        "noise_model='pcm'."
    )


def _compensation(given: Any) -> Any | None:
    if isinstance(given, bool) or given is None:
        return GlobalDriftCompensation() if given else None
    if isinstance(given, BaseDriftCompensation):
        return given
    raise AnalogError(
        f"drift_compensation is {shown(given)}, but must be True, False or one of aihwkit's; write "
        "drift_compensation=True."
    )


def _require_precision(dtype: torch.dtype, tiles: str, compensation: Any | None) -> None:
    if dtype == torch.float32:
        return
    if dtype != torch.float64:
        raise AnalogError(
            f"dtype is {shown(dtype)}, but aihwkit's tiles compute in torch.float32 or "
            "torch.float64; write dtype=torch.float32."
        )
    if tiles != "torch":
        raise AnalogError(
            f"tiles is {shown(tiles)}, but only torch tiles compute in float64; write "
            "tiles='torch'."
        )
    if compensation is not None:
        raise AnalogError(
            "aihwkit's drift compensation reads tiles in fp32, which fails in float64; write "
            "drift_compensation=False."
        )
