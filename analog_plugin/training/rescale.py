"""Noise-aware rescaling: per-channel scales, folded into the layer before, that lower the error.

Dividing channel j of a layer's input by s_j and multiplying column j of its weights by s_j changes
nothing for a digital model. On analog tiles it trades input outliers, which widen the DAC's range,
against weight outliers, which raise the programming noise of their whole column and the ADC's
step. SmoothQuant (arXiv 2211.10438) balances for activations alone, which makes weight noise worse;
NORA (noise-optimal rescaling) balances against noise. Here the expected error of the output, from
all three together, decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.layers import analog_layers
from analog_plugin.layers.state import keyed_generator
from analog_plugin.noise import program_tiles
from analog_plugin.ops.histogram import MagnitudeHistogram
from analog_plugin.ops.weights import column_maximum
from analog_plugin.progress import progress_bar
from analog_plugin.scheme import AnalogScheme
from analog_plugin.training.outputs import sample_inputs
from analog_plugin.training.ranges import pick_range

#: Exponents of input peaks and of weight peaks among which each group's scales are searched.
_EXPONENTS = tuple(product((0.0, 0.15, 0.3, 0.45), (0.0, 0.2, 0.4)))
#: What the two halves of a block may consist of, beside norms of queries and keys.
_SHAPES = {
    "self_attn": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"}),
    "mlp": ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}),
}
_HEAD_NORMS = {"q_norm", "k_norm"}
#: The ADC bound taken where it is chosen only later.
_TYPICAL_BOUND = 3.0


@dataclass(frozen=True)
class FoldGroup:
    """Layers that read one input, and the producer into which its scales fold exactly.

    Args:
        name: For reports: the first consumer.
        producer: The norm or linear layer before.
        rows: The part of the producer's outputs that is scaled.
        consumers: Names of the linear layers that read the input.
        heads: (key-value heads, query heads per key-value head) where the input is an attention's
            output: the scales of a value channel serve all its query heads.
    """

    name: str
    producer: str
    rows: slice
    consumers: tuple[str, ...]
    heads: tuple[int, int] | None = None

    def expand(self, scales: Tensor) -> Tensor:
        """Scales of the producer's channels to scales of the consumers' inputs."""
        if self.heads is None:
            return scales
        groups, repeats = self.heads
        return scales.view(groups, 1, -1).expand(-1, repeats, -1).reshape(-1)

    def reduce(self, peaks: Tensor) -> Tensor:
        """Peaks [in] of the consumers' inputs to peaks of the producer's channels."""
        if self.heads is None:
            return peaks
        groups, repeats = self.heads
        return peaks.view(groups, repeats, -1).amax(1).reshape(-1)


@dataclass(frozen=True)
class Rescaling:
    """What was found for one group: relative squared output error on the checking half."""

    group: FoldGroup
    exponents: tuple[float, float]
    before: float
    after: float


def rescale_model(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    noise: Any | None,
    total: int | None = None,
) -> list[Rescaling]:
    """Fold the scales with the least expected output error into a model's weights, in place.

    A group keeps its scales only if they also lower the error on inputs that had no part in the
    choice.

    Args:
        model: A model with analog layers; its digital function is the same afterwards. Groups with
            a layer that is not analog are left alone.
        batches: Calibration batches, keyword arguments of the model's forward.
        noise: The programming noise model; None: converters alone decide.
        total: Number of batches, for the progress bar.

    Returns:
        One record for each group that was rescaled.
    """
    layers = dict(analog_layers(model))
    groups = [group for group in fold_groups(model) if layers.keys() >= set(group.consumers)]
    readers = {group.name: layers[group.name] for group in groups}
    samples = sample_inputs(model, readers, batches, total)
    found = []
    for group in progress_bar(groups, desc="Rescaling channels"):
        if group.name not in samples:
            continue
        weights = [layers[name].tile_weight.detach() for name in group.consumers]
        scheme = layers[group.name].scheme
        if scheme.out_bound is None:
            scheme = scheme.replace(out_bound=_TYPICAL_BOUND)
        record = _search(group, weights, samples.pop(group.name), scheme, noise)
        if record is not None:
            scales, result = record
            fold(model, group, scales)
            found.append(result)
    return found


def fold_groups(model: nn.Module) -> Iterator[FoldGroup]:
    """Groups of Llama-shaped blocks (also Mistral, Qwen2; Phi-3 with its fused projections)."""
    for name, block in model.named_modules():
        parts = dict(block.named_modules())
        if not {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp"} <= parts.keys():
            continue
        # Blocks with further norms apply them elsewhere; theirs is another mathematics.
        if sum(n.endswith("norm") for n in parts if "." not in n) != 2:
            continue
        # Likewise further layers: a norm before o_proj, an MLP whose activation is not gated.
        known = {
            f"{part}.{n}": m
            for part, shapes in _SHAPES.items()
            if _weighted(parts[part]) - _HEAD_NORMS in shapes
            for n, m in parts[part].named_children()
            if isinstance(m, nn.Linear)
        }
        for group in _block_groups(f"{name}." if name else "", block, known):
            producer = model.get_submodule(group.producer)
            if isinstance(producer, nn.Linear) or _is_scaled_by_weight(producer):
                yield group


def _weighted(module: nn.Module) -> set[str]:
    """Names of the modules below ``module`` that have parameters."""
    return {n for n, m in module.named_modules() if n and next(m.parameters(), None) is not None}


@torch.no_grad()
def _is_scaled_by_weight(norm: nn.Module) -> bool:
    """Whether a norm's output is proportional to its weight (and bias); Gemma's adds one to it."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    # By its outputs alone: hosts that offload parameters do not let them be replaced for a probe.
    probe = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype, device=weight.device)
    made = norm(probe[None])[0].float()
    bias = getattr(norm, "bias", None)
    if isinstance(bias, Tensor):
        made = made - bias.float()
    standard = probe.float() / probe.float().square().mean().sqrt()
    return bool((made - weight.float() * standard).norm() <= 0.02 * made.norm())


def _block_groups(prefix: str, block: Any, linears: Mapping[str, nn.Linear]) -> Iterator[FoldGroup]:
    def group(producer: str, rows: slice, names: Sequence[str], heads: Any = None) -> FoldGroup:
        consumers = tuple(prefix + n for n in names)
        return FoldGroup(consumers[0], prefix + producer, rows, consumers, heads)

    everything = slice(None)
    for norm, candidates in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ):
        if all(n in linears for n in candidates):
            yield group(norm, everything, candidates)
    if "mlp.down_proj" in linears:
        width = linears["mlp.down_proj"].in_features
        for up, rows in (("mlp.up_proj", everything), ("mlp.gate_up_proj", slice(width, None))):
            if up in linears:
                yield group(up, rows, ["mlp.down_proj"])
    if "self_attn.o_proj" in linears:
        repeats = getattr(block.self_attn, "num_key_value_groups", 1)
        width = linears["self_attn.o_proj"].in_features // repeats
        heads = (width // block.self_attn.head_dim, repeats)
        for value, rows in (
            ("self_attn.v_proj", everything),
            ("self_attn.qkv_proj", slice(-width, None)),
        ):
            if value in linears:
                yield group(value, rows, ["self_attn.o_proj"], heads)


@torch.no_grad()
def fold(model: nn.Module, group: FoldGroup, scales: Tensor) -> None:
    """Divide the producer's channels by ``scales`` and multiply the consumers' columns by them."""
    producer: Any = model.get_submodule(group.producer)
    for parameter in (producer.weight, getattr(producer, "bias", None)):
        if parameter is not None:
            part = parameter[group.rows]
            shape = (-1, *[1] * (parameter.dim() - 1))
            part.copy_(part.double() / scales.double().view(shape))
    columns = group.expand(scales).double()
    for name in group.consumers:
        weight = _weight(model, name)
        weight.copy_(weight.double() * columns)


def _weight(model: nn.Module, name: str) -> Tensor:
    module: Any = model.get_submodule(name)
    return module.weight


def expected_error(
    weights: Sequence[Tensor],
    inputs: Tensor,
    scales: Tensor,
    scheme: AnalogScheme,
    noise: Any | None,
    ranges: Tensor | None = None,
) -> tuple[float, Tensor]:
    """Expected squared error of the outputs over their energy, with inputs divided by ``scales``.

    The sum of three variances: input quantization and clipping (measured on ``inputs``),
    programming noise (one draw, averaged over all devices), and ADC rounding (a twelfth of the
    squared step; saturation is not part of it).

    Args:
        weights: [out, in] of each layer that reads the input.
        inputs: [T, in] samples of the unscaled input.
        scales: [in].
        noise: The programming noise model, or None.
        ranges: λ [K] to use; None: picked from ``inputs`` by the scheme's criterion.

    Returns:
        The relative error, and the ranges [K].
    """
    tiles = scheme.tiles(inputs.shape[1])
    x = inputs / scales
    levels = scheme.input_levels
    if ranges is None and levels is None:  # no DAC, and so no ADC
        ranges = torch.ones(len(tiles), device=x.device)
    elif ranges is None:
        histogram = MagnitudeHistogram(tiles, x.device)
        histogram.update(x)
        ranges = pick_range(histogram, scheme)
    energy = x.square().mean(0)
    if levels is None:
        quantization = torch.zeros_like(energy)
    else:
        step = torch.repeat_interleave(ranges / levels, torch.tensor(tiles, device=x.device))
        rounded = (x / step).round_().clamp_(-levels, levels).mul_(step)
        quantization = (rounded - x).square_().mean(0)
    error = total = 0.0
    for weight in weights:
        scaled = weight.float() * scales
        error += float((scaled.square() @ quantization).sum())
        if noise is not None:
            generator = keyed_generator("rescale", scaled.device)
            parts = zip(
                program_tiles(noise, scaled, tiles, generator),
                scaled.split(tiles, 1),
                energy.split(tiles),
                strict=True,
            )
            for tile, block, power in parts:
                wrong = tile.weight.float() * tile.output_scale - block
                error += float((wrong.square_() @ power).sum())
        if scheme.output_levels is not None and scheme.out_bound is not None:
            peaks = column_maximum(scaled, tiles)
            steps = scheme.out_bound * ranges[:, None] * peaks / scheme.output_levels
            error += float(steps.square().sum()) / 12
        total += float((x @ scaled.t()).square().mean(0).sum())
    return error / max(total, 1e-30), ranges


def _search(
    group: FoldGroup,
    weights: list[Tensor],
    inputs: Tensor,
    scheme: AnalogScheme,
    noise: Any | None,
) -> tuple[Tensor, Rescaling] | None:
    choose, check = inputs[::2], inputs[1::2]
    peaks = group.reduce(choose.abs().amax(0)).clamp_min(1e-12)
    strong = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0)
    strong = group.reduce(strong).clamp_min(1e-12)
    best = None
    for a, b in _EXPONENTS:
        scales = peaks**a / strong**b
        scales = scales / scales.log().mean().exp()
        error, ranges = expected_error(weights, choose, group.expand(scales), scheme, noise)
        if best is None or error < best[0]:
            best = (error, scales, (a, b), ranges)
        if (a, b) == (0.0, 0.0):
            none_ranges = ranges
    assert best is not None
    if best[2] == (0.0, 0.0):
        return None
    before, _ = expected_error(
        weights, check, torch.ones_like(group.expand(best[1])), scheme, noise, none_ranges
    )
    after, _ = expected_error(weights, check, group.expand(best[1]), scheme, noise, best[3])
    if not after < before:
        return None
    return best[1], Rescaling(group, best[2], before, after)
