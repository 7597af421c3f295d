"""Input and output scales of plain loaders: from the analog ranges, or found on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.checkpoint.digital import (
    DigitalLayer,
    DigitalPlan,
    plain_layers,
    tokens_of,
)
from analog_plugin.checkpoint.plain import plain_reading
from analog_plugin.errors import AnalogError
from analog_plugin.evaluation.fidelity import Reference, fidelity
from analog_plugin.layers import digital_layers
from analog_plugin.layers.base import RANGE_FLOOR
from analog_plugin.layers.observe import run_batches, unreached
from analog_plugin.layers.prefix import installed_prefix, without_prefix
from analog_plugin.modes import evaluation_mode
from analog_plugin.ops.histogram import MagnitudeHistogram
from analog_plugin.scheme import fused_with

#: Members of a fused group with ranges so much apart, relative to the largest, have their cost
#: measured.
_APART = 1e-3


@dataclass(frozen=True)
class PlainRanges:
    """Ranges [1] of layers by name, each layer's own; of outputs only where they are quantized."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def plain_ranges(
    model: nn.Module, plan: DigitalPlan, batches: Sequence[Mapping[str, Tensor]] | None
) -> PlainRanges:
    """The ranges of ``plan``'s layers as plain loaders will run them.

    Raises:
        AnalogError: Something is to be found on data, and there are no batches.
    """
    outputs = plan.profile.output_bits is not None
    # What was found with full-precision weights is stored with the model.
    inputs = installed_prefix(model) is not None and plan.profile.weight_bits is not None
    if batches is not None and plan.layers and (inputs or outputs):
        # Before the model is changed for the reading: they may be sampled from it.
        found = _calibrated(model, plan, list(batches))
        return found if inputs else PlainRanges(_stored(model), found.outputs)
    if outputs:
        raise AnalogError(
            f"The profile {plan.profile.name} quantizes outputs, whose ranges are found on data; "
            "give batches of tokens."
        )
    return PlainRanges(_stored(model), {})


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """``plain_range`` of each layer, else the largest of its tiles' ranges."""
    ranges = {}
    for name, layer in plain_layers(model).items():
        if layer.plain_range is not None:
            ranges[name] = layer.plain_range
        elif installed_prefix(model) is None:
            ranges[name] = layer.input_range.detach().max().reshape(1)
        else:
            raise AnalogError(
                "The model has a digital prefix, which plain loaders do not know; call "
                "calibrate_plain_ranges(model, batches) before it is saved."
            )
    return ranges


@torch.no_grad()
def _calibrated(
    model: nn.Module, plan: DigitalPlan, batches: Sequence[Mapping[str, Tensor]]
) -> PlainRanges:
    """Ranges with the least squared error, of inputs and outputs with the plan's weights."""
    exact = {
        name: replace(layer, input_bits=None, output_bits=None)
        for name, layer in plan.layers.items()
    }
    levels = {
        part: 2 ** (bits - 1) - 1
        for part, bits in (
            ("inputs", next(iter(plan.layers.values())).input_bits),
            ("outputs", plan.profile.output_bits),
        )
        if bits is not None
    }
    found: dict[str, dict[str, MagnitudeHistogram]] = {part: {} for part in levels}
    mask: list[Tensor | None] = [None]

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for part, x in (("inputs", inputs[0]), ("outputs", output)):
                if part not in levels:
                    continue
                if name not in found[part]:
                    found[part][name] = MagnitudeHistogram([x.shape[-1]], x.device)
                found[part][name].update(x, mask[0])

        return hook

    def masked(batch: Mapping[str, Tensor]) -> None:
        padding = batch.get("attention_mask")
        mask[0] = None if padding is None else padding.reshape(-1).bool()

    with (
        plain_reading(model, DigitalPlan(plan.profile, exact)),
        evaluation_mode(model),
    ):
        # They go with the modules, at the end of the reading.
        watched = {name: model.get_submodule(name) for name in plan.layers}
        for name, module in watched.items():
            module.register_forward_hook(watch(name))
        desc = f"Calibrating {plan.profile.name}"
        run_batches(model, batches, desc, watched=watched.values(), before=masked)
    ranges: dict[str, dict[str, Tensor]] = {"inputs": {}, "outputs": {}}
    for part, histograms in found.items():
        if lost := plan.layers.keys() - histograms.keys():
            raise unreached(min(lost))
        for name, histogram in histograms.items():
            histogram.merge_processes()
            # Plain loaders divide by it, also where a layer saw only zeros.
            ranges[part][name] = histogram.range_mse(levels[part]).clamp_min(RANGE_FLOOR)
    return PlainRanges(**ranges)


def with_scales(
    model: nn.Module,
    plan: DigitalPlan,
    ranges: PlainRanges,
    batches: Sequence[Mapping[str, Tensor]] | None,
) -> DigitalPlan:
    """``plan`` with the scales of ``ranges``, equal within each group that engines fuse.

    The largest range of a group is taken. Where that changes a layer's and there are batches, what
    it costs is measured and becomes a note.
    """
    equal = PlainRanges(_largest_of_groups(ranges.inputs), _largest_of_groups(ranges.outputs))
    scaled = DigitalPlan(plan.profile, _scaled(plan, equal), list(plan.notes))
    unequal = [
        name
        for own, fused in ((ranges.inputs, equal.inputs), (ranges.outputs, equal.outputs))
        for name in own
        if float(own[name]) < (1 - _APART) * float(fused[name])
    ]
    if unequal:
        note = (
            "Serving engines have one scale for each fused group (q/k/v, gate/up): in "
            f"{len(set(unequal))} layers it is the group's largest instead of the layer's own"
        )
        if batches is not None:
            own = DigitalPlan(plan.profile, _scaled(plan, ranges))
            before, after = _divergences(model, (own, scaled), batches)
            note += (
                f"; with it the KL to the model in full precision is {after:.4f} nats a token, "
                f"without {before:.4f}"
            )
        scaled.notes.append(f"{note}.")
    return scaled


def _divergences(
    model: nn.Module, plans: Sequence[DigitalPlan], batches: Sequence[Mapping[str, Tensor]]
) -> list[float]:
    """KL of each plan's reading to the model without quantization, on ``batches``."""
    tokens = tokens_of(batches)
    size = len(batches[0]["input_ids"])
    found = []
    with evaluation_mode(model):
        with digital_layers(model), without_prefix(model):
            reference = Reference.of(model, tokens, size, keep_logits=True)
        for plan in plans:
            with plain_reading(model, plan):
                found.append(fidelity(model, tokens, reference, size)["kl"])
    return found


def _largest_of_groups(ranges: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.stack([ranges[other] for other in fused_with(name, ranges)]).amax(0)
        for name in ranges
    }


def _scaled(plan: DigitalPlan, ranges: PlainRanges) -> dict[str, DigitalLayer]:
    def scale(found: Mapping[str, Tensor], name: str, bits: int | None) -> Tensor | None:
        return None if bits is None else found[name] / (2 ** (bits - 1) - 1)

    return {
        name: replace(
            layer,
            input_scale=scale(ranges.inputs, name, layer.input_bits),
            output_scale=scale(ranges.outputs, name, layer.output_bits),
        )
        for name, layer in plan.layers.items()
    }
