"""The analog counterpart of transformers' ``Conv1D`` (GPT-2): a linear layer stored transposed."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from analog_plugin.layers.base import AnalogLayer
from analog_plugin.layers.linear import adopt
from analog_plugin.scheme import AnalogScheme


class AnalogConv1D(AnalogLayer, Conv1D):
    """Analog layer whose Parameter keeps ``Conv1D``'s order, ``weight`` [in, out]."""

    @classmethod
    def from_conv1d(cls, conv: Conv1D, scheme: AnalogScheme) -> AnalogConv1D:
        """Wrap ``conv`` without copying."""
        layer = adopt(cls, conv)
        layer._become_analog(scheme, conv.weight.shape[0])
        return layer

    def to_linear(self) -> Conv1D:
        """Return a digital ``Conv1D`` that shares weight and bias."""
        return adopt(Conv1D, self)

    @property
    def in_features(self) -> int:
        """Rows over all tiles."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """Columns."""
        return self.weight.shape[1]

    @property
    def tile_weight(self) -> Tensor:
        """[out, in] view of the [in, out] Parameter."""
        return self.weight.t()
