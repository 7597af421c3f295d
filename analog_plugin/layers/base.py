"""What every analog layer is: converters, tiles, noise and programming over a digital weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.layers.state import ForwardState, keyed_generator
from analog_plugin.ops.matmul import MatmulContext, analog_matmul, column_maximum
from analog_plugin.ops.ranges import RangeInitializer
from analog_plugin.scheme import AnalogScheme

#: No range falls below this, whatever the optimizer does.
RANGE_FLOOR = 1e-6


class AnalogLayer(nn.Module):
    """Mixin over a linear layer with ``weight`` and ``bias``; see :class:`AnalogLinear`.

    Attributes:
        scheme: The :class:`~analog_plugin.scheme.AnalogScheme`.
        input_range: λ [n_tiles], an fp32 Parameter that stays fp32 when the model is cast.
        programmed_weight: [out, in] weights as programmed onto devices, or None.
        name: The layer's name in its model; keys its noise.
        digital: While true there are neither converters nor training noise: a plain linear layer,
            with the programmed weights if there are any.
        observer: Called with each input and its padding mask, for calibration.
        owns_range: False where ``input_range`` is shared and another layer updates it.
    """

    scheme: AnalogScheme
    weight: Any
    bias: Any
    tiles: list[int]
    clip_counts: Tensor
    range_batches: Tensor
    input_range: nn.Parameter
    programmed_weight: Tensor | None

    def _become_analog(self, scheme: AnalogScheme, in_features: int) -> None:
        self.scheme = scheme
        self.tiles = scheme.tiles(in_features)
        device = self.weight.device
        self.input_range = nn.Parameter(
            torch.ones(len(self.tiles), dtype=torch.float32, device=device),
            requires_grad=scheme.input_range == "learned",
        )
        self.register_buffer("programmed_weight", None, persistent=False)
        counts = torch.zeros(len(self.tiles), 2, dtype=torch.int64, device=device)
        self.register_buffer("clip_counts", counts, persistent=False)
        self.register_buffer("range_batches", torch.zeros((), dtype=torch.int64, device=device))
        self.name = ""
        self.state: ForwardState | None = None
        self.owns_range = True
        self.digital = False
        self.observer: Callable[[Tensor, Tensor | None], None] | None = None
        self._range_initializer = RangeInitializer(scheme)
        self._calibrated = scheme.input_range == "dynamic" or scheme.input_bits is None
        self._column_max: tuple[int, Tensor] | None = None

    @property
    def tile_weight(self) -> Tensor:
        """The weight as [out, in], whatever its storage order."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out] through DAC, tiles and ADC; the bias is added digitally."""
        row_mask = self.state.row_mask(x) if self.state is not None else None
        if self.observer is not None:
            self.observer(x, row_mask)
        if self.digital:
            weight = self.tile_weight if self.programmed_weight is None else self.programmed_weight
            return nn.functional.linear(x, weight, self.bias)
        if self.training:
            self._initialize_ranges(x, row_mask)
        if not self._calibrated:
            raise AnalogError(
                f"The input ranges of {self.name or 'this layer'} were never set; call "
                "calibrate_ranges(model, batches) or layer.set_input_range(values) first."
            )
        weight = self.tile_weight
        programmed = self.programmed_weight
        # "noisy": scale the ADC by what was programmed, as aihwkit-lightning does.
        noisy_bound = programmed is not None and self.scheme.adc_bound == "noisy"
        bound_weight = programmed if noisy_bound and programmed is not None else weight
        context = MatmulContext(self.scheme, self.tiles, row_mask=row_mask, dtype=_dtype(x, weight))
        if self.training and programmed is None:
            if self.state is not None:
                context.noise = self.state.generator(self.name, weight.device)
            context.sampled = context.noise is None
            context.clip_counts = self.clip_counts if torch.is_grad_enabled() else None
        y = analog_matmul(
            x,
            weight if programmed is None else programmed,
            self.input_range,
            self._maximum(bound_weight),
            context,
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def program(self, noise: Any, generator: torch.Generator | int) -> None:
        """Program the weights onto simulated devices; the forward then uses the result.

        Args:
            noise: A noise model: ``program(weight [out, rows], generator) -> Tensor`` per tile.
            generator: Source of the device errors, or a seed (combined with the layer's name).
        """
        if isinstance(generator, int):
            generator = keyed_generator(f"program/{generator}/{self.name}", self.weight.device)
        with torch.no_grad():
            blocks = self.tile_weight.detach().split(self.tiles, dim=1)
            noisy = [noise.program(block, generator).to(block.dtype) for block in blocks]
            self.programmed_weight = torch.cat(noisy, dim=1)
        self._column_max = None

    def restore(self) -> None:
        """Forget the programmed weights; the clean ones were never touched."""
        self.programmed_weight = None
        self._column_max = None

    @torch.no_grad()
    def set_input_range(self, values: Tensor | float | Sequence[float]) -> None:
        """Set λ from one value, or one per tile.

        Raises:
            AnalogError: A value is not positive and finite, or their number is not the tiles'.
        """
        new = torch.as_tensor(values, dtype=torch.float32, device=self.input_range.device)
        if new.dim() > 1 or new.numel() not in (1, len(self.tiles)):
            raise AnalogError(
                f"{self.name or 'The layer'} has {len(self.tiles)} tiles, but {new.numel()} input "
                "ranges were given; give one, or one per tile."
            )
        if not bool(((new > 0) & new.isfinite()).all()):
            raise AnalogError(
                f"Input ranges must be positive and finite, but {self.name or 'the layer'} was "
                f"given {new.tolist()}."
            )
        self.input_range.copy_(new.expand(len(self.tiles)))
        self._calibrated = True

    @torch.no_grad()
    def range_decay_gradient(self) -> Tensor:
        """The decay term of the range gradient [n_tiles], from the inputs counted since the last.

        ``decay · λ`` where the share of unclipped inputs exceeds ``range_min_percentage``, else 0.
        It does not depend on the loss, so it is added once per optimizer step.
        """
        clipped, total = self.clip_counts.unbind(1)
        unclipped = 1.0 - clipped / total.clamp_min(1)
        active = (unclipped > self.scheme.range_min_percentage) & (total > 0)
        return self.scheme.range_decay * self.input_range * active

    def train(self, mode: bool = True) -> AnalogLayer:
        """Switch mode; weights may have changed behind the version counter, so forget maxima."""
        self._column_max = None
        return super().train(mode)

    def _maximum(self, weight: Tensor) -> Tensor:
        """Column maxima [K, out]; kept between forwards in evaluation only."""
        weight = weight.detach()
        if self.training:
            return column_maximum(weight, self.tiles)
        if self._column_max is None or self._column_max[0] != weight._version:
            self._column_max = (weight._version, column_maximum(weight, self.tiles))
        return self._column_max[1]

    def _initialize_ranges(self, x: Tensor, row_mask: Tensor | None) -> None:
        scheme = self.scheme
        if not (scheme.range_init_in_training and self.owns_range):
            self._calibrated = self._calibrated or scheme.range_init_in_training
            return
        step = None if self.state is None or self.state.seed is None else self.state.step
        micro = 0 if self.state is None else self.state.micro_batch
        self._range_initializer.update(self, x.detach(), row_mask, step, micro)
        self._calibrated = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnalogLayer:
        """Move with the module, but keep the ranges in fp32: half precision rounds them away."""
        ranges = self.input_range.data
        super()._apply(fn, recurse)
        moved = self.input_range.data
        if moved.dtype != torch.float32:
            moved = ranges.to(moved.device)
        self.input_range.data = moved
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "input_range" in state_dict:
            self._calibrated = True
        self._column_max = None

    def extra_repr(self) -> str:
        """Tiles and converters beside what the digital layer shows."""
        scheme = self.scheme
        return (
            f"{super().extra_repr()}, tiles={self.tiles}, input_bits={scheme.input_bits}, "
            f"output_bits={scheme.output_bits}"
        )


def _dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Type of the products: autocast's where it is on, else the weight's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype
