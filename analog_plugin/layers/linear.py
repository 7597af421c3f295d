"""The analog counterpart of ``nn.Linear``."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from analog_plugin.layers.base import AnalogLayer
from analog_plugin.scheme import AnalogScheme


class AnalogLinear(AnalogLayer, nn.Linear):
    """A linear layer on analog tiles, simulated: ``x`` [..., in] to [..., out].

    The input is quantized by a DAC with a static range per tile, multiplied by weights that carry
    noise (fresh in each training forward, or programmed once for evaluation), each tile's columns
    pass an ADC with a globally static bound, and tiles are summed digitally
    ('Analog Foundation Models', arXiv 2505.09663).

    Args:
        in_features, out_features, bias, device, dtype: As for ``nn.Linear``.
        scheme: Converters, tiles, noise.

    Example:
        >>> layer = AnalogLinear.from_linear(nn.Linear(8, 4), AnalogScheme(tile_rows=4))
        >>> layer.set_input_range([3.0, 2.5])
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: AnalogScheme,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._become_analog(scheme, in_features)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: AnalogScheme) -> AnalogLinear:
        """Wrap ``linear`` without copying: weight, bias and hooks are shared."""
        layer = adopt(cls, linear)
        layer._become_analog(scheme, linear.in_features)
        return layer

    def to_linear(self) -> nn.Linear:
        """Return a digital layer that shares weight and bias."""
        linear = adopt(nn.Linear, self)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        return linear


Layer = TypeVar("Layer", bound=nn.Module)
_MODULE_STATE = frozenset(nn.Module().__dict__)


def adopt(cls: type[Layer], source: nn.Module) -> Layer:
    """An instance of ``cls`` with the weight, bias, hooks and plain attributes of ``source``."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for key in _MODULE_STATE - {"_parameters", "_buffers", "_modules"}:
        module.__dict__[key] = source.__dict__[key]
    for key in ("in_features", "out_features", "nf", "nx"):
        if key in source.__dict__:
            module.__dict__[key] = source.__dict__[key]
    module.register_parameter("weight", source._parameters["weight"])
    module.register_parameter("bias", source._parameters.get("bias"))
    return module
