"""Our scheme in aihwkit's words: DAC, ADC and tiles as an ``rpu_config``, and back."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from aihwkit.nn import AnalogLinear
from aihwkit.simulator.configs import (
    AnalogMVType,
    BoundManagementType,
    InferenceRPUConfig,
    IOParameters,
    NoiseManagementType,
    RPUDataType,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightModifierType,
    WeightNoiseType,
)

from analog_plugin.errors import AnalogError, one_line, shown
from analog_plugin.scheme import AnalogScheme

_CONFIGURATIONS = {"torch": TorchInferenceRPUConfig, "c++": InferenceRPUConfig}
_DATA_TYPES = {torch.float32: RPUDataType.FLOAT, torch.float64: RPUDataType.DOUBLE}
#: What :func:`scheme_fields` finds of a scheme.
HELD = ("input_bits", "input_range", "output_bits", "out_bound", "tile_rows", "tile_columns")
#: Fields of a tile's forward that ours has not, with the values at which they do nothing.
_WITHOUT = {
    "inp_noise": 0.0,
    "inp_sto_round": False,
    "inp_asymmetry": 0.0,
    "out_noise": 0.0,
    "out_sto_round": False,
    "out_asymmetry": 0.0,
    "out_scale": 1.0,
    "out_nonlinearity": 0.0,
    "w_noise": 0.0,
    "ir_drop": 0.0,
    "slope_calibration": 0.0,
    "v_offset_std": 0.0,
    "r_series": 0.0,
    "w_read_asymmetry_dtod": 0.0,
}


def rpu_config(
    scheme: AnalogScheme,
    noise_model: Any,
    drift_compensation: Any | None,
    tiles: str = "torch",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The configuration of a layer with ``scheme``, for evaluation.

    Args:
        scheme: The layer's own, its ADC bound chosen.
        noise_model: One of aihwkit's ``BaseNoiseModel``.
        drift_compensation: One of aihwkit's, or None.
        tiles: ``"torch"`` or ``"c++"``.
        dtype: What the tiles compute in: fp32 or float64.
    """
    made = _CONFIGURATIONS[tiles]()
    made.runtime.data_type = _DATA_TYPES[dtype]
    made.forward = _forward(scheme)
    ranges = made.pre_post.input_range
    ranges.enable = scheme.input_bits is not None and scheme.input_range != "dynamic"
    ranges.learn_input_range = scheme.input_range == "learned"
    ranges.init_from_data = 0
    mapping = made.mapping
    mapping.digital_bias = True
    mapping.weight_scaling_omega = 1.0  # 0, the default, would skip the mapping
    mapping.weight_scaling_columnwise = True
    mapping.learn_out_scaling = False
    # Never both 0, or a layer would be one tile and no array of them.
    mapping.max_input_size = scheme.tile_rows or -1
    mapping.max_output_size = scheme.tile_columns or -1
    made.modifier.type = WeightModifierType.NONE
    made.clip.type = WeightClipType.NONE
    made.noise_model, made.drift_compensation = noise_model, drift_compensation
    return made


def _forward(scheme: AnalogScheme) -> IOParameters:
    dynamic = scheme.input_bits is not None and scheme.input_range == "dynamic"
    made = IOParameters(
        is_perfect=scheme.input_levels is None,
        inp_bound=1.0,
        inp_res=_resolution(scheme.input_levels),
        out_bound=-1.0 if scheme.output_levels is None else float(scheme.out_bound or 0.0),
        out_res=_resolution(scheme.output_levels),
        w_noise_type=WeightNoiseType.NONE,
        noise_management=NoiseManagementType.ABS_MAX if dynamic else NoiseManagementType.NONE,
        bound_management=BoundManagementType.NONE,
    )
    for name, value in _WITHOUT.items():
        setattr(made, name, value)
    return made


def _resolution(levels: int | None) -> float:
    """Aihwkit counts the steps over both signs."""
    return -1.0 if levels is None else 2.0 * levels


def require_tiles(tiles: str) -> None:
    """Refuse tiles that the installed aihwkit does not have or that do not run.

    Raises:
        AnalogError: ``tiles`` is neither "torch" nor "c++", or the C++ tiles do not run.
    """
    if not isinstance(tiles, str) or tiles not in _CONFIGURATIONS:
        raise AnalogError(
            f"tiles is {shown(tiles)}, but must be torch or c++; write tiles='torch'."
        )
    if tiles == "torch":
        return
    try:
        with torch.random.fork_rng(), torch.no_grad():
            layer = AnalogLinear(2, 2, rpu_config=InferenceRPUConfig()).eval()
            layer(torch.ones(1, 2))
    # A library built for another torch fails as its symbols and types happen to.
    except Exception as error:
        raise AnalogError(
            f"The C++ tiles of aihwkit {version('aihwkit')} do not run with torch "
            f"{torch.__version__}: {one_line(error)}; write tiles='torch', or build aihwkit from "
            "source beside this torch."
        ) from error


def scheme_fields(config: Any, name: str) -> dict[str, Any]:
    """The fields :data:`HELD` of a scheme that computes as tiles with ``config`` do.

    Args:
        config: The configuration of one of aihwkit's inference tiles.
        name: The layer's, for errors.

    Raises:
        AnalogError: The tiles do what no scheme can say.
    """
    io: Any = getattr(config, "forward", None)
    if not isinstance(config, InferenceRPUConfig) or type(io) is not IOParameters:
        raise AnalogError(
            f"{name} has tiles of {type(config).__name__}, but only those of "
            "TorchInferenceRPUConfig and InferenceRPUConfig with IOParameters have a counterpart."
        )

    def refuse(field: str, value: Any, allowed: Any) -> AnalogError:
        return AnalogError(
            f"{name} has {field} = {shown(value)}, which no scheme of ours can say; set it to "
            f"{allowed}."
        )

    if config.modifier.enable_during_test:
        raise refuse("modifier.enable_during_test", True, False)
    mapping = config.mapping
    tiles = {
        "tile_rows": mapping.max_input_size if mapping.max_input_size > 0 else None,
        "tile_columns": mapping.max_output_size if mapping.max_output_size > 0 else None,
    }
    if io.is_perfect:
        none = {"input_bits": None, "output_bits": None, "out_bound": None}
        return none | tiles | {"input_range": "static"}
    for field, nothing in _WITHOUT.items():
        if getattr(io, field) != nothing:
            raise refuse(f"forward.{field}", getattr(io, field), nothing)
    for field, kind in (
        ("mv_type", AnalogMVType.ONE_PASS),
        ("bound_management", BoundManagementType.NONE),
    ):
        if getattr(io, field) != kind:
            raise refuse(f"forward.{field}", getattr(io, field).name, kind.name)
    return tiles | _inputs(config, refuse) | _outputs(io, refuse)


def _inputs(config: Any, refuse: Any) -> dict[str, Any]:
    io, ranges = config.forward, config.pre_post.input_range
    bits = _bits(io.inp_res)
    if bits is None:
        raise refuse("forward.inp_res", io.inp_res, "254 (8 bits), or is_perfect to True")
    if io.inp_bound != 1.0:
        raise refuse("forward.inp_bound", io.inp_bound, "1.0")
    management = io.noise_management
    if ranges.enable:
        if management != NoiseManagementType.NONE:
            raise refuse("forward.noise_management", management.name, "NONE beside an input range")
        return {
            "input_bits": bits,
            "input_range": "learned" if ranges.learn_input_range else "static",
        }
    if management != NoiseManagementType.ABS_MAX or io.nm_thres > 0:
        raise refuse("pre_post.input_range.enable", False, "True, or noise_management to ABS_MAX")
    return {"input_bits": bits, "input_range": "dynamic"}


def _outputs(io: Any, refuse: Any) -> dict[str, Any]:
    if io.out_res <= 0 and io.out_bound <= 0:
        return {"output_bits": None, "out_bound": None}
    bits = _bits(io.out_res)
    if bits is None:
        raise refuse("forward.out_res", io.out_res, "254 (8 bits), or it and out_bound to -1")
    if io.out_bound <= 0:
        raise refuse("forward.out_bound", io.out_bound, "14.0")
    return {"output_bits": bits, "out_bound": float(io.out_bound)}


def _bits(resolution: float) -> int | None:
    """Bits of a converter with this number of steps (or one over it); None: no whole number."""
    steps = 1 / resolution if 0 < resolution <= 1 else resolution
    for bits in range(2, 17):
        if abs(steps - (2**bits - 2)) < 1e-3:
            return bits
    return None
