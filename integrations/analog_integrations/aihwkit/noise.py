"""aihwkit's models of measured devices: programming noise, and drift and read noise at a time.

The physics is aihwkit's own (``aihwkit.inference.noise``); here are names, seeds and units. As on
aihwkit's tiles with column-wise weight scaling, the largest weight of each column of a tile is
mapped to the full conductance.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from analog_plugin.errors import AnalogError, is_number, require, shown
from analog_plugin.noise import Programmed
from analog_plugin.noise.programming import parse_time

#: aihwkit's floor under a readout for the drift compensation, in units of full conductance.
_READOUT_FLOOR = 1e-4


class DeviceNoise:
    """One of aihwkit's noise models, programmed under a seed and read at a time.

    Args:
        model: An instance of aihwkit's ``BaseNoiseModel``.
        time: Seconds since the end of programming; None: as programmed, without drift or read
            noise (at 0 there is read noise already).
        compensation: Global drift compensation: the digital outputs of a tile are multiplied by one
            factor, the mean magnitude of its weights as programmed over that at ``time``. As
            aihwkit's ``GlobalDriftCompensation``, but read without converters.

    The same seed programs the same devices, with the same drift coefficients, for every time.
    """

    def __init__(self, model: Any, time: float | None = None, compensation: bool = True) -> None:
        self.model, self.time, self.compensation = model, time, compensation

    @torch.no_grad()
    def program(self, weight: Tensor, generator: torch.Generator) -> Programmed:
        """One tile's weights [columns, rows] as its devices hold them; zero columns stay zero."""
        exact = weight.float().cpu()  # where all of aihwkit's models compute
        peak = exact.abs().amax(1, keepdim=True)
        if not bool(peak.any()):
            return Programmed(torch.zeros_like(weight, dtype=torch.float32))
        unit = torch.where(peak > 0, exact / peak, 0.0)
        seeds = torch.randint(2**62, (2,), generator=generator, device=generator.device).tolist()
        with seeded(seeds[0]):
            made, drift = self.model.apply_programming_noise(unit)
        if self.time is None:
            return Programmed((made * peak).to(weight.device))
        with seeded(seeds[1]):
            read = self.model.apply_drift_noise(made, drift, self.time)
        scale = 1.0
        if self.compensation:
            before, now = (float(w.abs().mean().clamp_min(_READOUT_FLOOR)) for w in (made, read))
            scale = before / now
        return Programmed((read * peak).to(weight.device), scale)


def pcm_like(
    scale: float = 1.0, time: float | str | None = None, compensation: bool = True
) -> DeviceNoise:
    """Phase-change memory of up to 25 µS (Nandakumar et al., ICECS 2019): ``PCMLikeNoiseModel``.

    Args:
        scale: Factor on programming and read noise; the drift is not scaled.
        time, compensation: See :class:`DeviceNoise`.
    """
    factors = _scales("pcm_like", scale)
    return _device("pcm_like", "PCMLikeNoiseModel", factors, time, compensation)


def hermes(
    scale: float = 1.0,
    time: float | str | None = None,
    compensation: bool = True,
    devices: int = 2,
) -> DeviceNoise:
    """Phase-change memory of IBM's HERMES chip (Le Gallo et al., 2023): ``HermesNoiseModel``.

    Args:
        scale: Factor on programming and read noise; the drift is not scaled.
        time, compensation: See :class:`DeviceNoise`.
        devices: 1 or 2 devices for each polarity of a weight (up to 10.35 or 20.7 µS).
    """
    if not isinstance(devices, int) or isinstance(devices, bool) or devices not in (1, 2):
        raise AnalogError(f"hermes: devices is {shown(devices)}, but must be 1 or 2.")
    options = _scales("hermes", scale) | {"num_devices": devices}
    return _device("hermes", "hermes.HermesNoiseModel", options, time, compensation)


def reram_wan2022(
    scale: float = 1.0, time: float | str | None = None, compensation: bool = False
) -> DeviceNoise:
    """ReRAM of up to 40 µS (Wan et al., Nature 2022): ``ReRamWan2022NoiseModel``.

    Measured 1 s, 1 day and 2 days after programming, and at no other time. The model holds its
    coefficients for 40 µS, so it is given that; with aihwkit's default of 25 µS the same absolute
    noise would be on smaller conductances.

    Args:
        scale: Factor on the noise.
        time: 1 s, 1 d or 2 d, or None: as programmed.
        compensation: See :class:`DeviceNoise`; ReRAM does not drift as phase-change memory does.
    """
    factor = _scales("reram_wan2022", scale)["prog_noise_scale"]
    options = {"noise_scale": factor, "g_max": 40.0}
    made = _device("reram_wan2022", "ReRamWan2022NoiseModel", options, time, compensation)
    if made.time is not None and made.time not in made.model.coeff_dic:
        raise AnalogError(
            f"reram_wan2022: time is {shown(time)}, but it was measured 1s, 1d and 2d after "
            "programming only; write time: 1d."
        )
    return made


def reram_cmo(
    scale: float = 1.0,
    time: float | str | None = None,
    compensation: bool = False,
    acceptance: float = 0.2,
) -> DeviceNoise:
    """CMO/HfOx ReRAM of 9 to 88 µS (IBM Research Zurich): ``ReRamCMONoiseModel``.

    One device a weight: its conductances span a tile's smallest to largest weight.

    Args:
        scale: Factor on programming and read noise; the relaxation is not scaled.
        time: Seconds since programming: 0, or at least 1 ms; None: as programmed.
        compensation: See :class:`DeviceNoise`; ReRAM does not drift as phase-change memory does.
        acceptance: Programming stops this near its target, in percent of it: 0.2 or 2.
    """
    if not (is_number(acceptance) and acceptance in (0.2, 2)):
        raise AnalogError(f"reram_cmo: acceptance is {shown(acceptance)}, but must be 0.2 or 2.")
    options = _scales("reram_cmo", scale) | {"acceptance_range": acceptance}
    made = _device("reram_cmo", "ReRamCMONoiseModel", options, time, compensation)
    if made.time and made.time < 1e-3:
        raise AnalogError(
            f"reram_cmo: time is {shown(time)}, but must be 0 or at least 1 ms; write time: 1s."
        )
    return made


def _device(
    name: str, path: str, options: dict[str, Any], time: float | str | None, compensation: bool
) -> DeviceNoise:
    if not isinstance(compensation, bool):
        raise AnalogError(
            f"{name}: compensation is {shown(compensation)}, but must be true or false."
        )
    module, _, cls = f"aihwkit.inference.noise.{path}".rpartition(".")
    if module.endswith(".noise"):  # the package's own name for most of them
        module = "aihwkit.inference"
    make: Callable[..., Any] = getattr(require(module, "aihwkit"), cls)
    return DeviceNoise(make(**options), parse_time(time), compensation)


def _scales(name: str, scale: float) -> dict[str, float]:
    if not (is_number(scale) and 0 <= scale < 100):
        raise AnalogError(
            f"{name}: scale is {shown(scale)}, but must be a number from 0 to below 100; write "
            f"{name}:1.5."
        )
    return {"prog_noise_scale": float(scale), "read_noise_scale": float(scale)}


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Aihwkit draws from torch's global generators: within this context they are at ``seed``."""
    with torch.random.fork_rng(range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a non-tuple sequence")
        torch.manual_seed(seed)
        yield
