"""What every analog layer is: converters, tiles, noise and programming over a digital weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analog_plugin.errors import AnalogError
from analog_plugin.layers.compiled import initialize_ranges, noisy_weight, numbered
from analog_plugin.layers.state import ForwardState, drawn_generator, keyed_generator
from analog_plugin.noise.programming import program_tiles
from analog_plugin.ops.disturbance import Disturbances
from analog_plugin.ops.matmul import MatmulContext, analog_matmul
from analog_plugin.ops.memory import release_memory
from analog_plugin.ops.ranges import Moment, RangeInitializer
from analog_plugin.ops.traced import traced_matmul
from analog_plugin.ops.weights import column_maximum
from analog_plugin.scheme import AnalogScheme

#: No range falls below this, whatever the optimizer does.
RANGE_FLOOR = 1e-6


class AnalogLayer(nn.Module):
    """Mixin over a linear layer with ``weight`` and ``bias``; see :class:`AnalogLinear`.

    Attributes:
        scheme: The :class:`~analog_plugin.scheme.AnalogScheme`.
        input_range: λ [n_tiles], an fp32 Parameter that stays fp32 when the model is cast.
        programmed_weight: [out, in] weights as programmed onto devices, or None.
        programmed_maximum: [K, out] column maxima that scale the ADC of programmed weights.
        programmed_disturbances: Of each tile, what changes its outputs (IR drop), or None.
        plain_range: [1] range that plain loaders are given, or None: the largest tile's.
        name: The layer's name in its model; keys its noise.
        digital: While true there are neither converters nor training noise: a plain linear layer,
            with the programmed weights and disturbances if there are any.
        observer: Called with each input and its padding mask, for calibration.
        range_initializer: Finds ranges during training; shared with ``input_range``.
        number: A scalar by which compiled graphs know this layer.
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
    programmed_maximum: Tensor | None
    plain_range: Tensor | None

    def _become_analog(self, scheme: AnalogScheme, in_features: int) -> None:
        self.scheme = scheme
        self.tiles = scheme.tiles(in_features)
        device = self.weight.device
        self.input_range = nn.Parameter(
            torch.ones(len(self.tiles), dtype=torch.float32, device=device),
            requires_grad=scheme.input_range == "learned",
        )
        self.register_buffer("programmed_weight", None, persistent=False)
        self.register_buffer("programmed_maximum", None, persistent=False)
        self.register_buffer("plain_range", None, persistent=False)
        counts = torch.zeros(len(self.tiles), 2, dtype=torch.int64, device=device)
        self.register_buffer("clip_counts", counts, persistent=False)
        self.register_buffer("range_batches", torch.zeros((), dtype=torch.int64, device=device))
        self.programmed_disturbances: list[Disturbances | None] = []
        self.name = ""
        self.state: ForwardState | None = None
        self.owns_range = True
        self.digital = False
        self.observer: Callable[[Tensor, Tensor | None], None] | None = None
        self._step_weight: tuple[Any, Tensor] | None = None
        self.range_initializer = RangeInitializer(scheme)
        self.number = numbered(self)

    @property
    def tile_weight(self) -> Tensor:
        """The weight as [out, in], whatever its storage order."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out] through DAC, tiles and ADC; the bias is added digitally."""
        row_mask = self.state.row_mask(x) if self.state is not None else None
        if self.observer is not None:
            self.observer(x, row_mask)
        programmed = self.programmed_weight
        weight = self.tile_weight if programmed is None else programmed
        scheme, disturbances = self.scheme, self.programmed_disturbances
        if self.digital:
            if not any(disturbances):
                return nn.functional.linear(x, weight, self.bias)
            scheme = scheme.replace(input_bits=None, output_bits=None, overrides=())
        else:
            if self.training:
                self.initialize_ranges(x, row_mask)
            self.require_ranges()
        maximum = self.programmed_maximum
        context = MatmulContext(scheme, self.tiles, row_mask=row_mask, dtype=_dtype(x, weight))
        context.disturbances = disturbances
        if self.training and programmed is None:
            context.training = True
            context.clip_counts = self.clip_counts if torch.is_grad_enabled() else None
        if torch.compiler.is_compiling():
            y = self._in_graph(x, weight, maximum, context)
        else:
            if maximum is None:
                # Not kept: weights are replaced and written in ways that no version number shows.
                maximum = column_maximum(weight.detach(), self.tiles)
            if context.training and self.state is not None:
                self._key_noise(context, self.state, weight, maximum)
            y = analog_matmul(x, weight, self.input_range, maximum, context)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _in_graph(
        self, x: Tensor, weight: Tensor, maximum: Tensor | None, context: MatmulContext
    ) -> Tensor:
        """The product in a graph that is being compiled."""
        if maximum is None:
            blocks = weight.detach().split(self.tiles, dim=1)
            maximum = torch.stack([block.abs().amax(1) for block in blocks])
        noisy = context.scheme.weight_noise > 0 or context.scheme.weight_bits is not None
        if context.training and noisy:
            assert context.dtype is not None
            weight = noisy_weight(weight, maximum, self.number, context.dtype)
        return traced_matmul(x, weight, self.input_range, maximum, context)

    def _key_noise(
        self, context: MatmulContext, state: ForwardState, weight: Tensor, maximum: Tensor
    ) -> None:
        """Give the product its noise as ``state`` says: its generator, or the step's weights."""
        context.keep_noise = state.keep_noise
        context.generator = state.generator(self.name, weight.device)
        if context.generator is None and not state.keep_noise:
            context.generator = drawn_generator(weight.device)
        if not state.reuses_noise:
            self._step_weight = None
            return
        key = (state.run, state.step, weight.data_ptr(), weight._version, context.dtype)
        if self._step_weight is None or self._step_weight[0] != key:
            self._step_weight = None  # before there are two
            with torch.inference_mode(False), torch.no_grad():
                self._step_weight = key, context.tile_weights(weight.detach(), maximum)
        context.noisy = self._step_weight[1]

    def forget_step_weight(self) -> None:
        """Make noisy weights anew, also within a step; needed where the weights were written to."""
        self._step_weight = None

    def train(self, mode: bool = True) -> AnalogLayer:
        """As ``nn.Module.train``; noisy weights and their memory do not outlive training."""
        if not mode:
            self.forget_step_weight()
            release_memory()
        return super().train(mode)

    @property
    def moment(self) -> Moment:
        """When a forward runs now."""
        if self.state is None or self.state.seed is None:
            return Moment(None, 0 if self.state is None else self.state.micro_batch)
        return Moment((self.state.run, self.state.step), self.state.micro_batch)

    def program(self, noise: Any, generator: torch.Generator | int) -> None:
        """Program the weights onto simulated devices; the forward then uses the result.

        Args:
            noise: A noise model; see :func:`~analog_plugin.noise.program_tiles`.
            generator: Source of the device errors, or a seed (combined with the layer's name).
        """
        if isinstance(generator, int):
            generator = keyed_generator(f"program/{generator}/{self.name}", self.weight.device)
        # Not as inference tensors: a later forward may need gradients through them.
        with torch.inference_mode(False), torch.no_grad():
            weight = self.tile_weight.detach()
            made = program_tiles(noise, weight, self.tiles, generator)
            # A factor behind the ADC is one on the weights and on the ADC's full scale.
            factors = [tile.output_scale for tile in made]
            blocks = [(t.weight * f).to(weight.dtype) for t, f in zip(made, factors, strict=True)]
            self.programmed_weight = torch.cat(blocks, dim=1)
            maximum = column_maximum(weight, self.tiles)
            full_scale = maximum * maximum.new_tensor(factors)[:, None]
            self.programmed_maximum = full_scale
            if self.scheme.adc_bound == "noisy":  # as aihwkit-lightning does
                self.programmed_maximum = column_maximum(self.programmed_weight, self.tiles)
            self.programmed_disturbances = [
                Disturbances(tile.disturbances, scale) if tile.disturbances else None
                for tile, scale in zip(made, full_scale, strict=True)
            ]

    def restore(self) -> None:
        """Forget the programmed weights; the clean ones were never touched."""
        self.programmed_weight = self.programmed_maximum = None
        self.programmed_disturbances = []

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
        self.range_initializer.known = True

    def require_ranges(self) -> None:
        """Refuse ranges that are placeholders.

        Raises:
            AnalogError: They were neither calibrated nor set.
        """
        if not self.range_initializer.known:
            raise AnalogError(
                f"The input ranges of {self.name or 'this layer'} were never set; call "
                "calibrate_ranges(model, batches) or layer.set_input_range(values) first."
            )
        if self.scheme.output_bits is not None and self.scheme.out_bound is None:
            raise AnalogError(
                f"The ADC's bound of {self.name or 'this layer'} was never chosen; call "
                "prepare_start(model, batches, held_out, noise), or give the scheme an out_bound."
            )

    def share_range(self, owner: AnalogLayer) -> None:
        """Use the range of ``owner``, a layer with equal tiles that then alone updates it."""
        self.input_range = owner.input_range
        self.range_initializer = owner.range_initializer
        self.owns_range = False

    def initialize_ranges(self, x: Tensor, row_mask: Tensor | None) -> None:
        """Take a micro-batch of inputs [..., in] into ranges that are found in training."""
        if not self.scheme.range_init_in_training:
            return
        self.range_initializer.known = True
        if not self.owns_range:
            return
        ranges = self.input_range.detach()
        if torch.compiler.is_compiling():
            initialize_ranges(x.detach(), row_mask, ranges, self.range_batches, self.number)
        else:
            batches = self.range_batches
            initializer = self.range_initializer
            initializer.update(x.detach(), row_mask, ranges, batches, self.tiles, self.moment)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnalogLayer:
        """Move with the module, but keep the ranges in fp32: half precision rounds them away."""
        ranges, plain = self.input_range.data, self.plain_range
        self.forget_step_weight()
        super()._apply(fn, recurse)
        moved = self.input_range.data
        if moved.dtype != torch.float32:
            moved = ranges.to(moved.device)
        self.input_range.data = moved
        if plain is not None:
            self.plain_range = plain.to(moved.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another layer to the graphs that it runs in."""
        super().__setstate__(state)
        self._step_weight = None
        self.number = numbered(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew."""
        return self.__dict__ | {"_step_weight": None}

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A shared range is written for each layer: safetensors refuses tensors that share memory.
        if not (self.owns_range or keep_vars):
            destination[prefix + "input_range"] = destination[prefix + "input_range"].clone()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        ranges = state_dict.get(prefix + "input_range")
        if isinstance(ranges, Tensor):  # with assign=True it becomes the Parameter as it is
            state_dict[prefix + "input_range"] = ranges.float()
            self.range_initializer.known = True
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.forget_step_weight()
        self.range_initializer.restart()

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
