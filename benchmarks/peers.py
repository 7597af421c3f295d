"""Whom the benchmarks compare with, with settings that make the same simulation of them."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from analog_plugin import AnalogScheme
from analog_plugin.layers import AnalogLinear, ForwardState

#: Input range of all analog layers: no input of unit variance is clipped often.
RANGE = 4.0
OURS, PLAIN, LIGHTNING = "analog-plugin", "nn.Linear", "aihwkit-lightning"
#: Ours with the noise drawn again in the backward instead of kept.
REDRAWN = "analog-plugin, noise drawn again"
#: By its kernels for GPUs.
LIGHTNING_TRITON = "aihwkit-lightning, Triton"
AIHWKIT, TORCHAO, LIGER = "aihwkit", "torchao", "liger-kernel"
#: What each peer imports, and how it is installed.
_PEERS = {
    LIGHTNING: ("aihwkit_lightning.nn", "pip install aihwkit-lightning==2.1.0"),
    LIGHTNING_TRITON: (
        "aihwkit_lightning.nn.modules.triton_utils.triton_linear",
        "pip install aihwkit-lightning==2.1.0",
    ),
    AIHWKIT: ("aihwkit.nn", "pip install --no-deps aihwkit==1.1.0"),
    TORCHAO: ("torchao.quantization.qat", "pip install torchao"),
    LIGER: ("liger_kernel.transformers.fused_linear_jsd", "pip install liger-kernel"),
}


def why_not(peer: str) -> str | None:
    """Why a peer cannot be measured here, as its row says it; None where it can."""
    if peer not in _PEERS:
        return None
    module, line = _PEERS[peer]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # one prints which kernels it has
            importlib.import_module(module)
    except ImportError:
        return f"not installed: `{line}`"
    return None


def absent(peers: Iterable[str]) -> dict[str, str]:
    """Of ``peers`` those that cannot be measured here, and why."""
    return {peer: why for peer in peers if (why := why_not(peer)) is not None}


def scheme(tile_rows: int | None) -> AnalogScheme:
    """Converters, noise and clipping as published with 'Analog Foundation Models'."""
    return AnalogScheme(tile_rows=tile_rows)


def lightning_config(tile_rows: int | None) -> Any:
    """The same settings for aihwkit-lightning."""
    from aihwkit_lightning.simulator import configs

    config = configs.TorchInferenceRPUConfig()
    config.forward.inp_res = config.forward.out_res = 254  # 2 * 127 steps: 8 bits
    config.forward.out_bound, config.forward.out_noise = 14.0, 0.0
    # Only with this clip type is the ADC scaled per column.
    config.clip.type, config.clip.sigma = configs.WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 2.5
    config.modifier.noise_type = configs.WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
    config.modifier.std_dev = 0.03
    ranges = config.pre_post.input_range
    ranges.enable, ranges.learn_input_range, ranges.init_from_data = True, True, 0
    ranges.init_value, ranges.decay, ranges.input_min_percentage = RANGE, 0.01, 0.95
    config.mapping.max_input_size = tile_rows or -1
    return config


def aihwkit_config(tile_rows: int | None) -> Any:
    """The same settings for aihwkit's torch tiles, which compute in fp32 only."""
    from aihwkit.inference import PCMLikeNoiseModel
    from aihwkit.simulator.configs import TorchInferenceRPUConfig
    from aihwkit.simulator.parameters.enums import (
        BoundManagementType,
        NoiseManagementType,
        WeightModifierType,
    )

    config = TorchInferenceRPUConfig()
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.inp_bound, config.forward.out_bound = 1.0, 14.0
    config.forward.inp_noise = config.forward.out_noise = config.forward.w_noise = 0.0
    config.forward.bound_management = BoundManagementType.NONE
    config.forward.noise_management = NoiseManagementType.NONE
    # The default of 0 leaves weights unscaled; by column, as the other peers have it.
    config.mapping.weight_scaling_omega = 1.0
    config.mapping.weight_scaling_columnwise = True
    config.mapping.learn_out_scaling = False
    config.mapping.max_input_size, config.mapping.max_output_size = tile_rows or 0, 0
    config.modifier.type, config.modifier.std_dev = WeightModifierType.ADD_NORMAL, 0.03
    ranges = config.pre_post.input_range
    ranges.enable, ranges.learn_input_range, ranges.init_from_data = True, True, 0
    ranges.init_value, ranges.decay, ranges.input_min_percentage = RANGE, 0.01, 0.95
    config.noise_model, config.drift_compensation = PCMLikeNoiseModel(), None
    return config


def layer(peer: str, linear: nn.Linear, tile_rows: int | None) -> nn.Module:
    """The peer's layer in training mode, from a digital one without a bias."""
    if peer == PLAIN:
        made: nn.Module = linear
    elif peer in (OURS, REDRAWN):
        made = AnalogLinear.from_linear(linear, scheme(tile_rows))
        made.set_input_range(RANGE)
        made.state = ForwardState()
        made.state.keep_noise = peer == OURS
    elif peer in (LIGHTNING, LIGHTNING_TRITON):
        from aihwkit_lightning.nn import AnalogLinear as LightningLinear

        made = LightningLinear.from_digital(linear, lightning_config(tile_rows))
        if peer == LIGHTNING_TRITON:
            _mend_lightning()
            made.register_forward_pre_hook(lambda *_: os.environ.update(AIHWKIT_USE_TRITON="1"))
            made.register_forward_hook(
                lambda *_: os.environ.pop("AIHWKIT_USE_TRITON"), always_call=True
            )
    elif peer == AIHWKIT:
        from aihwkit.nn import AnalogLinear as AihwkitLinear

        made = AihwkitLinear.from_digital(linear, aihwkit_config(tile_rows))
    else:
        made = _torchao_layer(linear)
    return made.to(linear.weight.device).train()


def _mend_lightning() -> None:
    """Let 2.1.0 draw noise by Triton: it gives a kernel that is tuned its block sizes once more."""
    from aihwkit_lightning.nn.modules.triton_utils import triton_linear

    kernel = triton_linear.modifier_kernel
    if type(kernel).__name__ == "Autotuner":
        triton_linear.modifier_kernel = kernel.fn


def _torchao_layer(linear: nn.Linear) -> nn.Module:
    """8-bit weights by column and 8-bit inputs by token: neither tiles, ADC nor noise."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = nn.Sequential(linear)
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    config = QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
    quantize_(model, config)
    return model[0]
