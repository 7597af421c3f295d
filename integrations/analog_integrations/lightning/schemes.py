"""Schemes and aihwkit-lightning's configurations of the same forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from analog_integrations.lightning.config import (
    LEARNABLE,
    NONE,
    PER_CHANNEL,
    LightningConfig,
)
from analog_plugin import AnalogScheme
from analog_plugin.errors import AnalogError

#: Standard deviations that no weight reaches: the largest of n values is at most √n of them away.
_NEVER = 1e6


def scheme_of(
    config: LightningConfig, adc_bound: Literal["clean", "noisy"] = "clean"
) -> tuple[AnalogScheme, list[str]]:
    """The scheme whose forward is that of ``config``.

    Args:
        config: aihwkit-lightning's configuration.
        adc_bound: See :class:`~analog_plugin.AnalogScheme`.

    Returns:
        The scheme, and a sentence on each thing that it cannot hold; none changes the forward in
        evaluation.

    Raises:
        AnalogError: The forward is one that no scheme has, or that fails in aihwkit-lightning too.
    """
    _refuse(config)
    clips = config.clip_type == PER_CHANNEL and 0 < config.clip_sigma < _NEVER
    scheme = AnalogScheme(
        input_bits=_bits("forward.inp_res", config.inp_res),
        input_range=_range_kind(config),
        range_init="max" if config.fast_mode else "std",
        range_init_std=config.init_std_alpha,
        range_decay=config.decay,
        range_min_percentage=config.input_min_percentage,
        output_bits=_bits("forward.out_res", config.out_res),
        adc_bound=adc_bound,
        weight_noise=0.0 if config.noise_type == NONE else config.std_dev,
        weight_bits=_weight_bits(config),
        clip_sigma=config.clip_sigma if clips else None,
        tile_rows=config.max_input_size if config.max_input_size > 0 else None,
    )
    if config.init_from_data > 0:
        scheme = scheme.replace(range_init_batches=config.init_from_data)
    if config.has_adc:
        scheme = scheme.replace(out_bound=config.out_bound)
    return scheme, list(_notes(config))


def config_of(scheme: AnalogScheme) -> LightningConfig:
    """The configuration whose forward is that of ``scheme``.

    The ADC's full scale is that of each column only with one of two clip types, so that where
    nothing is clipped the bound is one that no weight reaches.
    """
    converts, rounds = scheme.input_bits is not None, scheme.weight_bits is not None
    adc = scheme.output_bits is not None
    return LightningConfig(
        inp_res=_steps(scheme.input_bits),
        out_bound=scheme.out_bound if adc and scheme.out_bound is not None else 0.0,
        out_res=_steps(scheme.output_bits),
        clip_sigma=_NEVER if scheme.clip_sigma is None else scheme.clip_sigma,
        clip_type=PER_CHANNEL,
        std_dev=scheme.weight_noise,
        weight_res=_steps(scheme.weight_bits) if rounds else 0.0,
        noise_type="AddNormalPerChannel" if scheme.weight_noise > 0 else NONE,
        quantization_type="DiscretizePerChannel" if rounds else NONE,
        max_input_size=-1 if scheme.tile_rows is None else scheme.tile_rows,
        enable=converts,
        dynamic=converts and scheme.input_range == "dynamic",
        learn_input_range=scheme.input_range == "learned",
        init_from_data=scheme.range_init_batches,
        init_std_alpha=scheme.range_init_std,
        decay=scheme.range_decay,
        input_min_percentage=scheme.range_min_percentage,
    )


def not_carried(scheme: AnalogScheme) -> list[str]:
    """Fields of ``scheme`` that are others after a way there and back."""
    back, _ = scheme_of(config_of(scheme), scheme.adc_bound)
    before, after = scheme.to_dict(), back.to_dict()
    meaningless = {"out_bound"} if scheme.output_bits is None else set()
    return [name for name in before if before[name] != after[name] and name not in meaningless]


def _refuse(config: LightningConfig) -> None:
    """Refuse what no scheme has."""
    converts = config.inp_res > 0
    faults = {
        "quantizes or bounds values without input ranges, which fails in aihwkit-lightning too": (
            not config.enable and (converts or config.has_adc or config.out_bound > 0)
        ),
        "has fast_mode with dynamic ranges, which fails in aihwkit-lightning too": (
            config.enable and config.fast_mode and config.dynamic
        ),
        "quantizes outputs without a bound, which fails in aihwkit-lightning too": (
            config.has_adc and config.out_bound <= 0
        ),
        "clips inputs without quantizing them": config.has_ranges and not converts,
        "quantizes outputs, but not inputs": config.has_adc and not converts,
        "bounds outputs without quantizing them": config.out_bound > 0 and not config.has_adc,
        "rounds weights to 0 steps": (config.quantization_type != NONE and config.weight_res <= 0),
    }
    for fault, found in faults.items():
        if found:
            raise AnalogError(
                f"rpu_config {fault}: no scheme can hold that; give a model with quantized inputs "
                "and, where outputs are bounded, quantized outputs."
            )


def _range_kind(config: LightningConfig) -> Literal["learned", "static", "dynamic"]:
    if config.enable and config.dynamic:
        return "dynamic"
    return "learned" if config.learn_input_range else "static"


def _notes(config: LightningConfig) -> Iterator[str]:
    """What the scheme cannot hold; all of it matters in training alone."""
    if config.out_noise > 0:
        yield f"Training noise at the outputs (out_noise {config.out_noise:g}) is not taken over."
    if config.noise_type == "AddNormal":
        yield (
            f"Training noise of {config.std_dev:g} was relative to the largest weight of a tile; "
            "here it is relative to that of each column."
        )
    if config.clip_type == "LayerGaussian":
        yield (
            f"Clipping at {config.clip_sigma:g} σ of the whole layer is not taken over; here "
            "clipping is by column (clip_sigma)."
        )
    if config.clip_type == LEARNABLE:
        yield "Weights are stored as the learnt clipping left them; it is not learnt on."
    if config.quantization_type != NONE:
        steps = _number_of_steps(config.weight_res)
        yield f"Weights are stored as rounded to {steps:g} steps, as every forward had them."
        if _weight_bits(config) is None:
            yield "Training does not round them again: no whole number of bits by column does so."
    if config.fast_mode:
        yield (
            "Ranges were found from running extremes (fast_mode, act_range_momentum "
            f"{config.act_range_momentum:g}); training does not find them again."
        )
    if config.enable_during_test:
        yield "enable_during_test is not taken over; aihwkit-lightning 2 ignores it too."


def _weight_bits(config: LightningConfig) -> int | None:
    by_column = config.quantization_type == "DiscretizePerChannel" and config.clip_type != LEARNABLE
    return _bits_of_steps(_number_of_steps(config.weight_res)) if by_column else None


def _steps(bits: int | None) -> float:
    return -1 if bits is None else 2**bits - 2


def _number_of_steps(resolution: float) -> float:
    return resolution if resolution > 1 else 1 / resolution


def _bits_of_steps(steps: float) -> int | None:
    near = (bits for bits in range(2, 17) if abs(steps / _steps(bits) - 1) < 1e-6)
    return next(near, None)


def _bits(place: str, resolution: float) -> int | None:
    if resolution <= 0:
        return None
    bits = _bits_of_steps(_number_of_steps(resolution))
    if bits is None:
        raise AnalogError(
            f"rpu_config: {place} is {resolution:g}, but must be a number of steps 2**bits - 2 "
            "(254 for 8 bits; bits from 2 to 16) or its inverse."
        )
    return bits
