"""Hook specifications: every point at which a package can extend analog-plugin.

A package offers hooks in a module named by an entry point::

    [project.entry-points.analog_plugin]
    my_devices = "my_package.hooks"
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from analog_plugin.plugins.types import (
        Evaluator,
        Exporter,
        LayerType,
        ModifierType,
        NoiseModel,
        Preset,
    )

PROJECT = "analog_plugin"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def analog_noise_models() -> Iterable[NoiseModel]:
    """Yield noise models.

    Example::

        import torch
        from analog_plugin.plugins import NoiseModel, hookimpl

        class Uniform:
            def __init__(self, width: float = 0.1) -> None:
                self.width = width

            def program(self, weight, generator):
                peak = weight.abs().amax(1, keepdim=True)
                error = torch.rand(weight.shape, generator=generator, device=weight.device)
                return weight + self.width * peak * (error - 0.5)

        @hookimpl
        def analog_noise_models():
            yield NoiseModel("uniform", Uniform, "uniform error")
    """
    return ()


@hookspec
def analog_presets() -> Iterable[Preset]:
    """Yield named schemes.

    Example::

        from analog_plugin import AnalogScheme
        from analog_plugin.plugins import Preset, hookimpl

        @hookimpl
        def analog_presets():
            yield Preset("MY_CHIP", lambda: AnalogScheme(tile_rows=256, output_bits=9))
    """
    return ()


@hookspec
def analog_layers() -> Iterable[LayerType]:
    """Yield module classes and how they become analog.

    Example::

        from torch import nn
        from analog_plugin import AnalogLinear
        from analog_plugin.plugins import LayerType, hookimpl

        class MyLinear(nn.Linear):
            pass

        @hookimpl
        def analog_layers():
            yield LayerType(MyLinear, AnalogLinear.from_linear)
    """
    return ()


@hookspec
def analog_exporters() -> Iterable[Exporter]:
    """Yield deploy profiles.

    Example::

        import numpy
        from analog_plugin.plugins import Exporter, hookimpl

        def write_npz(model, directory):
            model.config.save_pretrained(directory)
            arrays = {name: t.float().cpu().numpy() for name, t in model.state_dict().items()}
            numpy.savez(directory / "weights.npz", **arrays)

        @hookimpl
        def analog_exporters():
            yield Exporter("npz", write_npz, "weights as numpy arrays")
    """
    return ()


@hookspec
def analog_modifiers() -> Iterable[ModifierType]:
    """Yield modifier classes that recipes of a host may name.

    Example::

        from analog_plugin.plugins import ModifierType, hookimpl

        @hookimpl
        def analog_modifiers():
            yield ModifierType("MyModifier", "my_package.modifier:MyModifier")
    """
    return ()


@hookspec
def analog_evaluators() -> Iterable[Evaluator]:
    """Yield groups of metrics.

    Example::

        from analog_plugin.plugins import Evaluator, hookimpl

        def length(model, tokens, reference, batch_size):
            return {"length": float(tokens.shape[1])}

        @hookimpl
        def analog_evaluators():
            yield Evaluator("length", length, metrics=("length",))
    """
    return ()
