"""The records that this project offers through its own hooks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from analog_plugin.plugins.hookspecs import hookimpl
from analog_plugin.plugins.types import Evaluator, Exporter, LayerType, NoiseModel, Preset


@hookimpl
def analog_noise_models() -> Iterable[NoiseModel]:
    """Gaussian noise, the paper's phase-change memory, rounding, and faults of an array."""
    from analog_plugin.noise import GaussianNoise, IRDrop, PCMNoise, StuckDevices, WeightRounding

    yield NoiseModel("gaussian", GaussianNoise, "Gaussian, relative to the column's maximum")
    yield NoiseModel("pcm", PCMNoise, "phase-change memory, as in 'Analog Foundation Models'")
    yield NoiseModel("rtn", WeightRounding, "weights rounded to nearest at 4 (or other) bits")
    yield NoiseModel("stuck", StuckDevices, "stuck devices, also behind others: pcm+stuck:0.001")
    yield NoiseModel("ir_drop", IRDrop, "IR drop of the wires, also behind others: pcm+ir_drop")


@hookimpl
def analog_presets() -> Iterable[Preset]:
    """The paper's recipe, ours, and the digital baseline."""
    from analog_plugin.presets import AFM, AFM_PLUS, DIGITAL_SI8_W4

    yield Preset("AFM", lambda: AFM, "the recipe of 'Analog Foundation Models'")
    yield Preset("AFM_PLUS", lambda: AFM_PLUS, "AFM from a better start, for short budgets")
    yield Preset("DIGITAL_SI8_W4", lambda: DIGITAL_SI8_W4, "LLM-QAT-style 4-bit weights")


@hookimpl
def analog_layers() -> Iterable[LayerType]:
    """nn.Linear and transformers' Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from analog_plugin.layers import AnalogConv1D, AnalogLinear

    yield LayerType(nn.Linear, AnalogLinear.from_linear, "linear layer")
    yield LayerType(Conv1D, AnalogConv1D.from_conv1d, "GPT-2's transposed linear layer")


@hookimpl
def analog_exporters() -> Iterable[Exporter]:
    """The deploy profiles."""
    from analog_plugin.checkpoint import conductances
    from analog_plugin.checkpoint.digital import DIGITAL_PROFILES, check_digital, plan_profile
    from analog_plugin.checkpoint.plain import plain_reading
    from analog_plugin.checkpoint.profiles import write_analog_fp, write_digital

    full = "full-precision weights and the analog state"
    yield Exporter("analog-fp", write_analog_fp, full, prepare=plan_profile, reading=plain_reading)
    for profile in DIGITAL_PROFILES:
        options = ["weight_scale"]
        if profile.weight_bits == "mixed":
            options += ["bits", "average_bits"]
            if profile.packed:  # whole bytes keep to no number of them
                options.append("max_bytes")
        yield Exporter(
            profile.name,
            write_digital,
            f"{profile.summary}; purely digital",
            partial(check_digital, profile),
            partial(plan_profile, profile=profile),
            plain_reading,
            tuple(options),
        )
    yield Exporter(
        "conductances",
        conductances.write_conductances,
        "target conductances of each tile, for a chip's programming software",
        conductances.check_conductances,
        conductances.plan_conductances,
        options=("g_max",),
    )


@hookimpl
def analog_evaluators() -> Iterable[Evaluator]:
    """Perplexity, KL divergence and agreement with the reference model."""
    from analog_plugin.evaluation.fidelity import METRICS, fidelity

    yield Evaluator("fidelity", fidelity, "perplexity, KL to the original, top-1", METRICS)
