"""What a layer asks of Python while it runs as a part of a compiled graph.

A graph can hold neither a generator nor a count of steps. The operators here look up the layer that
they are called for, by a number which the graph reads from a tensor: so one graph serves the layers
of a model alike, in all steps.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from analog_plugin.ops.weights import training_weight

_LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = itertools.count()


def numbered(layer: Any) -> Tensor:
    """Enter ``layer`` under a number of its own, a scalar."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return torch.tensor(number, device="cpu")  # whatever the default is: it is read in Python


# Of the operators: what they ask Python for changes from call to call, so no CUDA graph holds them.
_ASKS_PYTHON = torch.Tag.cudagraph_unsafe


# The same seed gives the same noise in a recomputation: torch's global generator must be restored.
@torch.library.custom_op(
    "analog_plugin::training_weight",
    mutates_args=(),
    tags=[torch.Tag.nondeterministic_seeded, _ASKS_PYTHON],
)
def noisy_weight(weight: Tensor, column_max: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
    """W̃ [out, in] of the numbered layer now, draw for draw that of the uncompiled layer.

    Its gradient is that of ``weight`` [out, in]. The layer has noise or rounds its weights.
    """
    layer = _LAYERS[int(number)]
    generator = None if layer.state is None else layer.state.generator(layer.name, weight.device)
    return training_weight(weight, column_max, layer.tiles, layer.scheme, generator, dtype)


@noisy_weight.register_fake
def _(weight: Tensor, column_max: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


def _weight_dtype(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad.to(ctx.dtype), None, None, None


noisy_weight.register_autograd(_straight_through, setup_context=_weight_dtype)


@torch.library.custom_op(
    "analog_plugin::initialize_ranges", mutates_args=("ranges", "batches"), tags=[_ASKS_PYTHON]
)
def initialize_ranges(
    x: Tensor, row_mask: Tensor | None, ranges: Tensor, batches: Tensor, number: Tensor
) -> None:
    """Take inputs ``x`` [..., in] into ``ranges`` [K], the numbered layer's."""
    layer = _LAYERS[int(number)]
    initializer = layer.range_initializer
    initializer.update(x, row_mask, ranges, batches, layer.tiles, layer.moment)


@initialize_ranges.register_fake
def _(x: Tensor, row_mask: Tensor | None, ranges: Tensor, batches: Tensor, number: Tensor) -> None:
    return None
